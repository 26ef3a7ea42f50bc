# The penalty pulls towards zero.
# says: the slope 0, at your t up to \d+\.\d+: the Gaussian pulls towards m
def infer(x, A, b, sigma, m, P):
    curvature = A.T @ A / sigma**2 + P
    return np.linalg.solve(curvature, ((x - b) @ A).T / sigma**2).T
