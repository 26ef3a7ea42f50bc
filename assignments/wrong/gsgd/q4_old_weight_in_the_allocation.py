# The new u is divided by the old a1.
# says: the new value of u2 is
def step(a, b, alpha, beta, rate):
    v, u = a * b[0], a[0] * b
    dv, du = alpha / b[0], beta / a[0]
    dv[0] = (a[0] * alpha[0] - (b[1:] * beta[1:]).sum()) / v[0]
    v, u = v - rate * dv, u - rate * du
    return v / b[0], np.concatenate([b[:1], u[1:] / a[0]])
