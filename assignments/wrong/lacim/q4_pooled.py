# Correlations over all domains at once.
# says: scores about 0\.01, with you (0\.9\d|1\.00): correlations within domains
def mcc(truth, guess, domain):
    dim = truth.shape[1]
    both = np.abs(np.corrcoef(truth, guess, rowvar=False)[:dim, dim:])
    orders = permutations(range(dim))
    return max(float(both[range(dim), order].mean()) for order in orders)
