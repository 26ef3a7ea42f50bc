"""Ensembles: samples, votes and averages, the law of their error, all members trained at once."""

import copy
import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from sklearn.ensemble import BaggingClassifier
from sklearn.tree import DecisionTreeClassifier
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from coursekit import bagging, data, models, train
from coursekit.experiment import Record

RECORD = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "bagging.json"
CONTESTANTS = ("ensemble", "loop", "sklearn")


def stream(seed=0, name="bagging"):
    return train.generator(seed, name)


def nets(members, sizes=(4, 6, 3), dtype=torch.float64, **options):
    """Perceptrons that start differently."""
    draw = [train.generator(k, "init") for k in range(members)]
    return [models.mlp(sizes, generator=g, **options).to(dtype) for g in draw]


def toy(n=40, dtype=torch.float64):
    """Inputs (n, 4) and labels (n,) of three classes."""
    x = torch.randn(n, 4, generator=stream(0, "x"), dtype=dtype)
    return x, torch.randint(3, (n,), generator=stream(0, "y"))


def bagged_trees(split, members, seed, **options):
    """Probabilities (members, test, classes) that trees on bootstrap samples give."""
    rows = bagging.bootstrap_indices(len(split.x_train), members, generator=stream(seed))
    trees = [DecisionTreeClassifier(random_state=seed, **options) for _ in rows]
    for tree, mine in zip(trees, rows.numpy(), strict=True):
        tree.fit(split.x_train[mine], split.y_train[mine])
    return torch.stack([torch.from_numpy(tree.predict_proba(split.x_test)) for tree in trees])


# ---- samples with replacement ----


def test_a_bootstrap_sample_is_uniform_and_independent_of_the_others():
    rows = bagging.bootstrap_indices(6, 300, size=40, generator=stream())
    assert rows.shape == (300, 40)
    assert stats.chisquare(np.bincount(rows.flatten(), minlength=6)).pvalue > 1e-3
    pairs = np.bincount(rows[::2, 0] * 6 + rows[1::2, 0], minlength=36)
    assert stats.chisquare(pairs).pvalue > 1e-3


@pytest.mark.covers("B4")
@pytest.mark.parametrize("n", [2, 10, 100])
def test_the_share_of_rows_in_a_sample_is_the_one_derived(n):
    missed = bagging.out_of_bag(bagging.bootstrap_indices(n, 20_000, generator=stream(n)), n)
    share = 1 - missed.double().mean(dim=1)
    error = share.std().item() / math.sqrt(20_000)
    assert share.mean().item() == pytest.approx(1 - (1 - 1 / n) ** n, abs=4 * error + 1e-9)


def test_over_all_samples_of_four_rows_the_share_is_exact():
    every = torch.tensor(list(itertools.product(range(4), repeat=4)))
    share = 1 - bagging.out_of_bag(every, 4).double().mean().item()
    assert share == pytest.approx(1 - (3 / 4) ** 4, abs=1e-12)


def test_samples_depend_on_the_generator_alone():
    before = torch.get_rng_state()
    first = bagging.bootstrap_indices(50, 3, generator=stream(1))
    assert torch.equal(first, bagging.bootstrap_indices(50, 3, generator=stream(1)))
    assert not torch.equal(first, bagging.bootstrap_indices(50, 3, generator=stream(2)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("bad", [{"n": 0}, {"members": 0}, {"size": 0}, {"members": -1}])
def test_an_empty_bootstrap_is_refused(bad):
    given_ = {"n": 5, "members": 2} | bad
    (name, value) = next(iter(bad.items()))
    message = rf"^bootstrap_indices: expected {name} of at least 1, got {value}$"
    with pytest.raises(ValueError, match=message):
        bagging.bootstrap_indices(**given_, generator=stream())


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 12), st.integers(0, 999))
@settings(max_examples=40)
def test_out_of_bag_is_the_complement_of_each_sample(members, size, n, seed):
    rows = bagging.bootstrap_indices(n, members, size=size, generator=stream(seed))
    got = bagging.out_of_bag(rows, n)
    for sample, missed in zip(rows.tolist(), got.tolist(), strict=True):
        assert missed == [i not in sample for i in range(n)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(2, 0, dtype=torch.int64), r"expected samples that hold rows, got \(2, 0\)"),
        (torch.tensor([[0, 4]]), "expected indices from 0 to 3, got 0 to 4"),
        (torch.tensor([[-1, 2]]), "expected indices from 0 to 3, got -1 to 2"),
    ],
)
def test_samples_that_are_none_are_refused(rows, message):
    with pytest.raises(ValueError, match=f"^out_of_bag: {message}$"):
        bagging.out_of_bag(rows, 4)


