# The feature with the larger coefficient in a regression on both.
# says: y listens to feature 1, you have 2
def cause(domains):
    C = np.mean(domains, axis=0)
    slopes = np.linalg.solve(C[:2, :2], C[:2, 2])
    which = int(np.abs(slopes).argmax())
    return which + 1, float(slopes[which])
