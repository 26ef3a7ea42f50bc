# A step of plain gradient descent.
# says: the new value of v1 is|b1 is the weight that stays
def step(a, b, alpha, beta, rate):
    return a - rate * alpha, b - rate * beta
