# The feature with the higher correlation is taken for the cause.
# says: y listens to feature 1, you have 2
def cause(domains):
    C = np.stack(domains)
    size = np.sqrt(C[:, [0, 1], [0, 1]] * C[:, 2, 2][:, None])
    mean = np.abs(C[:, :2, 2] / size).mean(axis=0)
    which = int(mean.argmax())
    return which + 1, float((C[:, 1 - which, 2] / C[:, 0, 1]).mean())
