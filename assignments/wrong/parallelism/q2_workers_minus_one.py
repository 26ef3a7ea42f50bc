# The mean staleness for every gradient.
# says: the ages are \[0, 1, 1\], you have
def staleness(order):
    return [len(set(order)) - 1] * len(order)
