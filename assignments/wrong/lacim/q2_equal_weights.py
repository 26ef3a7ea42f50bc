# The reconstruction is not weighted by the label.
# says: -2\.0931, you have -3\.6931
def bound(log_y, log_x, log_prior, log_q):
    top = log_y.max(axis=0)
    log_qy = top + np.log(np.exp(log_y - top).mean(axis=0))
    return log_qy + (log_x + log_prior - log_q).mean(axis=0)
