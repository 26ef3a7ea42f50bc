# The worker's own update is counted as well.
# says: the ages are \[0, 1, 1\], you have
def staleness(order):
    pulled, ages = {}, []
    for version, worker in enumerate(order):
        ages.append(version - pulled.get(worker, 0))
        pulled[worker] = version
    return ages
