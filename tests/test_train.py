"""Random streams, mini-batches, evaluation and the training loop."""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from coursekit import data, models, train

DIGITS = data.load("digits")
WINE = data.load("wine").standardized()


def global_states():
    """The random states that no function of the package may move."""
    numpy_state = np.random.get_state()  # noqa: NPY002
    states = [random.getstate(), numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]]
    return [*states, torch.get_rng_state().tolist()]


# ---- streams ----


def first_numbers(seed, stream):
    return torch.rand(4, generator=train.generator(seed, stream)).tolist()


@given(st.integers(-(10**30), 10**30), st.text(max_size=8))
def test_a_stream_is_what_its_seed_and_name_say(seed, stream):
    assert first_numbers(seed, stream) == first_numbers(seed, stream)
    assert first_numbers(seed, stream) != first_numbers(seed + 1, stream)
    assert first_numbers(seed, stream) != first_numbers(seed, stream + "!")
    assert (train.rng(seed, stream).random(4) == train.rng(seed, stream).random(4)).all()
    assert (train.rng(seed, stream).random(4) != train.rng(seed, stream + "!").random(4)).all()


def test_seed_and_name_do_not_run_into_each_other():
    """Hashing them without a separator would make one stream of these two."""
    assert first_numbers(1, "1/x") != first_numbers(11, "/x")
    assert first_numbers(1, "2") != first_numbers(12, "")


def test_streams_do_not_collide():
    seeds = {train.generator(s, n).initial_seed() for s in range(100) for n in ("a", "b", "c")}
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == 300  # torch keeps the lower half


def test_streams_are_pinned_for_all_time():
    """A record of a study names seed and stream; both must mean the same numbers next year."""
    assert train.generator(0, "data").initial_seed() == 11614811347330167572
    assert train.rng(0, "data").integers(1_000, size=3).tolist() == [192, 526, 355]


def test_two_streams_of_a_seed_are_uncorrelated():
    a, b = (torch.randn(20_000, generator=train.generator(0, s)) for s in ("init", "data"))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.03  # four standard deviations


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("function", [train.generator, train.rng])
def test_a_stream_needs_an_integer_and_a_name(function):
    name = function.__name__
    with pytest.raises(TypeError, match=rf"^{name}: expected seed as an integer, got 0.5$"):
        function(0.5, "data")
    with pytest.raises(TypeError, match=rf"^{name}: expected stream as a string, got 3$"):
        function(0, 3)


def test_the_default_device_is_the_gpu_where_there_is_one(monkeypatch):
    for available, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda a=available: a)
        assert train.default_device().type == kind


# ---- batches ----

sizes = st.tuples(st.integers(1, 40), st.integers(1, 50))


