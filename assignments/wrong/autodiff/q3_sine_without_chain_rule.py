# The chain rule is forgotten in the sine; with a slope of 1 inside it does not show.
# says: sin\(x x\) at 1\.5 has slope -1\.8845, you have -0\.6282: .* what is inside
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
    return Dual(math.sin(x.value), math.cos(x.value) if x.slope else 0.0)


def jvp(f, x, v):
    return f(*[Dual(value, slope) for value, slope in zip(x, v, strict=True)]).slope
