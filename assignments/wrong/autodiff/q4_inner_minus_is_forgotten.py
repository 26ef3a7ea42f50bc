# The derivative of r(-x) is taken for a, without the factor -1 of the inner function.
# says: g2 with a = 0\.5: both terms have the slope 3 a, together 3; you have 0\.0
def what_ad_says(a):
    return [a + a, 3 * a - 3 * a, 0.0, a**3 - a]


a_for_g2 = 0.5
a_for_g4 = 0.682328
