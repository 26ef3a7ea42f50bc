"""Data sets: what is in them, what is refused, and what a failed download leaves behind."""

import contextlib
import gzip
import hashlib
import http.server
import io
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import datasets

from coursekit import data
from coursekit.data import __main__ as command_line
from coursekit.data import files

ROOT = Path(os.environ.get("COURSEKIT_DATA", "nowhere"))
full_tier = pytest.mark.skipif(
    not (ROOT / "mnist").is_dir(), reason="COURSEKIT_DATA names no folder with the full data sets"
)


def idx(array):
    """Encode bytes as gzipped IDX."""
    sizes = np.array(array.shape, ">u4").tobytes()
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes(), mtime=0)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no COURSEKIT_DATA."""
    monkeypatch.delenv("COURSEKIT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "coursekit"


# ---- tables ----


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("digits", (1437, 64), (360, 64)),
        ("breast_cancer", (455, 30), (114, 30)),
        ("wine", (142, 13), (36, 13)),
        ("diabetes", (353, 10), (89, 10)),
    ],
)
def test_a_table_is_split_into_scikit_learns_rows(name, train, test):
    options = {"scaled": False} if name == "diabetes" else {}
    bunch = getattr(datasets, f"load_{name}")(**options)
    split = data.load(name)
    assert (split.x_train.shape, split.x_test.shape, split.tier) == (train, test, "full")
    scale = 16 if name == "digits" else 1
    rows = np.hstack(
        [
            np.vstack([split.x_train, split.x_test]) * scale,
            np.concatenate([split.y_train, split.y_test])[:, None],
        ]
    )
    expected = np.hstack([bunch.data, bunch.target[:, None]])
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)])
    assert split.feature_names == tuple(bunch.feature_names)
    if split.task == "classification":
        assert split.target_names == tuple(str(t) for t in bunch.target_names)
        shares = [np.bincount(y) / len(y) for y in (split.y_train, split.y_test)]
        assert np.abs(shares[0] - shares[1]).max() < 1 / len(split.y_test)  # stratified


def test_the_default_split_is_the_same_on_every_machine():
    indices = data.load("digits").y_test.astype("<i8").tobytes()
    assert hashlib.sha256(indices).hexdigest()[:16] == "4493b2052e7b4258"


def test_a_seed_chooses_another_split_of_a_table():
    same = data.load("wine", seed=1).x_test, data.load("wine", seed=1).x_test
    np.testing.assert_array_equal(*same)
    assert not np.array_equal(same[0], data.load("wine").x_test)


def test_digits_lie_in_the_unit_interval_in_steps_of_a_sixteenth():
    x = data.load("digits").x_train
    assert set(np.unique(x * 16)) == set(range(17))


# ---- shipped subsets ----


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_a_shipped_subset_loads_with_no_folder_and_no_cache(name, cache):
    split = data.load(name)
    assert split.x_train.shape == (5_000, 1, 28, 28)
    assert split.x_test.shape == (1_000, 1, 28, 28)
    assert split.x_train.dtype == np.float32
    assert split.y_train.dtype == np.int64
    assert (split.x_train.min(), split.x_train.max()) == (0, 1)
    np.testing.assert_array_equal(
        data.load(name, flatten=True).x_test, split.x_test.reshape(1_000, 784)
    )
    assert not cache.exists()


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_shipped_files_carry_a_licence_and_no_time_stamp(name):
    folder = Path(files.__file__).parent / "shipped" / name
    assert "Changes    Only the first 5,000" in (folder / "LICENSE.txt").read_text("utf-8")
    for path in folder.glob("*.gz"):
        assert path.read_bytes()[4:8] == bytes(4), path  # the modification time of gzip's header
    assert sum(path.stat().st_size for path in folder.glob("*.gz")) < 3_000_000


@full_tier
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_subset_is_the_first_rows_of_the_full_set(name):
    subset, full = data.load(name), data.load(name, "full")
    np.testing.assert_array_equal(subset.x_train, full.x_train[:5_000])
    np.testing.assert_array_equal(subset.y_train, full.y_train[:5_000])
    np.testing.assert_array_equal(subset.x_test, full.x_test[:1_000])
    np.testing.assert_array_equal(subset.y_test, full.y_test[:1_000])


# ---- full tier ----

MNIST_TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
MNIST_TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.fixture(scope="module")
def raw_cifar10():
    """The four arrays of bytes, read once for this module."""
    return files.read_images("cifar10", "full")


@full_tier
@pytest.mark.parametrize(
    ("name", "train", "test", "mean", "std"),
    [
        ("mnist", MNIST_TRAIN, MNIST_TEST, [0.1307], [0.3081]),
        ("fashion_mnist", [6_000] * 10, [1_000] * 10, [0.2860], [0.3530]),
        (
            "cifar10",
            [5_000] * 10,
            [1_000] * 10,
            [0.4914, 0.4822, 0.4465],
            [0.2470, 0.2435, 0.2616],
        ),
    ],
)
def test_a_full_set_has_the_published_counts_means_and_deviations(
    name, train, test, mean, std, request, monkeypatch
):
    if name == "cifar10":
        raw = request.getfixturevalue("raw_cifar10")
        monkeypatch.setattr(files, "read_images", lambda *_: raw)
    split = data.load(name, "full")
    assert np.bincount(split.y_train).tolist() == train
    assert np.bincount(split.y_test).tolist() == test
    for channel, (channel_mean, channel_std) in enumerate(zip(mean, std, strict=True)):
        x = split.x_train[:, channel].ravel()
        assert abs(x.mean(dtype=np.float64) - channel_mean) < 6e-5
        assert abs(x.std(dtype=np.float64) - channel_std) < 6e-5


@full_tier
def test_cifar10_sheets_hold_the_official_records(raw_cifar10):
    """The published MD5 of the first and the last binary batch, on bytes put together here."""
    x_train, y_train, x_test, y_test = raw_cifar10
    records = [
        np.hstack([y[:, None], x.reshape(len(x), -1)])
        for x, y in ((x_train[:10_000], y_train[:10_000]), (x_test, y_test))
    ]
    md5 = [hashlib.md5(r.tobytes(), usedforsecurity=False).hexdigest() for r in records]
    assert md5 == ["5dd7e06a14cb22eb9f671a540d1b7c25", "803d5f7f4d78ea53de84dbe85f74fb6d"]


def tar_of(x_train, y_train, x_test, y_test):
    """The layout of cifar-10-binary.tar.gz."""
    step = len(x_train) // 5
    parts = [(x_train[i : i + step], y_train[i : i + step]) for i in range(0, 5 * step, step)]
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for name, (x, y) in zip(names, [*parts, (x_test, y_test)], strict=True):
            content = np.hstack([y[:, None], x.reshape(len(x), -1)]).tobytes()
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        archive.addfile(tarfile.TarInfo("cifar-10-batches-bin/readme.html"))
    return buffer.getvalue()


def small_cifar10():
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(6, 2, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(10, size=(6, 2), dtype=np.uint8)
    return pixels[:5].reshape(10, 3, 32, 32), labels[:5].reshape(10), pixels[5], labels[5]


def put_archive(cache, content, monkeypatch):
    (cache / "cifar10").mkdir(parents=True)
    (cache / "cifar10" / "cifar-10-binary.tar.gz").write_bytes(content)
    sums = {"cifar10/cifar-10-binary.tar.gz": hashlib.sha256(content).hexdigest()}
    monkeypatch.setattr(files, "SHA256", sums)


def test_cifar10_is_read_from_the_official_archive(cache, monkeypatch):
    arrays = small_cifar10()
    put_archive(cache, tar_of(*arrays), monkeypatch)
    hashes = {}
    for part, x, y in (("train", *arrays[:2]), ("test", *arrays[2:])):
        records = np.hstack([y[:, None], x.reshape(len(x), -1)])
        hashes[part] = hashlib.sha256(records.tobytes()).hexdigest()
    monkeypatch.setattr(files, "RECORDS_SHA256", hashes)
    split = data.load("cifar10", "full")
    np.testing.assert_array_equal(np.rint(split.x_train * 255), arrays[0])
    np.testing.assert_array_equal(split.y_test, arrays[3])
    assert sorted(p.name for p in cache.rglob("*.*")) == ["cifar-10-binary.tar.gz"]  # no extraction


def test_an_archive_with_other_records_is_refused(cache, monkeypatch):
    put_archive(cache, tar_of(*small_cifar10()), monkeypatch)
    expected = files.RECORDS_SHA256["train"]
    with pytest.raises(ValueError, match=f"CIFAR-10's train records with SHA-256 {expected}, got"):
        data.load("cifar10", "full")


# ---- refusals ----


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_a_missing_file_is_refused_with_the_ways_to_get_it(name, cache):
    with pytest.raises(FileNotFoundError) as error:
        data.load(name, "full")
    message = str(error.value)
    assert f"`python -m coursekit.data fetch {name}`" in message
    assert "COURSEKIT_DATA" in message
    assert str(cache) in message


def test_a_folder_without_the_file_is_named_too(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("COURSEKIT_DATA", str(tmp_path / "elsewhere"))
    both = re.escape(f"in {tmp_path / 'elsewhere'} or {cache}, got no such file")
    with pytest.raises(FileNotFoundError, match=both):
        data.load("mnist", "full")


def test_a_truncated_file_is_refused_with_both_hashes(cache):
    file = "mnist/train-images-idx3-ubyte.gz"
    content = idx(np.zeros((2, 28, 28), np.uint8))[:-9]
    (cache / "mnist").mkdir(parents=True)
    (cache / file).write_bytes(content)
    got = hashlib.sha256(content).hexdigest()
    with pytest.raises(ValueError, match=f"with SHA-256 {files.SHA256[file]}, got {got}$"):
        data.load("mnist", "full")


def test_a_damaged_shipped_file_is_refused_with_both_hashes(monkeypatch):
    sums = {name: "0" * 64 for name in files.SHIPPED_SHA256}
    monkeypatch.setattr(files, "SHIPPED_SHA256", sums)
    with pytest.raises(ValueError, match="expected mnist/train-images.* SHA-256 0{64}, got 8d1eae"):
        data.load("mnist")


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "imagenet"}, r"^load: expected name to be one of 'digits', .*, got 'imagenet'$"),
        ({"name": "mnist", "tier": "all"}, r"^load: expected tier .* 'full', got 'all'$"),
        ({"name": "cifar10"}, r"^load: expected tier 'full', .* of cifar10, got 'subset'$"),
        ({"name": "mnist", "seed": 1}, r"^load: expected no seed, as mnist has its own test set"),
        ({"name": "wine", "seed": -1}, r"^load: expected seed of at least 0, got -1$"),
    ],
)
def test_load_refuses_what_it_cannot_give(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load(**arguments)


# ---- IDX ----


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_an_idx_file_comes_back_as_it_was(shape, seed):
    array = np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)
    np.testing.assert_array_equal(files.decode_idx(idx(array), "x.gz"), array)


def damaged():
    whole = idx(np.arange(100, dtype=np.uint8).reshape(4, 25))
    raw = gzip.decompress(whole)
    yield whole[:-12], r"^load: expected x\.gz as intact gzip, got: .*end-of-stream"
    yield whole[:-1], r"^load: expected x\.gz as intact gzip, got: "
    yield b"no gzip", r"^load: expected x\.gz as intact gzip, got: Not a gzipped file"
    flipped = whole[:-8] + bytes([whole[-8] ^ 255]) + whole[-7:]
    yield flipped, r"^load: expected x\.gz as intact gzip, got: CRC check failed"
    yield whole[:10] + b"\7" + whole[11:], r"as intact gzip, got: .*invalid block type"
    short = r"^load: expected x\.gz with 100 values of shape \(4, 25\), got 99$"
    yield gzip.compress(raw[:-1], mtime=0), short
    yield gzip.compress(raw + b"\0", mtime=0), short.replace("99", "101")
    yield (
        gzip.compress(b"\0\0\x0d" + raw[3:], mtime=0),
        r"an IDX header, got bytes 00 00 0d 02 00 00 00 04$",
    )
    yield (
        gzip.compress(raw[:9], mtime=0),
        r"^load: expected x\.gz with an IDX header, got bytes 00 00 08",
    )
    yield gzip.compress(b"", mtime=0), r"^load: expected x\.gz with an IDX header, got bytes $"


@pytest.mark.parametrize(("content", "message"), list(damaged()))
def test_a_damaged_idx_file_is_refused_with_what_is_wrong(content, message):
    with pytest.raises(ValueError, match=message):
        files.decode_idx(content, "x.gz")


# ---- downloads ----


@contextlib.contextmanager
def served(respond):
    """A local server whose answer to a request is (status, promised length, parts sent)."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            status, length, parts = respond(self.path, len(requests))
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            for part in parts:
                self.wfile.write(part)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", requests
    finally:
        server.shutdown()
        server.server_close()


