# A small number keeps the logarithm finite and makes it wrong.
# says: 1000 lower the bound is -\d+\.\d+, you have -69\d\.\d+: stay in logarithms
def bound(log_y, log_x, log_prior, log_q):
    p = np.exp(log_y)
    mean = p.mean(axis=0) + 1e-300
    inner = log_x + log_prior - log_q
    return np.log(mean) + (p * inner).mean(axis=0) / mean