# ---- one answer from many ----


votes = st.tuples(st.integers(1, 7), st.integers(1, 6), st.integers(1, 4)).flatmap(
    lambda s: st.tuples(
        hnp.arrays(np.int64, s[:2], elements=st.integers(0, s[2] - 1)), st.just(s[2])
    )
)


def by_counting(column):
    """The most frequent label, the lowest of several, by the definition."""
    counts = Counter(column)
    return min(label for label in counts if counts[label] == max(counts.values()))


@pytest.mark.covers("B2")
@given(votes)
def test_majority_vote_is_the_brute_force_count_with_ties_to_the_lowest(case):
    labels, classes = case
    got = bagging.majority_vote(torch.from_numpy(labels), classes)
    assert got.tolist() == [by_counting(column) for column in labels.T.tolist()]
    assert got.tolist() == stats.mode(labels, axis=0).mode.tolist()


@pytest.mark.parametrize("integers", [torch.int32, torch.int64, torch.uint8])
def test_ties_go_to_the_lowest_label_on_every_device(device, integers):
    labels = torch.tensor([[3, 2, 0], [1, 2, 1], [1, 0, 2], [3, 0, 3]], dtype=integers)
    got = bagging.majority_vote(labels.to(device), 4)
    assert got.tolist() == [1, 0, 0]
    assert got.tolist() != (3 - bagging.majority_vote(3 - labels.long(), 4)).tolist()  # highest


@given(votes, st.randoms(use_true_random=False))
def test_the_order_of_the_members_does_not_matter(case, shuffler):
    labels, classes = case
    order = shuffler.sample(range(len(labels)), len(labels))
    labels = torch.from_numpy(labels)
    one, other = (bagging.majority_vote(t, classes) for t in (labels, labels[order]))
    assert torch.equal(one, other)


@given(votes, st.integers(0, 999))
def test_who_does_not_vote_is_as_if_it_were_not_there(case, seed):
    labels, classes = case
    where = np.random.default_rng(seed).random(labels.shape) < 0.5
    where[0] = True
    got = bagging.majority_vote(torch.from_numpy(labels), classes, where=torch.from_numpy(where))
    columns = zip(labels.T, where.T, strict=True)
    assert got.tolist() == [by_counting(column[who].tolist()) for column, who in columns]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0, 3]], "expected labels from 0 to 2, got 0 to 3"),
        ([[-1, 2]], "expected labels from 0 to 2, got -1 to 2"),
        ([[], []], r"expected at least one member and example, got \(2, 0\)"),
    ],
)
def test_labels_out_of_range_are_refused(labels, message):
    with pytest.raises(ValueError, match=f"^majority_vote: {message}$"):
        bagging.majority_vote(torch.tensor(labels, dtype=torch.int64), 3)


