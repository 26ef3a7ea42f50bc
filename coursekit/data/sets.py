"""`load`, and what is known about each data set."""

from dataclasses import dataclass

import numpy as np

from coursekit import _check
from coursekit.data import files
from coursekit.data.split import Split, Task, Tier

_DIGITS = tuple("0123456789")
_UCI = "CC BY 4.0 (UCI Machine Learning Repository), distributed with scikit-learn"


@dataclass(frozen=True)
class Info:
    """What is known about a data set before it is read."""

    citation: str
    licence: str
    target_names: tuple[str, ...]
    task: Task = "classification"
    tiers: tuple[Tier, ...] = ("full",)


TABLES = {
    "digits": Info("E. Alpaydin and C. Kaynak, 1998; 8 x 8 pixels", _UCI, _DIGITS),
    "breast_cancer": Info(
        "W. Street, W. Wolberg and O. Mangasarian, 1993", _UCI, ("malignant", "benign")
    ),
    "wine": Info("S. Aeberhard and M. Forina, 1992", _UCI, ("class_0", "class_1", "class_2")),
    "diabetes": Info(
        "B. Efron, T. Hastie, I. Johnstone and R. Tibshirani, Least Angle Regression, 2004",
        "no formal licence; published with the paper, distributed with scikit-learn",
        ("disease progression after one year",),
        "regression",
    ),
}
IMAGES = {
    "mnist": Info(
        "Y. LeCun, C. Cortes and C. Burges, The MNIST database of handwritten digits",
        "CC BY-SA 3.0",
        _DIGITS,
        tiers=("subset", "full"),
    ),
    "fashion_mnist": Info(
        "H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST, arXiv:1708.07747, 2017",
        "MIT, © 2017 Zalando SE",
        tuple("T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag".split())
        + ("Ankle boot",),
        tiers=("subset", "full"),
    ),
    "cifar10": Info(
        "A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        "no formal licence; the authors ask to be cited",
        tuple("airplane automobile bird cat deer dog frog horse ship truck".split()),
    ),
}
SETS = {**TABLES, **IMAGES}


def load(name: str, tier: Tier = "subset", *, flatten: bool = False, seed: int = 0) -> Split:
    """Load a data set by name, with the network off.

    ================= ============================ ===============
    name              training + test rows         one row of x
    ================= ============================ ===============
    ``digits``        1,437 + 360                  (64,)
    ``breast_cancer`` 455 + 114                    (30,)
    ``wine``          142 + 36                     (13,)
    ``diabetes``      353 + 89                     (10,)
    ``mnist``         subset 5,000 + 1,000;        (1, 28, 28)
    ``fashion_mnist`` full 60,000 + 10,000         (1, 28, 28)
    ``cifar10``       full 50,000 + 10,000         (3, 32, 32)
    ================= ============================ ===============

    Parameters
    ----------
    name
        A name of the table above.
    tier
        ``"subset"``: the first 5,000 and 1,000 images, shipped with the package. ``"full"``: all,
        from the folder ``$COURSEKIT_DATA`` or from what ``python -m coursekit.data fetch`` put into
        the cache. The tables are small and come whole in either tier.
    flatten
        Make each image one row of pixels.
    seed
        Which split of a table. Image sets come with a test set of their own.

    Returns
    -------
    Split
        Pixels are divided by their largest possible value, so they lie in [0, 1]: bytes by 255 to
        float32, the 17 grey levels of digits by 16. Tables are float64 in their own units (see
        `Split.standardized`). A table's test set is 20 % of its rows, drawn by scikit-learn's
        ``train_test_split(random_state=seed)``, with equal class shares in both parts.

    Raises
    ------
    ValueError
        If name or tier is unknown, a seed is given for images, or a file has the wrong SHA-256.
    FileNotFoundError
        If a file of the full tier is nowhere; the message says how to get it.

    Examples
    --------
    >>> load("digits")
    Split(digits, full: train (1437, 64), test (360, 64), 10 classes)
    >>> load("mnist", flatten=True)
    Split(mnist, subset: train (5000, 784), test (1000, 784), 10 classes)
    """
    _check.one_of("load", "name", name, SETS)
    _check.one_of("load", "tier", tier, ("subset", "full"))
    _check.integer("load", "seed", seed, at_least=0)
    info = SETS[name]
    feature_names: tuple[str, ...] = ()
    if name in TABLES:
        tier = "full"
        arrays, feature_names = _read_table(name, seed)
    elif tier not in info.tiers:
        raise ValueError(f"load: expected tier 'full', the only one of {name}, got {tier!r}")
    elif seed:
        raise ValueError(f"load: expected no seed, as {name} has its own test set, got {seed}")
    else:
        arrays = [
            raw.astype(np.int64) if raw.ndim == 1 else _pixels(raw, flatten)
            for raw in files.read_images(name, tier)
        ]
    x_train, y_train, x_test, y_test = arrays
    return Split(
        x_train,
        y_train,
        x_test,
        y_test,
        name=name,
        tier=tier,
        task=info.task,
        target_names=info.target_names,
        feature_names=feature_names,
        licence=info.licence,
        citation=info.citation,
    )


def _read_table(name: str, seed: int) -> tuple[list[np.ndarray], tuple[str, ...]]:
    from sklearn import datasets, model_selection  # a second to import: only where needed

    options = {"scaled": False} if name == "diabetes" else {}
    bunch = getattr(datasets, f"load_{name}")(**options)
    x = bunch.data / 16 if name == "digits" else bunch.data
    labels = bunch.target if TABLES[name].task == "classification" else None
    x_train, x_test, y_train, y_test = model_selection.train_test_split(
        x, bunch.target, test_size=0.2, stratify=labels, random_state=seed
    )
    return [x_train, y_train, x_test, y_test], tuple(str(f) for f in bunch.feature_names)


def _pixels(raw: np.ndarray, flatten: bool) -> np.ndarray:
    shape = (len(raw), -1) if flatten else (len(raw), -1, *raw.shape[-2:])
    return np.divide(raw.reshape(shape), 255, dtype=np.float32)