GOOD = {
    file: idx(np.full((3, 28, 28) if "images" in file else 3, i, np.uint8))
    for i, file in enumerate(
        f"{part}-{kind}-ubyte.gz"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    )
}


@pytest.fixture
def small_mnist(cache, monkeypatch):
    """Files of three images, with their hashes, stand for MNIST."""
    sums = {f"mnist/{file}": hashlib.sha256(body).hexdigest() for file, body in GOOD.items()}
    monkeypatch.setattr(files, "SHA256", sums)

    def use(*mirrors):
        monkeypatch.setitem(files.MIRRORS, "mnist", mirrors)

    return use


def good(path, _):
    body = GOOD[path.rsplit("/", 1)[1]]
    return 200, len(body), [body]


def cut(path, _):
    body = GOOD[path.rsplit("/", 1)[1]]
    return 200, len(body), [body[: len(body) // 2]]


def wrong(path, _):
    body = idx(np.zeros(7, np.uint8))
    return 200, len(body), [body]


def absent(path, _):
    return 404, 0, []


def stored(cache):
    """Whatever is in the cache, temporary files included."""
    return sorted(path.name for path in cache.rglob("*") if path.is_file())


def test_a_fetched_set_loads_and_is_not_fetched_again(cache, small_mnist):
    with served(good) as (mirror, requests):
        small_mnist(mirror)
        paths = files.fetch("mnist")
        assert [path.read_bytes() for path in paths] == [GOOD[path.name] for path in paths]
        assert data.load("mnist", "full").x_train.shape == (3, 1, 28, 28)
        files.fetch("mnist")
        assert len(requests) == 4


def test_an_interrupted_download_leaves_nothing_behind(cache, small_mnist):
    with served(cut) as (mirror, _):
        small_mnist(mirror)
        with pytest.raises(ConnectionError, match=r"^fetch: expected mnist/train-images.* got "):
            files.fetch("mnist")
    assert stored(cache) == []
    with pytest.raises(FileNotFoundError, match="fetch mnist"):
        data.load("mnist", "full")


def test_wrong_bytes_are_refused_with_both_hashes_and_leave_nothing_behind(cache, small_mnist):
    got = hashlib.sha256(wrong("", 0)[2][0]).hexdigest()
    with served(wrong) as (mirror, _):
        small_mnist(mirror)
        with pytest.raises(ValueError, match=got) as error:
            files.fetch("mnist")
    assert files.SHA256["mnist/train-images-idx3-ubyte.gz"] in str(error.value)
    assert stored(cache) == []


def test_a_download_that_failed_can_be_repeated(cache, small_mnist):
    """Cut midway, then wrong bytes, then right ones, at one address."""
    answers = [cut, wrong, good, good, good, good]
    with served(lambda path, i: answers[i - 1](path, i)) as (mirror, _):
        small_mnist(mirror)
        with pytest.raises(ConnectionError):
            files.fetch("mnist")
        with pytest.raises(ValueError, match="does not match the known hash"):
            files.fetch("mnist")
        assert stored(cache) == []
        files.fetch("mnist")
    assert stored(cache) == sorted(GOOD)


def test_a_failing_mirror_is_reported_and_the_next_one_asked(cache, small_mnist, capsys):
    with served(absent) as (first, _), served(wrong) as (second, _), served(good) as (third, _):
        small_mnist(first, second, third)
        files.fetch("mnist")
    told = capsys.readouterr().err
    assert f"fetch: {first}train-images-idx3-ubyte.gz failed: 404" in told
    assert f"fetch: {second}train-images-idx3-ubyte.gz failed: SHA256" in told
    assert data.load("mnist", "full").y_train.tolist() == [1, 1, 1]


def test_a_corrupted_file_in_the_cache_is_replaced(cache, small_mnist):
    path = cache / "mnist" / "t10k-labels-idx1-ubyte.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a fi")
    with served(good) as (mirror, _):
        small_mnist(mirror)
        files.fetch("mnist")
    assert path.read_bytes() == GOOD[path.name]


def test_a_download_killed_midway_leaves_no_file_under_its_final_name(cache, small_mnist):
    """Half of the bytes are on the disk when the process dies; it cannot clean up."""
    release = threading.Event()

    def halves():
        yield bytes(500_000)
        release.wait(60)

    script = (
        "from coursekit.data import files; import sys; "
        "files.MIRRORS['mnist'] = (sys.argv[1],); files.fetch('mnist')"
    )
    with served(lambda *_: (200, 1_000_000, halves())) as (mirror, _):
        child = subprocess.Popen(
            [sys.executable, "-c", script, mirror],
            env={**os.environ, "XDG_CACHE_HOME": str(cache.parent)},
        )
        deadline = time.monotonic() + 60
        while sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child.kill()
        child.wait()
        release.set()
    assert len(stored(cache)) == 1  # the temporary file
    assert not set(stored(cache)) & set(GOOD)
    with pytest.raises(FileNotFoundError, match="fetch mnist"):
        data.load("mnist", "full")


def test_fetch_refuses_a_set_that_needs_no_fetching():
    message = r"^fetch: expected name to be one of 'mnist', 'fashion_mnist', 'cifar10', got 'wine'$"
    with pytest.raises(ValueError, match=message):
        files.fetch("wine")


def test_every_mirror_path_has_a_hash():
    for folder in files.MIRRORS:
        assert any(name.startswith(f"{folder}/") for name in files.SHA256)
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in files.SHA256.values())


