"""Where the files are, whether they are intact, what is in them, and how to fetch them.

Every file is checked against its SHA-256 before its content is looked at; nothing is unpickled.
"""

import gzip
import hashlib
import importlib
import io
import math
import os
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np

from coursekit import _check

_SHIPPED = Path(__file__).parent / "shipped"
_IDX = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_SHEETS = tuple(f"cifar10/data_batch_{i}.webp" for i in range(1, 6)) + ("cifar10/test_batch.webp",)
_ARCHIVE = "cifar10/cifar-10-binary.tar.gz"

# Tried in this order: no mirror is trusted, the SHA-256 decides.
MIRRORS = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "fashion-mnist": (
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/",),
}


def _sums(folder: Path) -> dict[str, str]:
    """Read a list that ``sha256sum --check`` reads too."""
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    return {name: sha256 for sha256, name in (line.split() for line in lines)}


# The hash of cifar-10-binary.tar.gz is the one that TensorFlow Datasets and torchvision for Ruby
# publish; unlike all others it was not computed here from the file.
SHA256 = _sums(_SHIPPED.parent)
SHIPPED_SHA256 = _sums(_SHIPPED)
# CIFAR-10 as 3,073-byte records: a label, then 1,024 bytes each of red, green and blue.
RECORDS_SHA256 = {
    "train": "a0181da372c0d63a5920fdbea2ec3f83ecbc552d378218e1cb473cf634941a3b",
    "test": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}


def cache() -> Path:
    """Return the folder that `fetch` fills, whether or not it exists."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coursekit"


def places() -> list[Path]:
    """Return the folders where the full tier is looked for, in this order."""
    folder = os.environ.get("COURSEKIT_DATA")
    return [Path(folder), cache()] if folder else [cache()]


def _locate(file: str) -> Path | None:
    return next((place / file for place in places() if (place / file).is_file()), None)


def _read(file: str) -> bytes:
    """Read a file of the full tier, or say how to get it."""
    path = _locate(file)
    if path is None:
        searched = " or ".join(str(place) for place in places())
        name = file.split("/")[0].replace("-", "_")
        raise FileNotFoundError(
            f"load: expected {file} in {searched}, got no such file; run "
            f"`python -m coursekit.data fetch {name}`, or set COURSEKIT_DATA to a folder with it"
        )
    return _intact(path.read_bytes(), SHA256[file], str(path))


def _intact(content, sha256: str, what: str):
    """Hand the content back if its SHA-256 is the expected one."""
    got = hashlib.sha256(content).hexdigest()
    if got != sha256:
        raise ValueError(f"load: expected {what} with SHA-256 {sha256}, got {got}")
    return content


def decode_idx(compressed: bytes, what: str) -> np.ndarray:
    """Decode a gzipped IDX file of unsigned bytes; ``what`` is its name in messages.

    Bytes 0 to 3 are 0, 0, 8 and the number of dimensions; then comes one big-endian 32-bit size a
    dimension; then the values in C order.

    Raises
    ------
    ValueError
        If the gzip stream is damaged, the header is no such header, or values are missing or left.
    """
    try:
        raw = gzip.decompress(compressed)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"load: expected {what} as intact gzip, got: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"load: expected {what} with an IDX header, got bytes {raw[:8].hex(' ')}")
    start = 4 + 4 * raw[3]
    shape = tuple(np.frombuffer(raw, ">u4", raw[3], offset=4).tolist())
    if len(raw) - start != math.prod(shape):
        raise ValueError(
            f"load: expected {what} with {math.prod(shape)} values of shape {shape}, "
            f"got {len(raw) - start}"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def read_images(name: str, tier: str) -> list[np.ndarray]:
    """Read training images, training labels, test images and test labels, as bytes 0 to 255."""
    if name == "cifar10":
        records = _records_of_sheets() if _locate(_SHEETS[0]) else _records_of_archive()
        parts = []
        for part, array in records.items():
            _intact(array, RECORDS_SHA256[part], f"CIFAR-10's {part} records")
            parts += [array[:, 1:].reshape(-1, 3, 32, 32), array[:, 0]]
        return parts
    files = [f"{name.replace('_', '-')}/{file}" for file in _IDX]
    if tier == "full":
        return [decode_idx(_read(file), file) for file in files]
    return [
        decode_idx(_intact((_SHIPPED / file).read_bytes(), SHIPPED_SHA256[file], file), file)
        for file in files
    ]


def _records_of_sheets() -> dict[str, np.ndarray]:
    """Cut the lossless WebP sheets, each 100 x 100 tiles of 32 x 32 pixels, row by row."""
    image = _optional("PIL.Image")

    def pixels(file):
        with image.open(io.BytesIO(_read(file))) as sheet:
            tiles = np.asarray(sheet).reshape(100, 32, 100, 32, 3)
        return tiles.transpose(0, 2, 4, 1, 3).reshape(10_000, 3072)  # row, column, colour, y, x

    records = {}
    for part, sheets in (("train", _SHEETS[:5]), ("test", _SHEETS[5:])):
        labels = decode_idx(_read(file := f"cifar10/{part}-labels-idx1-ubyte.gz"), file)
        records[part] = np.hstack([labels[:, None], np.concatenate([pixels(s) for s in sheets])])
    return records


def _records_of_archive() -> dict[str, np.ndarray]:
    """Read the official binary archive in memory; nothing is extracted to disk."""
    with tarfile.open(fileobj=io.BytesIO(_read(_ARCHIVE))) as archive:
        content = {
            Path(member.name).stem: archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
            if member.name.endswith(".bin")
        }
    train = b"".join(content[f"data_batch_{i}"] for i in range(1, 6))
    records = {"train": train, "test": content["test_batch"]}
    return {part: np.frombuffer(raw, np.uint8).reshape(-1, 3073) for part, raw in records.items()}


def _optional(module: str):
    """Import a module of the extra ``data``, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'data: expected {module} to be installed, got none; pip install "coursekit[data]"'
        ) from error


def fetch(name: str) -> list[Path]:
    """Download the full tier of a data set into the cache.

    pooch writes to a temporary file and renames it once its SHA-256 is right, so the cache never
    holds half a file under its final name. A file that is there and intact is left alone.

    Raises
    ------
    ValueError
        If there is nothing to fetch under that name, or every mirror sent other bytes.
    ConnectionError
        If no mirror sent the right bytes and at least one broke off or did not answer.
    """
    _check.one_of("fetch", "name", name, [folder.replace("-", "_") for folder in MIRRORS])
    folder = name.replace("_", "-")
    files = [_ARCHIVE] if name == "cifar10" else [f"{folder}/{file}" for file in _IDX]
    return [_download(file, MIRRORS[folder]) for file in files]


def _download(file: str, mirrors: tuple[str, ...]) -> Path:
    pooch = _optional("pooch")
    target = cache() / file
    failures: list[Exception] = []
    for mirror in mirrors:
        try:
            pooch.retrieve(
                mirror + target.name,
                known_hash=f"sha256:{SHA256[file]}",
                fname=target.name,
                path=target.parent,
                downloader=pooch.HTTPDownloader(timeout=60),
            )
            return target
        except (ValueError, OSError) as error:
            failures.append(error)
            print(f"fetch: {mirror}{target.name} failed: {error}", file=sys.stderr)
    kind = ValueError if all(isinstance(e, ValueError) for e in failures) else ConnectionError
    told = "; ".join(str(error) for error in failures)
    raise kind(f"fetch: expected {file} from a mirror, got {told}")
