# Ratios of different units are compared by how far they move.
# says: in units of \(\d+, \d+\): y listens to feature \d, you have \d; a unit changes
def cause(domains):
    C = np.stack(domains)
    ratios = np.stack([C[:, 1, 2], C[:, 0, 2]], axis=1) / C[:, 0, 1][:, None]
    stays = int(ratios.std(axis=0).argmin())
    return stays + 1, float(ratios[:, stays].mean())
