# The number of outputs of a layer instead of its inputs.
# says: layer 1: 0\.1826, you have 0\.0500: a sum over 30 inputs
def weight_stds(widths, slope):
    kept = [1.0] + [(1 + slope**2) / 2] * (len(widths) - 2)
    return [(n * second) ** -0.5 for n, second in zip(widths[1:], kept, strict=True)]