def test_an_ensemble_of_nobody_is_refused():
    with pytest.raises(
        ValueError, match=r"^majority_vote: .* one member and example, got \(0, 4\)"
    ):
        bagging.majority_vote(torch.zeros(0, 4, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match=r"^average_probabilities: .*, got \(0, 4, 3\)$"):
        bagging.average_probabilities(torch.zeros(0, 4, 3))


def test_an_example_on_which_nobody_votes_is_refused():
    where = torch.tensor([[True, False, False]])
    message = "expected where to name a member for each of 3 examples, got none for 2$"
    with pytest.raises(ValueError, match=f"^majority_vote: {message}"):
        bagging.majority_vote(torch.zeros(1, 3, dtype=torch.int64), 3, where=where)
    with pytest.raises(ValueError, match=f"^average_probabilities: {message}"):
        bagging.average_probabilities(torch.ones(1, 3, 1), where=where)


def test_a_mask_of_another_shape_is_refused(unchecked_shapes):
    message = r"^majority_vote: expected where of shape \(2, 3\), got \(2,\)$"
    labels, who = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        bagging.majority_vote(labels, 3, where=who)


def test_average_is_the_mean_over_those_who_are_asked(device, dtype):
    p = torch.rand(5, 7, 3, generator=stream(), dtype=dtype).to(device).softmax(dim=-1)
    where = (torch.rand(5, 7, generator=stream(1)) < 0.4).to(device)
    where[2] = True
    torch.testing.assert_close(bagging.average_probabilities(p), p.mean(dim=0))
    got = bagging.average_probabilities(p, where=where)
    for i in range(7):
        torch.testing.assert_close(got[i], p[where[:, i], i].mean(dim=0))
    assert (got.dtype, got.device) == (p.dtype, p.device)


@given(st.integers(1, 6), st.integers(2, 4), st.integers(0, 999))
def test_an_average_is_never_worse_than_its_members_are_on_average(members, classes, seed):
    p = torch.randn(members, 8, classes, generator=stream(seed)).double().softmax(dim=-1)
    y = one_hot(torch.randint(classes, (8,), generator=stream(seed, "y")), classes)
    together = bagging.average_probabilities(p)
    assert ((together - y) ** 2).mean() <= ((p - y) ** 2).mean() + 1e-12
    chosen = y.bool()
    assert -together[chosen].log().mean() <= -p[:, chosen].log().mean() + 1e-12


@pytest.mark.parametrize("bad", [[[[2.0, -1.0]]], [[[0.4, 0.4]]], [[[math.nan, 1.0]]]])
def test_logits_are_no_probabilities(bad):
    with pytest.raises(ValueError, match="^average_probabilities: expected probabilities, not neg"):
        bagging.average_probabilities(torch.tensor(bad))


# ---- against scikit-learn ----


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.mark.covers("B4")
def test_average_and_out_of_bag_estimate_are_those_of_scikit_learn_to_rounding(digits):
    split, tree = digits, DecisionTreeClassifier(max_depth=5)
    theirs = BaggingClassifier(tree, n_estimators=25, oob_score=True, random_state=0)
    theirs.fit(split.x_train, split.y_train)
    rows = torch.from_numpy(np.stack(theirs.estimators_samples_))

    def probabilities(x):
        return torch.from_numpy(np.stack([t.predict_proba(x) for t in theirs.estimators_]))

    ours = bagging.average_probabilities(probabilities(split.x_test))
    np.testing.assert_allclose(ours, theirs.predict_proba(split.x_test), atol=1e-12)
    missed = bagging.out_of_bag(rows, len(split.x_train))
    unseen = bagging.average_probabilities(probabilities(split.x_train), where=missed)
    np.testing.assert_allclose(unseen, theirs.oob_decision_function_, atol=1e-12)
    accuracy = (unseen.argmax(dim=1).numpy() == split.y_train).mean()
    assert accuracy == pytest.approx(theirs.oob_score_, abs=1e-12)


@pytest.mark.covers("B2")
def test_bagged_trees_are_as_good_as_scikit_learn_within_one_standard_error(digits):
    gaps = []
    for seed in range(8):
        p = bagged_trees(digits, 20, seed)
        ours = bagging.majority_vote(p.argmax(dim=2), 10).numpy()
        theirs = BaggingClassifier(DecisionTreeClassifier(), n_estimators=20, random_state=seed)
        theirs = theirs.fit(digits.x_train, digits.y_train).predict(digits.x_test)
        gaps.append(np.mean(ours == digits.y_test) - np.mean(theirs == digits.y_test))
    assert abs(np.mean(gaps)) <= stats.sem(gaps)
    assert stats.sem(gaps) < 0.005  # the test is sharp enough to notice half a per cent


# ---- what an average gets wrong ----


def pairwise(errors):
    """v and c by the definition, a pair at a time."""
    k = len(errors)
    own = [(e**2).reshape(len(e), -1).sum(1).mean().item() for e in errors]
    pairs = [
        (errors[i] * errors[j]).reshape(errors.shape[1], -1).sum(1).mean().item()
        for i, j in itertools.permutations(range(k), 2)
    ]
    return np.mean(own), np.mean(pairs)


@pytest.mark.parametrize("shape", [(2, 3), (4, 5), (3, 6, 2), (5, 1, 4)])
def test_v_and_c_are_means_over_members_and_over_pairs(device, dtype, shape):
    errors = torch.randn(shape, generator=stream(), dtype=dtype).to(device) + 0.5
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert bagging.error_covariance(errors) == pytest.approx(pairwise(errors), rel=tolerance)


@pytest.mark.covers("B3")
@given(st.integers(2, 8), st.integers(1, 6), st.integers(0, 999))
def test_for_the_members_that_were_measured_the_law_is_an_identity(members, n, seed):
    errors = torch.randn(members, n, 3, generator=stream(seed)).double()
    v, c = bagging.error_covariance(errors)
    average = errors.mean(dim=0).square().sum(dim=1).mean().item()
    assert bagging.expected_ensemble_error(v, c, members) == pytest.approx(average, rel=1e-9)
    assert abs(c) <= v + 1e-12
    with_itself = errors.mean(dim=0).square().sum(dim=1).mean().item()  # j = k left in the mean
    assert bagging.expected_ensemble_error(v, min(with_itself, v), members) > average


@pytest.mark.covers("B1")
@pytest.mark.parametrize("shrink", [1.0, 0.6])
def test_with_samples_of_their_own_c_is_the_squared_bias_and_v_less_c_the_variance(shrink):
    mean, sd, rows, members = 2.0, 3.0, 5, 20_000  # a shrunken mean of five draws
    draws = mean + sd * torch.randn(members, rows, generator=stream(), dtype=torch.float64)
    v, c = bagging.error_covariance(shrink * draws.mean(dim=1, keepdim=True) - mean)
    squared_bias, variance = (1 - shrink) ** 2 * mean**2, shrink**2 * sd**2 / rows
    assert c == pytest.approx(squared_bias, abs=0.05)
    assert v - c == pytest.approx(variance, rel=0.03)


def test_independent_errors_fall_by_the_number_of_members():
    errors = torch.randn(8, 200_000, generator=stream())
    v, c = bagging.error_covariance(errors)
    assert c == pytest.approx(0, abs=3e-3)
    assert bagging.expected_ensemble_error(v, 0.0, 8) == v / 8
    assert errors.mean(dim=0).square().mean().item() == pytest.approx(v / 8, rel=0.02)


@pytest.mark.parametrize(("v", "c"), [(1.0, 0.25), (3.0, 3.0), (2.0, -0.5)])
def test_the_law_starts_at_v_and_ends_at_c(v, c):
    law = [bagging.expected_ensemble_error(v, c, k) for k in (1, 2, 3, 10**9)]
    assert law[0] == v
    assert law == sorted(law, reverse=True)
    assert law[1] == pytest.approx((v + c) / 2)
    assert law[-1] == pytest.approx(c, abs=1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 0.5, 0), "expected members of at least 1, got 0"),
        ((1.0, 1.5, 2), r"expected \|c\| <= v, got v = 1.0, c = 1.5"),
        ((math.nan, 0.0, 2), r"expected \|c\| <= v, got v = nan, c = 0.0"),
    ],
)
def test_errors_that_nothing_has_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^expected_ensemble_error: {message}$"):
        bagging.expected_ensemble_error(*arguments)


