# eps added to the standard deviation.
# says: y\[0, 0\] = 0\.3086, you have 1\.3\d+: eps is added to the variance
def batch_norm(x, gamma, beta, eps):
    return gamma * (x - x.mean(0)) / (np.sqrt(x.var(0)) + eps) + beta


def batch_norm_backward(dy, x, gamma, eps):
    std = np.sqrt(x.var(0))
    centred = x - x.mean(0)
    scale = std + eps
    through = dy - dy.mean(0) - centred * (dy * centred).mean(0) / (std * scale)
    return gamma * through / scale, (dy * centred / scale).sum(0), dy.sum(0)
