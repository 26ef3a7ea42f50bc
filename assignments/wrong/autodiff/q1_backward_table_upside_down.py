# The backward table in the order of computation, beta_5 first.
# says: beta_1, the first of the list, is f'\(x\)
def tables(x):
    a1 = 3 * x
    a2 = math.sin(a1)
    a3 = 2 + a2
    a4 = math.log(a3)
    b4 = 5 / a3
    b2 = b4 * math.cos(a1)
    return [a1, a2, a3, a4, 5 * a4], [5.0, b4, b4, b2, 3 * b2]
