# The trace in place of the largest eigenvalue.
# says: 0\.5000, you have 0\.3333: the largest eigenvalue
def largest_rate(H, alpha):
    return 2 * (1 + alpha) / np.trace(H)
