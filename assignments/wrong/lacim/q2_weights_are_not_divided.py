# The weight is p(y|s), not divided by its mean.
# says: -2\.0931, you have -1\.3931; .*weights add up to 1
def bound(log_y, log_x, log_prior, log_q):
    top = log_y.max(axis=0)
    log_qy = top + np.log(np.exp(log_y - top).mean(axis=0))
    inner = log_x + log_prior - log_q
    return log_qy + (np.exp(log_y) * inner).mean(axis=0)
