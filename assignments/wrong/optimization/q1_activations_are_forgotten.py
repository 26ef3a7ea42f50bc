# The ReLU is not counted.
# says: second layer: 0\.1414, you have 0\.1000: a ReLU halves
def weight_stds(widths, slope):
    return [n**-0.5 for n in widths[:-1]]
