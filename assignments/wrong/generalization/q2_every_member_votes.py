# Members that were trained on a sample vote too.
# says: the error is 0\.5000, you have 1\.0000
def out_of_bag_error(indices, votes, labels):
    seen = [set(row) for row in indices]
    judged = [i for i in range(len(labels)) if any(i not in s for s in seen)]
    winners = np.array([np.bincount(column).argmax() for column in votes.T])
    wrong = [winners[i] != labels[i] for i in judged]
    return float(np.mean(wrong)) if judged else float("nan")
