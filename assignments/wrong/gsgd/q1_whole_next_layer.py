# The whole next matrix is divided.
# says: the output was .* and is now|only the edges of this node
def rescale(weights, layer, node, c):
    new = [w.copy() for w in weights]
    new[layer][node, :] *= c
    new[layer + 1] /= c
    return new