@given(sizes, st.booleans())
def test_every_row_comes_once_with_its_target(n_and_size, shuffle):
    n, size = n_and_size
    x = torch.arange(n)
    g = train.generator(n, "data")
    got = list(train.batches(x, x + 100, size, generator=g, shuffle=shuffle))
    assert sorted(torch.cat([a for a, _ in got]).tolist()) == list(range(n))
    assert all(torch.equal(b, a + 100) for a, b in got)
    assert [len(a) for a, _ in got] == [size] * (n // size) + [n % size] * (n % size > 0)


@given(sizes)
def test_drop_last_leaves_out_only_what_is_too_small(n_and_size):
    n, size = n_and_size
    x = torch.arange(n)
    options = {"drop_last": True, "shuffle": False}
    if n < size:
        message = f"^batches: expected at least one batch of {size}, got {n} examples$"
        with pytest.raises(ValueError, match=message):
            train.batches(x, x, size, **options)
    else:
        kept = torch.cat([a for a, _ in train.batches(x, x, size, **options)])
        assert kept.tolist() == list(range(n - n % size))


def test_an_epoch_follows_one_permutation(device):
    """Parity with indexing by torch.randperm; the device of the arrays does not matter."""
    x = torch.randn(23, 3, generator=train.generator(0, "x")).to(device)
    y = torch.arange(23, device=device)
    order = torch.randperm(23, generator=train.generator(5, "data")).to(device)
    got = list(train.batches(x, y, 4, generator=train.generator(5, "data")))
    assert torch.equal(torch.cat([a for a, _ in got]), x[order])
    assert torch.equal(torch.cat([b for _, b in got]), order)


def test_the_next_epoch_has_another_order():
    g, x = train.generator(0, "data"), torch.arange(50)
    first, second = (next(train.batches(x, x, 50, generator=g))[0] for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first, x)


def test_drawing_from_another_stream_between_batches_changes_nothing():
    x = torch.arange(12)
    quiet = [a.tolist() for a, _ in train.batches(x, x, 4, generator=train.generator(0, "data"))]
    noisy, dropout = [], train.generator(0, "dropout")
    for a, _ in train.batches(x, x, 4, generator=train.generator(0, "data")):
        torch.rand(5, generator=dropout)
        noisy.append(a.tolist())
    assert quiet == noisy


def test_batches_in_order_are_views():
    x = torch.zeros(6, 2)
    for a, _ in train.batches(x, x, 4, shuffle=False):
        a += 1
    assert (x == 1).all()


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("y", "size", "shuffle", "error", "message"),
    [
        (9, 2, False, ValueError, r"^batches: expected y of shape \(10, \.\.\.\), got \(9,\)$"),
        (10, 0, False, ValueError, r"^batches: expected size of at least 1, got 0$"),
        (10, 2.0, False, TypeError, r"^batches: expected size as an integer, got 2\.0$"),
        (10, 2, True, TypeError, r"^batches: expected a generator to shuffle with, got None$"),
    ],
)
def test_batches_refuse_at_the_call_not_at_the_first_batch(y, size, shuffle, error, message):
    with pytest.raises(error, match=message):
        train.batches(torch.zeros(10, 3), torch.zeros(y), size, shuffle=shuffle)


def test_no_examples_make_no_batch():
    with pytest.raises(ValueError, match=r"^batches: expected at least one batch of 2, got 0"):
        train.batches(torch.zeros(0, 3), torch.zeros(0), 2, shuffle=False)


# ---- evaluate ----


def test_a_score_by_hand():
    """Losses log(1 + e⁻²), log 2, log(1 + e⁻¹); the tie goes to class 0, so row 2 is wrong."""
    outputs = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    score = train.evaluate(nn.Identity(), outputs, torch.tensor([0, 1, 1]))
    expected = (np.log1p(np.exp(-2)) + np.log(2) + np.log1p(np.exp(-1))) / 3
    assert score.loss == pytest.approx(expected, rel=1e-6)
    assert score.accuracy == pytest.approx(2 / 3)


@given(st.integers(1, 200))
def test_a_score_does_not_depend_on_the_batch_size(batch_size):
    net = models.mlp([13, 3], generator=train.generator(0, "init")).double()
    x, y, _, _ = WINE.tensors(dtype=torch.float64)
    whole = cross_entropy(net(x), y).item()
    score = train.evaluate(net, x, y, batch_size=batch_size)
    assert score.loss == pytest.approx(whole, rel=1e-12)
    assert score.accuracy == (net(x).argmax(1) == y).double().mean().item()


def test_the_mean_of_batch_means_would_be_wrong():
    x, y = torch.tensor([[0.0], [0.0], [9.0]]), torch.zeros(3, 1)
    score = train.evaluate(nn.Identity(), x, y, loss=mse_loss, batch_size=2)
    assert score.loss == 27  # the mean of batch means is 40.5
    assert score.accuracy is None  # real targets


def test_evaluation_leaves_modes_statistics_and_gradients_alone():
    net = nn.Sequential(nn.BatchNorm1d(13), nn.Dropout(0.5), nn.Linear(13, 3))
    net.train()
    net[0].eval()  # frozen on purpose
    x, y, _, _ = WINE.tensors()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first, second = (train.evaluate(net, x, y) for _ in range(2))
    assert first == second  # no dropout
    assert [m.training for m in net] == [False, True, True]
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_modes_are_restored_when_the_model_fails():
    net = nn.Sequential(nn.Linear(5, 2))
    with pytest.raises(RuntimeError, match="shape"):
        train.evaluate(net, torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))
    assert net[0].training
    assert torch.is_grad_enabled()


