# The worst domain decides.
# says: you have \(1, 1\); setting and step both come from the mean
def choose(right, total, test):
    held_out = (right / total).min(axis=2)
    setting, step = np.unravel_index(held_out.argmax(), held_out.shape)
    place = int(setting), int(step)
    return place, float(test[place]), float(test.max())
