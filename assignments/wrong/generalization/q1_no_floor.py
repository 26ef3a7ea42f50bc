# The floor that the covariance sets is overlooked.
# says: target 0\.2: None, you have
def members_needed(v, c, target):
    return max(1, int(np.ceil(abs((v - c) / (target - c)) - 1e-9)))