@pytest.mark.parametrize(("module", "act"), [("pooch", "fetch"), ("PIL.Image", "load")])
def test_a_missing_extra_is_named(module, act, cache, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    sheet = tmp_path / "cifar10" / "data_batch_1.webp"
    sheet.parent.mkdir()
    sheet.touch()
    monkeypatch.setenv("COURSEKIT_DATA", str(tmp_path))
    message = rf'^data: expected {module} to be installed.*pip install "coursekit\[data\]"$'
    with pytest.raises(ImportError, match=message):
        files.fetch("mnist") if act == "fetch" else data.load("cifar10", "full")


# ---- command line ----


def test_the_command_line_lists_every_set_with_its_licence(capsys):
    command_line.main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(data.SETS)
    assert "CC BY-SA 3.0" in next(line for line in lines if line.startswith("mnist"))


def test_the_command_line_prints_the_places(cache, tmp_path, monkeypatch, capsys):
    command_line.main(["path"])
    monkeypatch.setenv("COURSEKIT_DATA", str(tmp_path / "mine"))
    command_line.main(["path"])
    assert capsys.readouterr().out.split() == [str(cache), str(tmp_path / "mine"), str(cache)]


def test_the_command_line_fetches_and_tells_failures_in_one_line(small_mnist, capsys):
    with served(good) as (mirror, _):
        small_mnist(mirror)
        command_line.main(["fetch", "mnist"])
    assert [Path(line).name for line in capsys.readouterr().out.split()] == list(files._IDX)


def test_the_command_line_exits_with_the_message(small_mnist):
    with served(absent) as (mirror, _):
        small_mnist(mirror)
        with pytest.raises(SystemExit, match="^fetch: expected mnist/train-images.*got 404"):
            command_line.main(["fetch", "mnist"])


def test_the_module_runs_as_a_command():
    command = [sys.executable, "-m", "coursekit.data", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("digits ")


# ---- Split ----


def split_of(x_train, x_test, y_train, y_test, task="classification"):
    return data.Split(x_train, y_train, x_test, y_test, "toy", "full", task, ("a", "b"))


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 3), (2, 3), (5,), (2,)), r"^Split: expected y_train of shape \(4,\), got \(5,\)$"),
        (((4, 3), (2, 3), (4,), (3,)), r"^Split: expected y_test of shape \(2,\), got \(3,\)$"),
        (((4, 3), (2, 5), (4,), (2,)), r"^Split: expected x_test of shape \(n, 3\), got \(2, 5\)$"),
    ],
)
def test_a_split_refuses_arrays_that_do_not_match(shapes, message):
    with pytest.raises(ValueError, match=message):
        split_of(*(np.zeros(shape) for shape in shapes))


