# Members are taken as independent.
# says: four members, you have 3: of the K\^2 terms
def members_needed(v, c, target):
    return max(1, int(np.ceil(v / target - 1e-9)))
