"""Optimizers: every method is w ← w − lr · direction, and methods differ in the direction.

``updates``    the directions, pure functions on one tensor
``classes``    the same as thin `torch.optim.Optimizer` classes
``newton``     Newton's step, random coordinate descent
``schedules``  factors on the learning rate, and the gradient noise scale that goes with it
"""

from coursekit.optimizers.classes import SGD, Adagrad, AdaHessian, Adam, AdamW, RMSprop
from coursekit.optimizers.newton import newton_step, random_coordinate_descent
from coursekit.optimizers.schedules import (
    cosine,
    exponential_decay,
    gradient_noise_scale,
    step_decay,
    warmup,
)
from coursekit.optimizers.updates import (
    adagrad_update,
    adahessian_update,
    adam_update,
    adamw_update,
    rmsprop_update,
    sgd_update,
)
