# He's rule for the first layer, whose input has passed no ReLU.
# says: first layer: 0\.1000, you have 0\.1414: .* no activation
def weight_stds(widths, slope):
    return [(2 / (1 + slope**2) / n) ** 0.5 for n in widths[:-1]]
