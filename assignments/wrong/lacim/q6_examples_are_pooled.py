# Held-out examples of all domains are pooled.
# says: so \(1, 0\); you have \(0, \d\): a large domain weighs no more
def choose(right, total, test):
    held_out = right.sum(axis=2) / total.sum()
    setting, step = np.unravel_index(held_out.argmax(), held_out.shape)
    place = int(setting), int(step)
    return place, float(test[place]), float(test.max())
