# The backward table holds the derivatives of the primitives, each for itself.
# says: beta_1, the first of the list, is f'\(x\): a finite difference .* 7\.5000, you have 3
def tables(x):
    a1 = 3 * x
    a2 = math.sin(a1)
    a3 = 2 + a2
    a4 = math.log(a3)
    return [a1, a2, a3, a4, 5 * a4], [3.0, math.cos(a1), 1.0, 1 / a3, 5.0]
