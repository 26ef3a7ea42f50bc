# The sum of the samples in place of their mean.
# says: -2\.0931, you have -1\.4000
def bound(log_y, log_x, log_prior, log_q):
    top = log_y.max(axis=0)
    log_sum = top + np.log(np.exp(log_y - top).sum(axis=0))
    weights = np.exp(log_y - log_sum)
    inner = log_x + log_prior - log_q
    return log_sum + (weights * inner).sum(axis=0)
