"""G-SGD: rescaling that a network does not feel, its paths, and descent on path values.

``skeleton``   which weights of a network belong together, the free set, rescaling
``paths``      paths of small networks: structure matrix, values, activations, the sum over them
``optimizer``  G-SGD in O(m), and SGD with the free set frozen
``baselines``  Path-SGD, equi-normalization, unit norms, weight normalization
"""

from coursekit.gsgd.baselines import PathSGD, enorm_, unit_norm_, weight_norm_
from coursekit.gsgd.optimizer import GSGD, FrozenSkeletonSGD
from coursekit.gsgd.paths import (
    basis_paths,
    path_activations,
    path_norm,
    path_sum,
    path_values,
    structure_matrix,
)
from coursekit.gsgd.skeleton import Skeleton, rescale_
