# The contributions leave out the input.
# says: the output is 5, your contributions add up to
def by_paths(W1, W2, x):
    values = np.einsum("ji,kj->ijk", W1, W2)
    on = (W1 @ x > 0).astype(float)
    activations = np.broadcast_to(on[None, :, None], values.shape)
    return values, activations, values * activations
