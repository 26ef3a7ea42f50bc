# No degree of freedom is taken away.
# says: 9 weights, 6 paths, rank 6; you have \(9, 6, 9\)
def counts(widths, bias):
    weights = sum(a * b for a, b in zip(widths[:-1], widths[1:], strict=True))
    return weights, int(np.prod(widths)), weights
