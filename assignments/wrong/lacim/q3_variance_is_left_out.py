# The likelihood without the variance of its noise.
# says: so t = 1; you have 1\.6000
def infer(x, A, b, sigma, m, P):
    curvature = A.T @ A + P
    return m + np.linalg.solve(curvature, ((x - b - A @ m) @ A).T).T
