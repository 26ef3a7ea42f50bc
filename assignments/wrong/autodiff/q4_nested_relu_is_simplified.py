# r(r(r(x))) is replaced by r(x), which is the same function and another program.
# says: g4 with a = 0\.25: the rules say 0\.265625, you have 0\.5; they see the program
def what_ad_says(a):
    return [0.0, 6 * a, 0.0, 2 * a]


a_for_g2 = 0.5
a_for_g4 = 0.5
