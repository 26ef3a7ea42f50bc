"""Preferring some solutions to others: penalties, projections, filters, images, averages.

``penalties``     `l1_penalty`, `l2_penalty`, `soft_threshold`, `project_norm_ball_`,
                  `ridge_filter`, `early_stopping_filter`
``augmentation``  the eight ``augment_*``
``callbacks``     `EarlyStopping`, `WeightAverage`, for `train.fit`
"""

from coursekit.regularization.augmentation import (
    augment_brightness,
    augment_color_shift,
    augment_contrast,
    augment_inversion,
    augment_noise,
    augment_rotation,
    augment_scaling,
    augment_translation,
)
from coursekit.regularization.callbacks import EarlyStopping, WeightAverage
from coursekit.regularization.penalties import (
    early_stopping_filter,
    l1_penalty,
    l2_penalty,
    project_norm_ball_,
    ridge_filter,
    soft_threshold,
)
