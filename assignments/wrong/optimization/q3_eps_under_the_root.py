# eps added under the root.
# says: ends at -0\.009091, you have -0\.0000\d+: eps is added to the root
def adam(w, gradients, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8):
    m, v, path = np.zeros_like(w), np.zeros_like(w), []
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        w = w - lr * m / (1 - beta1**t) / np.sqrt(v / (1 - beta2**t) + eps)
        path.append(w)
    return path
