# w multiplies the probabilities and not the logits.
# says: its square 0\.0754, you have 0\.0\d+; w multiplies the logits
def softmax(z):
    p = np.exp(z - z.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def irm_penalty(domains):
    slopes = []
    for z, y in domains:
        q = softmax(z)
        slope = (softmax(q) * q).sum(axis=1) - q[np.arange(len(y)), y]
        slopes.append(slope.mean())
    return float(np.mean(np.square(slopes)))
