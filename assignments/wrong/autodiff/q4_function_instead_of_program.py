# What the functions' derivatives are, where they have one: the engine does not know that.
# says: g2 with a = 0\.0: the rules say 0\.0, you have 3\.0; they see the program
def what_ad_says(a):
    return [0.0, 3.0, 0.0, 1.0]


a_for_g2 = 0.5
a_for_g4 = 0.682328