@pytest.mark.parametrize("shape", [(1, 5), (0, 5), (3, 0)])
def test_one_member_has_no_covariance(shape):
    message = r"^error_covariance: expected two members or more, and examples, got \("
    with pytest.raises(ValueError, match=message):
        bagging.error_covariance(torch.zeros(shape))


def group_error(errors, size):
    """Mean squared error of the averages of disjoint groups of members."""
    groups = [g.mean(dim=0) for g in errors.split(size) if len(g) == size]
    return torch.stack(groups).square().flatten(2).sum(dim=2).mean().item()


def errors_of_trees():
    split = data.load("digits")
    p = torch.stack([bagged_trees(split, 64, seed) for seed in range(2)])
    return p - one_hot(torch.from_numpy(split.y_test), 10)


def errors_of_nets():
    x, y, x_test, y_test = data.load("breast_cancer").standardized().tensors()
    runs = []
    for seed in range(2):
        draw = stream(seed)
        starts = [models.mlp([30, 8, 2], generator=draw) for _ in range(64)]
        ensemble = bagging.Ensemble(starts)
        rows = bagging.bootstrap_indices(len(x), 64, generator=draw)
        adam = torch.optim.Adam(ensemble.parameters(), lr=0.02)
        bagging.fit_members(ensemble, x, y, adam, 15, 32, rows=rows, generator=draw)
        with torch.no_grad():
            runs.append(ensemble(x_test).softmax(dim=-1) - one_hot(y_test, 2))
    return torch.stack(runs)