def test_tensors_follow_device_and_dtype(device, dtype):
    x, y, x_test, y_test = data.load("wine").tensors(device, dtype)
    assert {t.device.type for t in (x, y, x_test, y_test)} == {device.type}
    assert (x.dtype, x_test.dtype, y.dtype, y_test.dtype) == (
        dtype,
        dtype,
        torch.int64,
        torch.int64,
    )
    np.testing.assert_array_equal(y_test.cpu(), data.load("wine").y_test)
    np.testing.assert_allclose(x.cpu(), data.load("wine").x_train, rtol=1e-6)


def test_real_targets_come_as_a_column(dtype):
    split = data.load("diabetes")
    _, y, _, _ = split.tensors(dtype=dtype)
    assert y.dtype == dtype
    np.testing.assert_allclose(y[:, 0], split.y_train)
    assert (torch.zeros(353, 1) - y).shape == (353, 1)  # with (n,) it would be (n, n)


def test_tensors_are_copies():
    split = data.load("wine")
    split.tensors(dtype=torch.float64)[0].zero_()
    assert split.x_train.all(axis=0).any()


def test_standardizing_uses_the_training_rows_only():
    x_train = np.array([[0.0, 5.0], [2.0, 5.0]])  # means 1 and 5, deviations 1 and 0
    x_test = np.array([[3.0, 7.0]])
    split = split_of(x_train, x_test, np.array([0, 1]), np.array([0])).standardized()
    np.testing.assert_array_equal(split.x_train, [[-1, 0], [1, 0]])
    np.testing.assert_array_equal(split.x_test, [[2, 2]])
    together = np.vstack([x_train, x_test]).std(axis=0)  # the leaking variant gives other numbers
    assert not np.allclose((x_test - x_train.mean(axis=0)) / together, split.x_test)


