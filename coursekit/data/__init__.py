"""Real data sets, offline by default, and toy problems; never a silent fall-back, never a pickle.

``split``   `Split`: what every loader returns
``sets``    `load` and what is known about each set
``files``   where the files are, whether they are intact, what is in them, how to fetch them
``toys``    `two_moons`, `gaussian_blobs`, `noisy_sine`

From a shell: ``python -m coursekit.data list``, ``... path mnist``, ``... fetch mnist``.
"""

from coursekit.data.sets import SETS, load
from coursekit.data.split import Split
from coursekit.data.toys import gaussian_blobs, noisy_sine, two_moons

__all__ = ["SETS", "Split", "gaussian_blobs", "load", "noisy_sine", "two_moons"]
