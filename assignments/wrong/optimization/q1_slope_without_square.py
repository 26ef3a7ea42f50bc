# The slope in place of its square.
# says: slope 0\.5, .* keeps the square of the slope
def weight_stds(widths, slope):
    kept = [1.0] + [(1 + slope) / 2] * (len(widths) - 2)
    return [(n * second) ** -0.5 for n, second in zip(widths[:-1], kept, strict=True)]
