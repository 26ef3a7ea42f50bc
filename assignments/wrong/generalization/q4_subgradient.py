# Subgradient steps, which pass over zero.
# says: exactly 0, you have
def lasso(X, y, lam, steps=2000):
    rate = 1 / np.linalg.eigvalsh(X.T @ X)[-1]
    w = np.zeros(X.shape[1])
    for t in range(100 * steps):
        step = rate / (1 + t / 50)
        w = w - step * (X.T @ (X @ w - y) + lam * np.sign(w))
    return w
