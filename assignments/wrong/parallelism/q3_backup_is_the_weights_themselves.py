# The backup is the array that the update changes in place.
# says: 0\.56 after the second; you have 0\.5000
class Server:
    def __init__(self, weights, rate, strength=2.0, decay=0.95, eps=1e-7):
        self.weights = np.array(weights, dtype=float)
        self.rate, self.strength, self.decay, self.eps = rate, strength, decay, eps
        self.mean_square = np.zeros_like(self.weights)
        self.backup = {}

    def pull(self, worker):
        self.backup[worker] = self.weights
        return self.weights.copy()

    def push(self, worker, gradient):
        square = gradient**2
        self.mean_square = self.decay * self.mean_square + (1 - self.decay) * square
        curvature = self.strength / np.sqrt(self.mean_square + self.eps) * square
        gap = self.weights - self.backup[worker]
        self.weights -= self.rate * (gradient + curvature * gap)
