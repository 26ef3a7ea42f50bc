# Mean and variance taken as constants in the backward pass.
# says: by x\[0, 0\] is -?\d\.\d+ by finite differences, .* through the mean and the variance
def batch_norm(x, gamma, beta, eps):
    return gamma * (x - x.mean(0)) / np.sqrt(x.var(0) + eps) + beta


def batch_norm_backward(dy, x, gamma, eps):
    scale = np.sqrt(x.var(0) + eps)
    x_hat = (x - x.mean(0)) / scale
    return gamma * dy / scale, (dy * x_hat).sum(0), dy.sum(0)
