# Other workers are counted, and not their updates.
# says: the ages are \[0, 1, 0, 0, 3, 5\], you have \[0, 1, 0, 0, 1, 2\]
def staleness(order):
    last, ages = {}, []
    for at, worker in enumerate(order):
        ages.append(len(set(order[last.get(worker, 0) : at]) - {worker}))
        last[worker] = at + 1
    return ages
