# The effective rate eta / (1 - alpha) held below the bound of gradient descent.
# says: alpha = 0\.5: at 1\.01 times your 0\.2500 heavy ball still converges
def largest_rate(H, alpha):
    return 2 * (1 - alpha) / np.linalg.eigvalsh(H)[-1]