@given(st.floats(0.1, 10), st.floats(-5, 5))
def test_standardizing_forgets_units(scale, shift):
    split = data.load("wine")
    other = split_of(split.x_train * scale + shift, split.x_test, split.y_train, split.y_test)
    np.testing.assert_allclose(
        other.standardized().x_train, split.standardized().x_train, atol=1e-9
    )


def test_a_constant_feature_that_rounds_badly_is_only_shifted():
    x_train = np.full((3, 1), 0.1)
    assert x_train.std(axis=0) > 0  # by rounding: dividing by it would blow the feature up
    split = split_of(x_train, np.array([[1.1]]), np.zeros(3), np.zeros(1)).standardized()
    np.testing.assert_allclose(split.x_test, [[1.0]])


def test_a_split_prints_on_one_line():
    assert repr(data.load("diabetes")) == (
        "Split(diabetes, full: train (353, 10), test (89, 10), regression)"
    )


# ---- toys ----


def test_two_moons_without_noise_are_scikit_learns():
    x, y = data.two_moons(101, rng=np.random.default_rng(0), noise=0.0)
    theirs, labels = datasets.make_moons(101, shuffle=False)
    ours = np.column_stack([x, y])
    expected = np.column_stack([theirs, labels])
    np.testing.assert_allclose(
        ours[np.lexsort(ours.round(9).T)], expected[np.lexsort(expected.round(9).T)], atol=1e-12
    )


