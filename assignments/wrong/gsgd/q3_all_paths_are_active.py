# The activation is left out.
# says: add up to \[6\.?\d*\].*: a path is active|add up to .* a path is active
def by_paths(W1, W2, x):
    values = np.einsum("ji,kj->ijk", W1, W2)
    return values, np.ones_like(values), values * x[:, None, None]
