# The corrections of the first step at every step.
# says: w_2 = -0\.029390, you have
def adam(w, gradients, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8):
    m, v, path = np.zeros_like(w), np.zeros_like(w), []
    for g in gradients:
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        w = w - lr * m / (1 - beta1) / (np.sqrt(v / (1 - beta2)) + eps)
        path.append(w)
    return path
