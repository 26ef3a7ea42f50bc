# The smallest eigenvalue in place of the largest.
# says: rate 0\.1, 1 steps keep 0\.3000 of the top direction; ridge with your
def matching_penalty(X, rate, t):
    bottom = np.linalg.eigvalsh(X.T @ X / len(X))[0]
    left = (1 - rate * bottom) ** t
    return bottom * left / (1 - left)
