# One mask for all samples of the batch.
# says: yours with 0\.[34]\d: each sample has a mask
def dropout(x, p, rng):
    mask = np.broadcast_to((rng.random(x.shape[1:]) >= p) / (1 - p), x.shape)
    return x * mask, mask


def dropout_backward(dy, mask):
    return dy * mask