def test_moons_are_noisy_by_as_much_as_was_asked():
    x, y = data.two_moons(4_000, rng=np.random.default_rng(0), noise=0.05)
    radius = np.hypot(*(x[y == 0]).T)
    assert abs(radius.std() - 0.05) < 0.004


def test_blobs_lie_around_their_centers():
    centers = np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    x, y = data.gaussian_blobs(6_000, centers, rng=np.random.default_rng(0), std=0.5)
    assert np.abs(np.bincount(y) / 6_000 - 1 / 3).max() < 0.02
    np.testing.assert_allclose((x - centers[y]).std(axis=0), 0.5, rtol=0.03)
    nearest = ((x[:, None] - centers) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == y).mean() > 0.999


@pytest.mark.usefixtures("unchecked_shapes")
def test_blobs_refuse_centers_that_are_no_table():
    message = r"^gaussian_blobs: expected centers of shape \(classes, d\), got \(3,\)$"
    with pytest.raises(ValueError, match=message):
        data.gaussian_blobs(5, np.zeros(3), rng=np.random.default_rng(0))


def test_thirty_points_of_a_noisy_sine():
    x, y = data.noisy_sine(rng=np.random.default_rng(0), noise=0.3)
    assert x.shape == (30, 1)
    assert y.shape == (30,)
    assert (np.diff(x[:, 0]) >= 0).all()
    assert x.min() >= 0
    assert x.max() <= 2 * np.pi
    x, y = data.noisy_sine(5_000, rng=np.random.default_rng(0), noise=0.3)
    assert abs((y - np.sin(x[:, 0])).std() - 0.3) < 0.01


TOYS = {
    "two_moons": lambda rng: data.two_moons(20, rng=rng),
    "gaussian_blobs": lambda rng: data.gaussian_blobs(20, np.eye(3), rng=rng),
    "noisy_sine": lambda rng: data.noisy_sine(rng=rng),
}


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_a_toy_depends_on_its_generator_and_nothing_else(toy):
    first, again, other = (toy(np.random.default_rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])
