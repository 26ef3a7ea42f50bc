# Each bias is counted as one path.
# says: you have .*: a bias starts one path for each way on
def counts(widths, bias):
    weights = sum(a * b for a, b in zip(widths[:-1], widths[1:], strict=True)) + bias * sum(
        widths[1:-1]
    )
    paths = int(np.prod(widths)) + bias * sum(widths[1:-1])
    return weights, paths, weights - sum(widths[1:-1])
