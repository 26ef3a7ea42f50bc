# One softmax over samples and examples.
# says: M = 1: .*the only weight is 1
def bound(log_y, log_x, log_prior, log_q):
    top = log_y.max()
    log_qy = top + np.log(np.exp(log_y - top).mean(axis=0))
    weights = np.exp(log_y - top) / np.exp(log_y - top).sum()
    return log_qy + (weights * (log_x + log_prior - log_q)).sum(axis=0)
