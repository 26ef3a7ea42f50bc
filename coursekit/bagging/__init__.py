"""Ensembles: many models instead of one, how to make them differ, and what their average is worth.

``bootstrap_indices out_of_bag``         samples with replacement, and the rows each one missed
``majority_vote average_probabilities``  two ways to one answer
``error_covariance``                     what members get wrong, alone and together
``expected_ensemble_error``              what the average of any number of them then gets wrong
``Ensemble fit_members``                 all members of one architecture trained at once

``rules`` has the functions, ``ensemble`` the module and its training.
"""

from coursekit.bagging.ensemble import Ensemble, fit_members
from coursekit.bagging.rules import (
    ErrorCovariance,
    average_probabilities,
    bootstrap_indices,
    error_covariance,
    expected_ensemble_error,
    majority_vote,
    out_of_bag,
)
