# The slowest of several taken as slow as one.
# says: 1\.5 in all; you have 1\.0000
def step_time(workers, spare):
    return 1.0
