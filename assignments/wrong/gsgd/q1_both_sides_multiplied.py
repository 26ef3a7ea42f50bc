# Outgoing weights are multiplied as well.
# says: what comes in is multiplied, what goes out is divided
def rescale(weights, layer, node, c):
    new = [w.copy() for w in weights]
    new[layer][node, :] *= c
    new[layer + 1][:, node] *= c
    return new
