# p taken as the probability to keep.
# says: about 0\.20 of the entries, yours drops 0\.80
def dropout(x, p, rng):
    mask = (rng.random(x.shape) < p) / p
    return x * mask, mask


def dropout_backward(dy, mask):
    return dy * mask
