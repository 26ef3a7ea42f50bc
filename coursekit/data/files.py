"""Where the files are, whether they are intact, what is in them, and how to fetch them.

Every file is checked against its SHA-256 before its content is looked at, and nothing is unpickled.
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

SHIPPED = Path(__file__).parent / "shipped"

_IDX = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_SHEETS = tuple(f"cifar10/data_batch_{i}.webp" for i in range(1, 6)) + ("cifar10/test_batch.webp",)
_ARCHIVE = "cifar10/cifar-10-binary.tar.gz"

# What `fetch` downloads: folder -> files, and folder -> where from, tried in this order.
FETCHED = {
    "mnist": tuple(f"mnist/{file}" for file in _IDX),
    "fashion-mnist": tuple(f"fashion-mnist/{file}" for file in _IDX),
    "cifar10": (_ARCHIVE,),
}
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
    """Read the hashes in the format of ``sha256sum``, which can check a whole folder with them."""
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    return {name: sha256 for sha256, name in (line.split() for line in lines)}


# The hash of cifar-10-binary.tar.gz is the one that TensorFlow Datasets and torchvision for Ruby
# publish; unlike all others it was not computed here from the file.
SHA256 = _sums(SHIPPED.parent)
SHIPPED_SHA256 = _sums(SHIPPED)
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


def locate(name: str) -> Path | None:
    """Return the first place's file of that name."""
    return next((place / name for place in places() if (place / name).is_file()), None)


def find(name: str) -> Path:
    """Locate a full-tier file, or say how to get it."""
    path = locate(name)
    if path is None:
        searched = " or ".join(str(place) for place in places())
        raise FileNotFoundError(
            f"load: expected {name} in {searched}, got no such file; run `python -m coursekit.data "
            f"fetch {name.split('/')[0]}`, or set COURSEKIT_DATA to a folder that holds it"
        )
    return path


def check_sha256(what: str, content: bytes | np.ndarray, expected: str) -> None:
    """Refuse content whose SHA-256 differs, naming both hashes."""
    got = hashlib.sha256(content).hexdigest()
    if got != expected:
        raise ValueError(f"load: expected {what} with SHA-256 {expected}, got {got}")


def _read(path: Path, sha256: str) -> bytes:
    content = path.read_bytes()
    check_sha256(str(path), content, sha256)
    return content


def decode_idx(compressed: bytes, what: str) -> np.ndarray:
    """Decode a gzipped IDX file of unsigned bytes.

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


def read_idx_set(folder: str, tier: str) -> list[np.ndarray]:
    """Read training images, training labels, test images and test labels, in this order."""
    names = [f"{folder}/{file}" for file in _IDX]
    if tier == "subset":
        found = [(SHIPPED / name, SHIPPED_SHA256[name]) for name in names]
    else:
        found = [(find(name), SHA256[name]) for name in names]
    return [decode_idx(_read(path, sha256), str(path)) for path, sha256 in found]


def read_cifar10() -> list[np.ndarray]:
    """Read CIFAR-10, whichever form is there, in the order of `read_idx_set`."""
    records = _records_of_sheets() if locate(_SHEETS[0]) else _records_of_archive()
    arrays = []
    for part, array in records.items():
        check_sha256(f"CIFAR-10's {part} records", array, RECORDS_SHA256[part])
        arrays += [array[:, 1:].reshape(-1, 3, 32, 32), array[:, 0]]
    return arrays


def _records_of_sheets() -> dict[str, np.ndarray]:
    """Cut the lossless WebP sheets, each 100 x 100 tiles of 32 x 32 pixels, row by row."""
    image = _optional("PIL.Image")

    def pixels(name):
        with image.open(io.BytesIO(_read(find(name), SHA256[name]))) as sheet:
            tiles = np.asarray(sheet).reshape(100, 32, 100, 32, 3)
        return tiles.transpose(0, 2, 4, 1, 3).reshape(10_000, 3072)  # row, column, colour, y, x

    records = {}
    for part, sheets in (("train", _SHEETS[:5]), ("test", _SHEETS[5:])):
        name = f"cifar10/{part}-labels-idx1-ubyte.gz"
        labels = decode_idx(_read(find(name), SHA256[name]), name)
        records[part] = np.hstack([labels[:, None], np.concatenate([pixels(s) for s in sheets])])
    return records


def _records_of_archive() -> dict[str, np.ndarray]:
    """Read the official binary archive in memory; nothing is extracted to disk."""
    content = _read(find(_ARCHIVE), SHA256[_ARCHIVE])
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        batches = {Path(member.name).name: member for member in archive.getmembers()}

        def read(name):
            return np.frombuffer(archive.extractfile(batches[name]).read(), np.uint8)

        train = np.concatenate([read(f"data_batch_{i}.bin") for i in range(1, 6)])
        return {"train": train.reshape(-1, 3073), "test": read("test_batch.bin").reshape(-1, 3073)}


def _optional(module: str):
    """Import a module of the extra ``data``, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'load: {module.split(".")[0]} is needed here; pip install "coursekit[data]"'
        ) from error


def fetch(name: str) -> list[Path]:
    """Download the full tier of a data set into the cache, from the first mirror that delivers.

    pooch writes to a temporary file and renames it once its SHA-256 is right, so the cache never
    holds half a file under its final name. Files that are there and intact are left alone.

    Raises
    ------
    ValueError
        If there is nothing to fetch under that name, or every mirror sent other bytes.
    ConnectionError
        If no mirror sent the right bytes and at least one broke off or did not answer.
    """
    folder = name.replace("_", "-")
    _check.one_of("fetch", "name", folder, FETCHED)
    pooch = _optional("pooch")
    paths = []
    for file in FETCHED[folder]:
        failures: list[Exception] = []
        for mirror in MIRRORS[folder]:
            try:
                path = pooch.retrieve(
                    mirror + Path(file).name,
                    known_hash=f"sha256:{SHA256[file]}",
                    fname=Path(file).name,
                    path=cache() / folder,
                    downloader=pooch.HTTPDownloader(timeout=60),
                )
                paths.append(Path(path))
                break
            except (ValueError, OSError) as error:
                print(f"fetch: {mirror} failed: {error}", file=sys.stderr)
                failures.append(error)
        else:
            kind = (
                ValueError if all(isinstance(e, ValueError) for e in failures) else ConnectionError
            )
            told = "; ".join(f"{m}: {e}" for m, e in zip(MIRRORS[folder], failures, strict=True))
            raise kind(f"fetch: expected {file} from one of its mirrors, got {told}")
    return paths
