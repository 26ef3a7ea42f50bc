# The best pair first, then the best of the rest.
# says: = 0\.625, you have 0\.4\d+; the best pairs together
def mcc(truth, guess, domain):
    dim, total = truth.shape[1], 0.0
    for k in np.unique(domain):
        rows = domain == k
        both = np.corrcoef(truth[rows], guess[rows], rowvar=False)
        total = total + np.abs(both[:dim, dim:])
    mean = total / len(np.unique(domain))

    found = []
    for _ in range(dim):
        i, j = np.unravel_index(mean.argmax(), mean.shape)
        found.append(mean[i, j])
        mean[i], mean[:, j] = -1.0, -1.0
    return float(np.mean(found))
