# a1 is kept and b1 takes the change.
# says: to \[0\.8, 0\.6\], and b stays; you have
def step(a, b, alpha, beta, rate):
    v, u = a * b[0], a[0] * b
    dv, du = alpha / b[0], beta / a[0]
    dv[0] = (a[0] * alpha[0] - (b[1:] * beta[1:]).sum()) / v[0]
    v, u = v - rate * dv, u - rate * du
    new_b = np.concatenate([v[:1] / a[0], u[1:] / a[0]])
    return np.concatenate([a[:1], v[1:] / new_b[0]]), new_b