@pytest.mark.covers("B3")
@pytest.mark.parametrize("measure", [errors_of_trees, errors_of_nets])
def test_the_law_predicts_ensembles_of_other_members(measure):
    ratios = []
    for errors in measure():
        v, c = bagging.error_covariance(errors[:32])
        for k in (1, 2, 4, 8, 16, 32):
            predicted = bagging.expected_ensemble_error(v, c, k)
            ratios.append(group_error(errors[32:], k) / predicted)
    assert ratios == pytest.approx([1.0] * len(ratios), abs=0.15)


# ---- all members at once ----


ARCHITECTURES = {
    "perceptron": lambda g: models.mlp([4, 6, 3], generator=g),
    "tanh, no bias": lambda g: models.mlp([4, 5, 5, 3], nn.Tanh, bias=False, generator=g),
    "convolutions": lambda g: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), models.small_cnn((1, 4, 4), 3, width=2, generator=g)[0],
        nn.Flatten(), models.mlp([8, 3], generator=g),
    ),
    "batch norm": lambda g: nn.Sequential(
        models.mlp([4, 6], generator=g), nn.BatchNorm1d(6), models.mlp([6, 3], generator=g)
    ),
}  # fmt: skip


def members_of(architecture, count=3, dtype=torch.float64, device="cpu"):
    make = ARCHITECTURES[architecture]
    return [make(train.generator(k, "init")).to(device, dtype) for k in range(count)]


@pytest.mark.covers("B5")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_member_says_what_it_says_alone(architecture, device, dtype):
    members = members_of(architecture, 3, dtype, device)
    ensemble = bagging.Ensemble(members)
    x = torch.randn(3, 7, 4, generator=stream(), dtype=dtype).to(device)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    for mode in (False, True):
        ensemble.train(mode)
        shared, own = ensemble(x[0]), ensemble(x, separate=True)
        assert shared.shape == own.shape == (3, 7, 3)
        for k, member in enumerate(members):
            member.train(mode)
            torch.testing.assert_close(shared[k], member(x[0]), **tolerance)
            torch.testing.assert_close(own[k], member(x[k]), **tolerance)
    for k, member in enumerate(members):  # running statistics, too, are each member's own
        got = ensemble.member(k).state_dict()
        for name, value in member.state_dict().items():
            torch.testing.assert_close(got[name], value, **tolerance)


@pytest.mark.covers("B5")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.Adam(p, lr=0.01),
    ],
    ids=["sgd", "adam"],
)
def test_trained_at_once_is_trained_one_after_another(architecture, optimizer, device):
    members, (x, y) = members_of(architecture, device=device), toy()
    x, y = x.to(device), y.to(device)
    ensemble = bagging.Ensemble(members)
    rows = bagging.bootstrap_indices(40, 3, size=30, generator=stream())
    at_once = optimizer(ensemble.parameters())
    bagging.fit_members(ensemble, x, y, at_once, 4, 8, rows=rows, generator=stream(1))
    alone = [optimizer(member.parameters()) for member in members]
    draw = stream(1)
    for _ in range(4):
        order = rows.gather(1, torch.rand(3, 30, generator=draw).argsort(dim=1)).to(device)
        for batch in order.split(8, dim=1):
            for member, steps, mine in zip(members, alone, batch, strict=True):
                steps.zero_grad()
                cross_entropy(member(x[mine]), y[mine]).backward()
                steps.step()
    for k, member in enumerate(members):
        got = ensemble.member(k).state_dict()
        for name, value in member.state_dict().items():
            torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-9)


def test_a_member_learns_nothing_from_another_ones_loss():
    ensemble, (x, _) = bagging.Ensemble(nets(3)), toy()
    ensemble(x)[1].square().sum().backward()
    for parameter in ensemble.parameters():
        assert not parameter.grad[[0, 2]].any()
        assert parameter.grad[1].any()


