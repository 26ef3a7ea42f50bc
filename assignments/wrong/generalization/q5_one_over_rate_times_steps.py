# The rule of thumb 1 / (rate times steps), which holds for small eigenvalues alone.
# says: you have 2\.0000; divide|keep 0\.\d+ of the top direction
def matching_penalty(X, rate, t):
    return 1 / (rate * t)
