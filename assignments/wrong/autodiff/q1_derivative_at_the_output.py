# Each derivative is taken at the primitive's own value, not at its input. At x = 0 it is the same.
# says: beta_4 at x = 0\.4 is 1\.7053, .* the derivative of f_4 at alpha_3, its input
def tables(x):
    a1 = 3 * x
    a2 = math.sin(a1)
    a3 = 2 + a2
    a4 = math.log(a3)
    b4 = 5.0 / (2 + math.sin(a2))
    b2 = b4 * math.cos(a2)
    return [a1, a2, a3, a4, 5 * a4], [3 * b2, b2, b4, b4, 5.0]
