# Each example's slope is squared, and then the mean taken.
# says: 60 examples of one domain: .*the mean over examples comes before the square
def irm_penalty(domains):
    found = []
    for z, y in domains:
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        slope = (p * z).sum(axis=1) - z[np.arange(len(y)), y]
        found.append(np.square(slope).mean())
    return float(np.mean(found))
