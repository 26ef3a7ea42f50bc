# Every number has the slope 1, constants too.
# says: 3 x \+ 5 at 2 has value 11 and slope 3, you have 11\.0 and 6\.0: a constant does not
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
    return x if isinstance(x, Dual) else Dual(x, 1.0)


def sin(x):
    return Dual(math.sin(x.value), math.cos(x.value) * x.slope)


def jvp(f, x, v):
    return f(*[Dual(value, slope) for value, slope in zip(x, v, strict=True)]).slope
