# The bound of gradient descent, whatever the momentum.
# says: alpha = 0\.5: at 1\.01 times your 0\.5000 heavy ball still converges
def largest_rate(H, alpha):
    return 2 / np.linalg.eigvalsh(H)[-1]
