# The right number from one pass for each input: the cost of finite differences.
# says: one call of f gives the derivative in one direction, you made 3: put the direction
class Dual:
    def __init__(self, value, slope):
        self.value, self.slope = value, slope

    def __add__(self, other):
        other = lift(other)
        return Dual(self.value + other.value, self.slope + other.slope)

    def __mul__(self, other):
        other = lift(other)
        return Dual(self.value * other.value, self.slope * other.value + self.value * other.slope)

    __radd__, __rmul__ = __add__, __mul__


def lift(x):
    return x if isinstance(x, Dual) else Dual(x, 0.0)


def sin(x):
    return Dual(math.sin(x.value), math.cos(x.value) * x.slope)


def jvp(f, x, v):
    total = 0.0
    for i, step in enumerate(v):
        duals = [Dual(value, float(i == j)) for j, value in enumerate(x)]
        total += step * lift(f(*duals)).slope
    return total