def test_the_mean_over_members_instead_of_the_sum_trains_k_times_slower():
    ensemble, (x, y) = bagging.Ensemble(nets(4)), toy()
    sgd = torch.optim.SGD(ensemble.parameters(), lr=0.1)
    before = copy.deepcopy(ensemble)
    bagging.fit_members(ensemble, x, y, sgd, 1, len(x), generator=stream())
    output, target = before(x), y.expand(4, -1)
    cross_entropy(output.flatten(0, 1), target.flatten()).backward()  # the slip
    for new, old in zip(ensemble.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(old.detach() - new.detach(), 0.1 * 4 * old.grad)


def test_by_default_every_member_sees_every_row_once_an_epoch():
    seen = []
    ensemble = bagging.Ensemble([nn.Linear(1, 2).double() for _ in range(3)])
    ensemble.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.arange(10.0, dtype=torch.float64)[:, None]
    y = torch.zeros(10, dtype=torch.int64)
    sgd = torch.optim.SGD(ensemble.parameters(), lr=0.0)
    bagging.fit_members(ensemble, x, y, sgd, 1, 4, generator=stream())
    orders = torch.cat(seen, dim=1).squeeze(2)
    assert [s.shape[1] for s in seen] == [4, 4, 2]
    assert torch.equal(orders.sort(dim=1).values, x.T.expand(3, -1))
    assert len({tuple(order.tolist()) for order in orders}) == 3


def test_the_loss_of_an_epoch_is_the_mean_over_members_and_batches():
    members, (x, y) = nets(3), toy()
    ensemble = bagging.Ensemble(members)
    sgd = torch.optim.SGD(ensemble.parameters(), lr=1e-12)
    history = bagging.fit_members(ensemble, x, y, sgd, 2, 10, generator=stream())
    mean = np.mean([cross_entropy(member(x), y).item() for member in members])
    assert history == pytest.approx([mean, mean], rel=1e-6)


def test_real_targets_are_fitted_with_another_loss():
    x, _ = toy()
    y = x[:, :1] - 2 * x[:, 1:2]
    ensemble = bagging.Ensemble([nn.Linear(4, 1).double() for _ in range(3)])
    sgd = torch.optim.SGD(ensemble.parameters(), lr=0.1)
    options = {"loss": nn.functional.mse_loss, "generator": stream()}
    assert bagging.fit_members(ensemble, x, y, sgd, 200, 20, **options)[-1] < 1e-12


def test_dropout_drops_other_units_in_each_member():
    ensemble = bagging.Ensemble([nn.Sequential(nn.Dropout(0.5), nn.Identity())] * 4)
    kept = ensemble(torch.ones(4, 2, 50), separate=True)
    assert len({tuple(row.flatten().tolist()) for row in kept}) == 4
    assert torch.equal(ensemble.eval()(torch.ones(4, 2, 50), separate=True), torch.ones(4, 2, 50))


def test_shared_weights_stay_shared():
    def tied():
        encoder, decoder = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        decoder.weight = encoder.weight
        return nn.Sequential(encoder, decoder).double()

    members = [tied() for _ in range(2)]
    ensemble, (x, _) = bagging.Ensemble(members), toy()
    assert len(list(ensemble.parameters())) == 1
    for k, member in enumerate(members):
        torch.testing.assert_close(ensemble(x[:, :3])[k], member(x[:, :3]))
        encoder, decoder = ensemble.member(k)
        assert encoder.weight is decoder.weight


def test_members_are_copied_and_not_changed():
    members, (x, y) = nets(2), toy()
    before = copy.deepcopy(members[0].state_dict())
    ensemble = bagging.Ensemble(members)
    sgd = torch.optim.SGD(ensemble.parameters(), lr=0.1)
    bagging.fit_members(ensemble, x, y, sgd, 1, 10, generator=stream())
    for name, value in members[0].state_dict().items():
        assert torch.equal(value, before[name])
    taken = ensemble.member(1)
    with torch.no_grad():
        taken[0].weight.zero_()
    assert ensemble.stacked[0].weight[1].any()


def test_frozen_parameters_stay_frozen_and_the_mode_comes_back():
    members, (x, y) = nets(2), toy()
    for member in members:
        member[0].requires_grad_(False)
    ensemble = bagging.Ensemble(members).eval()
    assert [p.requires_grad for p in ensemble.parameters()] == [False, False, True, True]
    sgd = torch.optim.SGD([p for p in ensemble.parameters() if p.requires_grad], lr=0.1)
    bagging.fit_members(ensemble, x, y, sgd, 1, 10, generator=stream())
    assert not ensemble.training
    assert torch.equal(ensemble.stacked[0].weight[0], members[0][0].weight)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "at least one member, got none"),
        (
            [nn.Linear(4, 3), nn.Linear(4, 2)],
            "out_features=3.* in member 0 and .*out_features=2.* 1",
        ),
        (
            [nn.Linear(4, 3), nn.Linear(4, 3, bias=False)],
            "bias=True.* in member 0 and .*bias=False.* 1",
        ),
        ([*nets(2), nets(1, activation=nn.Tanh)[0]], "ReLU.* in member 0 and .*Tanh.* member 2"),
        (
            [nn.Linear(4, 3), nn.Linear(4, 3).double()],
            "float32.* in member 0 and .*float64.* member 1",
        ),
        (
            [nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 3))],
            "Linear.* in member 0 and .*Sequential",
        ),
        ([nn.Dropout(0.1), nn.Dropout(0.2)], "p=0.1.* in member 0 and .*p=0.2.* in member 1"),
        ([nn.Linear(4, 3), nn.Linear(4, 3).eval()], "True.* in member 0 and .*False.* in member 1"),
    ],
)
def test_members_of_mismatched_architecture_are_refused(members, message):
    with pytest.raises(ValueError, match=rf"^Ensemble: expected .*{message}"):
        bagging.Ensemble(members)


