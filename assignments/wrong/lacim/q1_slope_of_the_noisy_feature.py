# b is the slope of y on the feature, which its noise shrinks.
# says: b = 2, you have 0\.6667: the noise of a feature
def cause(domains):
    C = np.stack(domains)
    slopes = C[:, :2, 2] / C[:, [0, 1], [0, 1]]
    spread = np.ptp(slopes, axis=0) / np.abs(slopes).max(axis=0)
    stays = int(spread.argmin())
    return stays + 1, float(slopes[:, stays].mean())
