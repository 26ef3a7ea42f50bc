# The softmax of large logits overflows.
# says: the slope is 1000, you have the penalty nan: take the largest logit out
def irm_penalty(domains):
    slopes = []
    for z, y in domains:
        p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        slopes.append(((p * z).sum(axis=1) - z[np.arange(len(y)), y]).mean())
    return float(np.mean(np.square(slopes)))
