# The derivative by v1 keeps what belongs to the other paths.
# says: the new value of v1 is
def step(a, b, alpha, beta, rate):
    v, u = a * b[0] - rate * alpha / b[0], a[0] * b - rate * beta / a[0]
    new_a = v / b[0]
    return new_a, np.concatenate([b[:1], u[1:] / new_a[0]])
