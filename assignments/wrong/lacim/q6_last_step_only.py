# Settings are compared after the last step.
# says: so \(1, 0\); you have \(1, 1\)
def choose(right, total, test):
    held_out = (right / total).mean(axis=2)[:, -1]
    place = int(held_out.argmax()), test.shape[1] - 1
    return place, float(test[place]), float(test.max())
