# The caller's matrices are changed.
# says: the matrices that you were given have changed|the output was
def rescale(weights, layer, node, c):
    new = list(weights)
    new[layer][node, :] *= c
    new[layer + 1][:, node] /= c
    return new
