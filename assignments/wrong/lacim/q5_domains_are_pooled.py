# The slope of all domains together is squared.
# says: two domains with the slopes 0\.\d+ and -0\.\d+: .*or slopes cancel
def irm_penalty(domains):
    slopes = []
    for z, y in domains:
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        slopes.append(((p * z).sum(axis=1) - z[np.arange(len(y)), y]).mean())

    return float(np.mean(slopes) ** 2)