@pytest.mark.usefixtures("unchecked_shapes")
def test_evaluate_refuses_targets_of_another_length():
    with pytest.raises(ValueError, match=r"expected y of shape \(3, \.\.\.\), got \(2,\)"):
        train.evaluate(nn.Identity(), torch.zeros(3, 4), torch.zeros(2))


# ---- fit ----


def fitted(split=WINE, epochs=2, batch_size=32, lr=0.1, device="cpu", seed=0, **options):
    """Train a small perceptron; returns model and history."""
    sizes = [split.x_train.shape[1], 16, len(split.target_names)]
    net = models.mlp(sizes, generator=train.generator(seed, "init"))
    sgd = torch.optim.SGD(net.parameters(), lr=lr)
    options.setdefault("generator", train.generator(seed, "data"))
    return net, train.fit(net, split, sgd, epochs, batch_size, device=device, **options)


def test_fit_is_the_loop_one_would_write():
    """Parity with six lines of plain torch, to the last bit."""
    net, history = fitted(epochs=3)
    own = models.mlp([13, 16, 3], generator=train.generator(0, "init"))
    sgd, g, losses = torch.optim.SGD(own.parameters(), lr=0.1), train.generator(0, "data"), []
    x, y, x_test, y_test = WINE.tensors()
    for _ in range(3):
        for rows in torch.randperm(len(x), generator=g).split(32):
            sgd.zero_grad()
            loss = cross_entropy(own(x[rows]), y[rows])
            loss.backward()
            sgd.step()
            losses.append(loss.item())
    assert history.step_loss == losses
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), own.parameters(), strict=True))
    assert history.test[-1] == train.evaluate(own, x_test, y_test)
    assert history.train[-1] == train.evaluate(own, x, y)


def test_one_step_of_linear_regression_by_hand():
    """w = 0, x = (1, 2), y = (3, 6): the loss is 22.5, its gradient -15, so w becomes 1.5."""
    x, y = np.array([[1.0], [2.0]]), np.array([3.0, 6.0])
    split = data.Split(x, y, x, y, "line", "full", "regression")
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(net.weight)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    g = train.generator(0, "data")
    history = train.fit(net, split, sgd, 1, 2, generator=g, device="cpu", loss=mse_loss)
    assert history.step_loss == [22.5]
    assert net.weight.item() == pytest.approx(1.5)
    assert history.test[0].loss == pytest.approx(((3 - 1.5) ** 2 + (6 - 3) ** 2) / 2)
    assert history.test[0].accuracy is None


def test_digits_are_learned(device):
    _, history = fitted(DIGITS, epochs=20, lr=0.5, device=device)
    assert history.test[-1].accuracy > 0.94
    assert len(history.train) == len(history.test) == 20
    assert len(history.step_loss) == 20 * 45  # 1,437 rows in batches of 32


def test_the_same_generators_give_the_same_history():
    same, again, other = (fitted(seed=seed)[1].to_dict() for seed in (0, 0, 1))
    assert same == again
    assert same["step_loss"] != other["step_loss"]


def test_a_history_survives_json():
    record = fitted()[1].to_dict()
    assert json.loads(json.dumps(record)) == record
    assert set(record) == {"step_loss", "train", "test"}
    assert set(record["test"][0]) == {"loss", "accuracy"}


def test_the_scheduler_counts_steps():
    net = models.mlp([13, 3], generator=train.generator(0, "init"))
    sgd = torch.optim.SGD(net.parameters(), lr=1.0)
    halve = torch.optim.lr_scheduler.StepLR(sgd, step_size=5, gamma=0.5)
    g = train.generator(0, "data")
    train.fit(net, WINE, sgd, 2, 32, generator=g, device="cpu", scheduler=halve)
    assert sgd.param_groups[0]["lr"] == 0.25  # ten steps; two epochs would not be enough for one


def test_after_step_is_called_after_every_step():
    sums = []

    def clamp(model):
        for p in model.parameters():
            p.data.clamp_(-0.01, 0.01)
        sums.append(1)

    net, history = fitted(after_step=clamp)
    assert len(sums) == len(history.step_loss) == 10
    assert max(p.abs().max().item() for p in net.parameters()) == pytest.approx(0.01)


