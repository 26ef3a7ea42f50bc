"""NICO and ADNI from a folder that the reader obtains: neither can be handed on with a book."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from coursekit import _check

NICO = (
    "Get it from its authors, https://nico.thumedialab.com, and lay it out as "
    "<folder>/<class>/<context>/<image>.jpg or .png, for instance cat/grass/1.jpg"
)
ADNI = (
    "Apply for it, with its data-use agreement, at https://adni.loni.usc.edu, and lay it out as "
    "<folder>/subjects.csv with columns subject, label, age, tau, and <folder>/<subject>.npy"
)


class Examples(NamedTuple):
    """Inputs, integer classes, and of each example its context or its domain."""

    x: Tensor
    y: Tensor
    group: Tensor


def load_nico(
    folder: str | Path, *, classes=("cat", "dog"), contexts=("grass", "snow"), side: int = 64
) -> Examples:
    """Read animals in contexts; which of them make a domain is for the caller to say.

    Parameters
    ----------
    folder
        Laid out as ``<class>/<context>/<image>``, jpg or png.
    classes, contexts
        Names of the folders, in the order of their numbers.
    side
        Images are scaled to ``side`` x ``side``.

    Returns
    -------
    Examples
        x of shape ``(n, 3, side, side)`` in [0, 1]; ``group`` is the context's number.

    Raises
    ------
    FileNotFoundError
        If the folder or a part of it is missing; the message says where to apply and the layout.
    ValueError
        If a file is no image.

    Source: Y. He, Z. Shen and P. Cui, Towards Non-I.I.D. Image Classification, arXiv:1906.02899.
    Curriculum: L6.
    """
    from PIL import Image

    _check.integer("load_nico", "side", side, at_least=1)
    places = [
        (a, b, Path(folder, c, d)) for a, c in enumerate(classes) for b, d in enumerate(contexts)
    ]
    images, pairs = [], []
    for label, group, part in places:
        found = sorted(p for p in part.glob("*") if p.suffix.lower() in (".jpg", ".png"))
        if not found:
            raise FileNotFoundError(f"load_nico: expected images in {part}, got none. {NICO}")
        for path in found:
            try:
                with Image.open(path) as image:
                    small = image.convert("RGB").resize((side, side))
            except OSError as error:
                raise ValueError(f"load_nico: expected an image, got {path}") from error
            images.append(np.asarray(small, dtype=np.float32) / 255)
            pairs.append((label, group))
    y, groups = torch.tensor(pairs).unbind(dim=1)
    return Examples(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), y, groups)


def load_adni(folder: str | Path, *, by: str = "age", domains: int = 3) -> Examples:
    """Read brain volumes, with domains of equal size by age or by the protein tau.

    Parameters
    ----------
    folder
        Has ``subjects.csv`` with columns ``subject, label, age, tau`` (label 0, 1, …), and for
        every subject a volume ``<subject>.npy``, all of one shape, scaled to [0, 1].
    by
        ``"age"`` or ``"tau"``: what the domains are quantiles of.
    domains
        How many.

    Returns
    -------
    Examples
        x of shape ``(n, 1, depth, height, width)``; ``group`` is the domain, counted from the
        lowest.

    Raises
    ------
    FileNotFoundError
        If the table or a volume is missing; the message says where to apply and the layout.
    ValueError
        If a column is missing or not numeric, there are fewer subjects than domains, or volumes
        differ in shape or leave [0, 1].

    Curriculum: L6.
    """
    _check.one_of("load_adni", "by", by, ("age", "tau"))
    table = Path(folder, "subjects.csv")
    if not table.is_file():
        raise FileNotFoundError(f"load_adni: expected {table}, got none. {ADNI}")
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        y = torch.tensor([int(row["label"]) for row in rows])
        value = torch.tensor([float(row[by]) for row in rows])
        paths = [Path(folder, f"{row['subject']}.npy") for row in rows]
    except (KeyError, ValueError, TypeError) as error:
        wanted = f"expected numbers under label and {by} in {table}"
        raise ValueError(f"load_adni: {wanted}, got {error!r}. {ADNI}") from error
    if len(rows) < domains:
        raise ValueError(f"load_adni: expected {domains} subjects or more, got {len(rows)}")
    volumes: list[np.ndarray] = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"load_adni: expected a volume {path}, got none. {ADNI}")
        volumes.append(np.load(path, allow_pickle=False).astype(np.float32))
        _check.shape("load_adni", path.name, volumes[-1], volumes[0].shape)
        if volumes[-1].ndim != 3 or not (volumes[-1].min() >= 0 and volumes[-1].max() <= 1):
            got = f"{volumes[-1].shape} from {volumes[-1].min():g} to {volumes[-1].max():g}"
            raise ValueError(f"load_adni: expected a volume in [0, 1], got {got} in {path.name}")
    rank = value.argsort().argsort()
    return Examples(torch.from_numpy(np.stack(volumes))[:, None], y, rank * domains // len(rank))
