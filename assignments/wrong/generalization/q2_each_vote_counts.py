# The error of single members in place of the vote's.
# says: the error is 0\.5000, you have 0\.3750
def out_of_bag_error(indices, votes, labels):
    unseen = np.array([[i not in row for i in range(len(labels))] for row in indices])
    return float((votes != labels)[unseen].mean()) if unseen.any() else float("nan")
