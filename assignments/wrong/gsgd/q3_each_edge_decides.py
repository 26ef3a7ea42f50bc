# A path is switched by its own first edge.
# says: add up to .* a path is active
def by_paths(W1, W2, x):
    values = np.einsum("ji,kj->ijk", W1, W2)
    on = ((W1 * x).T > 0).astype(float)
    activations = np.broadcast_to(on[:, :, None], values.shape)
    return values, activations, values * activations * x[:, None, None]
