# The eigenvalue of the sum in place of the mean.
# says: you have -2\.0000; divide X\^T X
def matching_penalty(X, rate, t):
    top = np.linalg.eigvalsh(X.T @ X)[-1]
    left = (1 - rate * top) ** t
    return top * left / (1 - left)
