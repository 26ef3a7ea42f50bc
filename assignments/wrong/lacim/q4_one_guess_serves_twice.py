# Each true coordinate takes the recovered one that is most like it, be it taken or not.
# says: = 0\.35, you have 0\.(69|7\d); each true coordinate gets one of its own
def mcc(truth, guess, domain):
    dim, total = truth.shape[1], 0.0
    for k in np.unique(domain):
        rows = domain == k
        both = np.corrcoef(truth[rows], guess[rows], rowvar=False)
        total = total + np.abs(both[:dim, dim:])
    mean = total / len(np.unique(domain))

    return float(mean.max(axis=1).mean())