def test_a_member_that_is_no_module_is_refused(unchecked_shapes):
    with pytest.raises(TypeError, match="^Ensemble: expected members as modules, got 'net'$"):
        bagging.Ensemble(["net"])


def test_parts_for_another_number_of_members_are_refused():
    ensemble = bagging.Ensemble(nets(3))
    message = r"^Ensemble: expected x of shape \(3, batch, \.\.\.\), got \(2, 5, 4\)$"
    with pytest.raises(ValueError, match=message):
        ensemble(torch.zeros(2, 5, 4, dtype=torch.float64), separate=True)
    with pytest.raises(ValueError, match=r"^Ensemble.member: expected k below 3, got 3$"):
        ensemble.member(3)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"rows": torch.zeros(2, 0, dtype=torch.int64)},
            r"expected rows to train on, got \(2, 0\)",
        ),
        ({"rows": torch.tensor([[0], [40]])}, "expected rows from 0 to 39, got 0 to 40"),
        ({"rows": torch.tensor([[0]])}, r"expected rows of shape \(2, size\), got \(1, 1\)"),
        ({"epochs": 0}, "expected epochs of at least 1, got 0"),
        ({"batch_size": 0}, "expected batch_size of at least 1, got 0"),
    ],
)
def test_training_on_nothing_is_refused_and_changes_nothing(bad, message):
    ensemble, (x, y) = bagging.Ensemble(nets(2)), toy()
    before = copy.deepcopy(ensemble.state_dict())
    sgd = torch.optim.SGD(ensemble.parameters(), lr=0.1)
    options = {"epochs": 1, "batch_size": 8, "generator": stream()} | bad
    with pytest.raises(ValueError, match=f"^fit_members: {message}$"):
        bagging.fit_members(ensemble, x, y, sgd, **options)
    for name, value in ensemble.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_loss_that_is_not_finite_stops_the_training():
    ensemble, (x, y) = bagging.Ensemble(nets(2)), toy()
    sgd = torch.optim.SGD(ensemble.parameters(), lr=1e200)
    message = "^fit_members: expected a finite loss, got .* in epoch 0; try a smaller learning rate"
    with pytest.raises(RuntimeError, match=message):
        bagging.fit_members(ensemble, x, y, sgd, 5, 8, generator=stream())


# ---- the stored benchmark ----


@pytest.mark.covers("B5")
def test_the_stored_benchmark_keeps_the_promised_ratios():
    record = Record.load(RECORD)
    seconds = {name: np.median(record.values[f"{name}_s"]) for name in CONTESTANTS}
    accuracy = {name: np.array(record.values[f"{name}_accuracy"]) for name in CONTESTANTS}
    assert record.config["members"] == 16
    assert len(record.seeds) >= 5
    assert seconds["ensemble"] <= 0.3 * seconds["loop"]
    assert seconds["ensemble"] <= 0.4 * seconds["sklearn"]
    for other in ("loop", "sklearn"):
        gaps = accuracy["ensemble"] - accuracy[other]
        assert abs(gaps.mean()) <= stats.t.ppf(0.975, len(gaps) - 1) * stats.sem(gaps)
        assert stats.sem(gaps) < 0.005
    assert "dirty" not in record.commit
