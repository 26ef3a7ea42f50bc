# Right numbers, at the cost of the number of paths: 2 ** 40 of them in the last check.
# says: 40 doublings, one after the other: .* every path from output to input is followed
def backward(tape):
    adjoint = [0.0] * len(tape)

    def send(place, message):
        adjoint[place] += message
        for parent, local in tape[place][1]:
            send(parent, message * local)

    send(len(tape) - 1, 1.0)
    return adjoint
