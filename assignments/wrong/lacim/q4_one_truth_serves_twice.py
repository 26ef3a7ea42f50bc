# Each recovered coordinate takes the true one that it is most like, be it taken or not.
# says: = 0\.5, you have 1\.00; each true coordinate gets one of its own
def mcc(truth, guess, domain):
    dim, total = truth.shape[1], 0.0
    for k in np.unique(domain):
        rows = domain == k
        both = np.corrcoef(truth[rows], guess[rows], rowvar=False)
        total = total + np.abs(both[:dim, dim:])
    mean = total / len(np.unique(domain))

    return float(mean.max(axis=0).mean())