def test_a_callback_can_end_the_training_and_all_are_called():
    seen = []
    stop = lambda model, history: len(history.test) == 2
    _, history = fitted(epochs=9, callbacks=[stop, lambda *_: seen.append(1)])
    assert len(history.train) == len(history.test) == len(seen) == 2


def test_training_restores_every_modules_mode():
    net = nn.Sequential(nn.BatchNorm1d(13), nn.Dropout(0.5), nn.Linear(13, 3)).eval()
    modes = []
    net[2].register_forward_pre_hook(
        lambda module, _: modes.append((module.training, torch.is_grad_enabled()))
    )
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    train.fit(net, WINE, sgd, 1, 142, generator=train.generator(0, "data"), device="cpu")
    assert modes == [(True, True), (False, False), (False, False)]  # a step, two evaluations
    assert not any(module.training for module in net.modules())
    assert net[0].num_batches_tracked == 1  # the evaluations did not count


def test_a_loss_that_is_not_finite_stops_before_the_step():
    calls = []

    def loss(output, target):
        calls.append(1)
        return cross_entropy(output, target) * (float("nan") if len(calls) == 8 else 1)

    net = models.mlp([13, 3], generator=train.generator(0, "init"))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    weights = []
    keep = lambda model: weights.append([p.detach().clone() for p in model.parameters()])
    message = r"^fit: expected a finite loss, got nan in epoch 1, step 5; try a smaller learning"
    options = {"generator": train.generator(0, "data"), "device": "cpu", "after_step": keep}
    with pytest.raises(RuntimeError, match=message):  # 5 steps, 2 evaluations, then this one
        train.fit(net, WINE, sgd, 3, 32, loss=loss, **options)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), weights[-1], strict=True))
    assert len(weights) == 5


def test_an_infinite_loss_is_refused_too():
    with pytest.raises(RuntimeError, match="expected a finite loss, got inf in epoch 0, step 0"):
        fitted(loss=lambda output, target: cross_entropy(output, target) + float("inf"))


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("epochs", "batch_size"), [(0, 8), (1, 0)])
def test_fit_refuses_to_do_nothing(epochs, batch_size):
    with pytest.raises(ValueError, match=r"expected (epochs|size) of at least 1, got 0"):
        fitted(epochs=epochs, batch_size=batch_size)


def test_fit_follows_the_models_precision(dtype):
    net = models.mlp([13, 3], generator=train.generator(0, "init")).to(dtype)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    train.fit(net, WINE, sgd, 1, 32, generator=train.generator(0, "data"), device="cpu")
    assert net[0].weight.dtype == dtype


# ---- nothing global moves ----

STOCHASTIC = {
    "generator": lambda g, r: torch.rand(3, generator=train.generator(0, "data")),
    "rng": lambda g, r: train.rng(0, "data").random(3),
    "batches": lambda g, r: list(train.batches(torch.zeros(9), torch.zeros(9), 2, generator=g)),
    "fit": lambda g, r: fitted(generator=g),
    "mlp": lambda g, r: models.mlp([3, 2], generator=g),
    "small_cnn": lambda g, r: models.small_cnn((1, 4, 4), generator=g),
    "resnet_cifar": lambda g, r: models.resnet_cifar(8, width=2, generator=g),
    "plain_cifar": lambda g, r: models.plain_cifar(8, width=2, generator=g),
    "load": lambda g, r: data.load("wine", seed=3),
    "two_moons": lambda g, r: data.two_moons(9, rng=r),
    "gaussian_blobs": lambda g, r: data.gaussian_blobs(9, np.eye(2), rng=r),
    "noisy_sine": lambda g, r: data.noisy_sine(rng=r),
}


@pytest.mark.usefixtures("unchecked_shapes")  # beartype looks at random items of a list
@pytest.mark.parametrize("call", STOCHASTIC.values(), ids=STOCHASTIC)
def test_no_function_moves_a_global_random_state(call):
    before = global_states()
    call(train.generator(0, "test"), train.rng(0, "test"))
    assert global_states() == before


def test_the_test_above_would_see_a_global_draw():
    for draw in (random.random, np.random.rand, lambda: torch.rand(1)):
        before = global_states()
        draw()
        assert global_states() != before
