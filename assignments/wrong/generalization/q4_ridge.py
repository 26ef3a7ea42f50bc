# The squared penalty's step.
# says: w = \[ 2\.   -0\.75  0\.  \], you have
def lasso(X, y, lam, steps=2000):
    rate = 1 / np.linalg.eigvalsh(X.T @ X)[-1]
    w = np.zeros(X.shape[1])
    for _ in range(steps):
        w = (w - rate * X.T @ (X @ w - y)) / (1 + rate * lam)
    return w
