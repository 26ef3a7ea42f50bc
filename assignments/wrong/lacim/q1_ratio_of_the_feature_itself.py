# A feature is judged by its own covariance with y, and not by the other's.
# says: if y listens to x1, then cov\(x2, y\) / cov\(x1, x2\) stays
def cause(domains):
    C = np.stack(domains)
    ratios = C[:, :2, 2] / C[:, 0, 1][:, None]
    spread = np.ptp(ratios, axis=0) / np.abs(ratios).max(axis=0)
    stays = int(spread.argmin())
    return stays + 1, float(ratios[:, stays].mean())
