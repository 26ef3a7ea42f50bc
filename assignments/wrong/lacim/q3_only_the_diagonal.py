# Only the diagonal of the precision is used.
# says: the slope 0, at your t up to \d+\.\d+: the Gaussian pulls towards m
def infer(x, A, b, sigma, m, P):
    curvature = A.T @ A / sigma**2 + np.diag(np.diag(P))
    slope = (x - b - A @ m) @ A / sigma**2
    return m + np.linalg.solve(curvature, slope.T).T
