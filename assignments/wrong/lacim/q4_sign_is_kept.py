# A coordinate of the other sign counts as wrong.
# says: with its sign changed: all is recovered, 1; you have
def mcc(truth, guess, domain):
    dim, total = truth.shape[1], 0.0
    for k in np.unique(domain):
        rows = domain == k
        both = np.corrcoef(truth[rows], guess[rows], rowvar=False)
        total = total + both[:dim, dim:]
    mean = total / len(np.unique(domain))
    orders = permutations(range(dim))
    return max(float(mean[range(dim), order].mean()) for order in orders)
