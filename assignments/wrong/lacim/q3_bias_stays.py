# The decoder's bias is not taken off.
# says: so t = 1; you have 1\.2500
def infer(x, A, b, sigma, m, P):
    curvature = A.T @ A / sigma**2 + P
    return m + np.linalg.solve(curvature, ((x - A @ m) @ A).T / sigma**2).T
