# The setting by held-out parts, the step on the test domain.
# says: \(0, 1\) whatever the test domain says, you have \(0, [02]\)
def choose(right, total, test):
    held_out = (right / total).mean(axis=2)
    setting = int(held_out.max(axis=1).argmax())
    place = setting, int(test[setting].argmax())
    return place, float(test[place]), float(test.max())
