# The sweep goes in the order of execution, so nodes pass on gradients that have not arrived.
# says: derivative of the loss by b is -0\.1298, you have .* when all its own messages are in
def backward(tape):
    adjoint = [0.0] * len(tape)
    adjoint[-1] = 1.0
    for place in range(len(tape)):
        for parent, local in tape[place][1]:
            adjoint[parent] += adjoint[place] * local
    return adjoint
