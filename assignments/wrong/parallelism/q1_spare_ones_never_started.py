# The spare workers are left out altogether.
# says: 10 workers, 2 spare: 1\.4290 ms, you have 2\.7179
def step_time(workers, spare):
    return sum(1 / k for k in range(1, workers - spare + 1))
