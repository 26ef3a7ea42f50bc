# The first with the first, the second with the second.
# says: in the other order, .*you have 0\.0
def mcc(truth, guess, domain):
    dim, total = truth.shape[1], 0.0
    for k in np.unique(domain):
        rows = domain == k
        both = np.corrcoef(truth[rows], guess[rows], rowvar=False)
        total = total + np.abs(both[:dim, dim:])
    mean = total / len(np.unique(domain))

    return float(np.diag(mean).mean())
