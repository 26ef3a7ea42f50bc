# The backward pass forgets the scale.
# says: a kept entry passes dy / \(1 - p\) on
def dropout(x, p, rng):
    mask = (rng.random(x.shape) >= p) / (1 - p)
    return x * mask, mask


def dropout_backward(dy, mask):
    return dy * (mask > 0)
