# All paths taken as independent.
# says: rank 28; you have \(36, 96, 96\): paths multiply
def counts(widths, bias):
    weights = sum(a * b for a, b in zip(widths[:-1], widths[1:], strict=True)) + bias * sum(
        widths[1:]
    )
    paths = int(np.prod(widths))
    return weights, paths, paths
