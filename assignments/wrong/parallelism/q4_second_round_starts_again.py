# The second half repeats the plan of the first.
# says: two ranks: both should hold
def chunk_to_send(rank, step, world):
    return (rank - step % (world - 1)) % world
