# Samples without a judge stay in the denominator.
# says: 1\.0, you have 0\.33\d+: samples without a judge
def out_of_bag_error(indices, votes, labels):
    wrong, judged = 0, 0
    for i, label in enumerate(labels):
        unseen = ~(indices == i).any(axis=1)
        if unseen.any():
            judged += 1
            wrong += np.bincount(votes[unseen, i]).argmax() != label
    return wrong / len(labels) if judged else float("nan")
