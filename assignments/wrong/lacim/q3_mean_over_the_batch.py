# The mean likelihood of the batch against each example's penalty.
# says: by itself and \[.*\] in company; the objective of a batch is the sum
def infer(x, A, b, sigma, m, P):
    curvature = A.T @ A / sigma**2 / len(x) + P
    slope = (x - b - A @ m) @ A / sigma**2 / len(x)
    return m + np.linalg.solve(curvature, slope.T).T
