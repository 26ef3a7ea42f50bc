# The chunk's number goes up with the steps.
# says: 3 ranks: rank 0 should hold .* a partial sum
def chunk_to_send(rank, step, world):
    return (rank + step) % world
