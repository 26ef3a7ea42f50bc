# The last message to arrive replaces those before it.
# says: the derivative of x \* x at 3 is 6, you have 3\.0: .* two messages, and they add up
def backward(tape):
    adjoint = [0.0] * len(tape)
    adjoint[-1] = 1.0
    for place in reversed(range(len(tape))):
        for parent, local in tape[place][1]:
            adjoint[parent] = adjoint[place] * local
    return adjoint
