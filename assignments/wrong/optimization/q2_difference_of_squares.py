# The variance as mean of squares minus square of mean.
# says: subtract the mean before you square
def batch_norm(x, gamma, beta, eps):
    variance = (x**2).mean(0) - x.mean(0) ** 2
    return gamma * (x - x.mean(0)) / np.sqrt(variance + eps) + beta


def batch_norm_backward(dy, x, gamma, eps):
    scale = np.sqrt((x**2).mean(0) - x.mean(0) ** 2 + eps)
    x_hat = (x - x.mean(0)) / scale
    through = dy - dy.mean(0) - x_hat * (dy * x_hat).mean(0)
    return gamma * through / scale, (dy * x_hat).sum(0), dy.sum(0)
