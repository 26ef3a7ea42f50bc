# Domains weigh by their number of rows.
# says: 0\.5, you have 0\.7\d; every domain has the same weight
def mcc(truth, guess, domain):
    dim, total = truth.shape[1], 0.0
    for k in np.unique(domain):
        rows = domain == k
        both = np.corrcoef(truth[rows], guess[rows], rowvar=False)
        total = total + rows.mean() * np.abs(both[:dim, dim:])
    orders = permutations(range(dim))
    return max(float(total[range(dim), order].mean()) for order in orders)
