# Every domain has a matching of its own.
# says: change places in the second domain: 0\.5, you have 1\.00; one matching holds
def mcc(truth, guess, domain):
    dim, scores = truth.shape[1], []
    for k in np.unique(domain):
        rows = domain == k
        both = np.corrcoef(truth[rows], guess[rows], rowvar=False)
        both = np.abs(both[:dim, dim:])
        orders = permutations(range(dim))
        scores.append(max(both[range(dim), order].mean() for order in orders))
    return float(np.mean(scores))
