# Probabilities, which are 0 at -1000.
# says: 1000 lower the bound is -\d+\.\d+, you have nan: stay in logarithms
def bound(log_y, log_x, log_prior, log_q):
    p = np.exp(log_y)
    inner = log_x + log_prior - log_q
    return np.log(p.mean(axis=0)) + (p * inner).mean(axis=0) / p.mean(axis=0)
