"""LaCIM: its bound, priors, inference, data. Numbers in comments are the specification's (6.k)."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from coursekit import lacim, train
from coursekit.lacim.parts import LOG_2PI, log_normal

PRIORS = ("rho", "table", "full", "mixture", "single")


def stream(name, seed=0):
    return train.generator(seed, name)


def linear_model(prior="full", domains=2, dim=5, **options):
    """A small LaCIM in which everything is linear, in float64, with tables that are not trivial."""
    options = {"s_dim": 1, "v_dim": 1, "full_posterior": True} | options
    model = lacim.LaCIM(
        (dim,), domains=domains, decoder="linear", prior=prior, generator=stream("init"), **options
    ).double()
    draw = stream("tables")
    with torch.no_grad():
        for name, table in model.named_parameters():
            if name.startswith("prior.") or name == "lower":
                table += 0.5 * torch.randn(table.shape, generator=draw) * table.requires_grad
    return model


def exact(model, x, y, d):
    """log p(x, y|d) and the mean and covariance of p(s, v|x, d), of a linear model, by quadrature.

    Integrates p(y|s) against the exact posterior of s by 200 Gauss-Hermite nodes.
    """
    weight, bias = model.decoder.net[0].weight, model.decoder.net[0].bias
    std = model.prior.log_std[d].exp()
    unit = torch.eye(2).double() + model.prior.lower[d].tril(-1)
    root = torch.diag(std) @ unit
    prior_cov, mean = root @ root.T, model.prior.mean[d]
    noise = (2 * model.log_scale_x).exp() * torch.eye(len(bias)).double()
    total = weight @ prior_cov @ weight.T + noise
    log_x = torch.distributions.MultivariateNormal(weight @ mean + bias, total).log_prob(x)
    gain = prior_cov @ weight.T @ torch.linalg.inv(total)
    post_mean = mean + (x - weight @ mean - bias) @ gain.T
    post_cov = prior_cov - gain @ weight @ prior_cov
    nodes, masses = (torch.from_numpy(a) for a in np.polynomial.hermite.hermgauss(200))
    s = post_mean[:, :1] + (2 * post_cov[0, 0]).sqrt() * nodes
    log_y = model.classifier(s.unsqueeze(-1)).log_softmax(dim=-1)[torch.arange(len(y)), :, y]
    log_y = (log_y + (masses / math.sqrt(math.pi)).log()).logsumexp(dim=1)
    return log_x + log_y, post_mean, post_cov, gain


def make_posterior_exact(model, d):
    """Set head d to p(s, v|x, d), which is Gaussian with a mean linear in x."""
    _, mean, cov, gain = exact(model, torch.zeros(1, 5).double(), torch.zeros(1).long(), d)
    root = torch.linalg.cholesky(cov)
    head = model.heads[-1]
    with torch.no_grad():
        head.weight.unflatten(0, (-1, 2, 2))[d, 0] = gain
        head.weight.unflatten(0, (-1, 2, 2))[d, 1] = 0
        head.bias.unflatten(0, (-1, 2, 2))[d, 0] = mean[0]
        head.bias.unflatten(0, (-1, 2, 2))[d, 1] = root.diag().log()
        model.lower[d] = root / root.diag()[:, None]


def labelled(n=6, dim=5, seed=0):
    draw = stream("examples", seed)
    x = torch.randn(n, dim, generator=draw).double()
    return x, torch.arange(n) % 2, torch.arange(n) // (n // 2)


# ---- the bound ----


@pytest.mark.covers("L3")
@pytest.mark.parametrize("prior", PRIORS)
def test_one_sample_is_cross_entropy_plus_reconstruction_plus_divergence(prior):  # spec 6.1
    model = linear_model(prior)
    x, y, d = labelled()
    got = -model.bound(x, y, d, samples=1)

    model.generator = stream("init")  # the same noise again, term by term
    replay = linear_model(prior)
    replay.load_state_dict(model.state_dict())
    eps = torch.randn(1, 6, 2, generator=replay.generator).double()
    mean, log_std = (t[torch.arange(6), d] for t in replay.posterior(x))
    z = mean + log_std.exp() * (eps + (replay.lower.tril(-1)[d] @ eps[..., None])[..., 0])
    t = replay.prior.transport(z, d)[0]
    class_loss = cross_entropy(replay.classifier(t[:, :1]), y, reduction="none")
    scale = replay.log_scale_x.exp()
    law = torch.distributions.Normal(replay.decoder(t[:, :1], t[:, 1:]), scale)
    reconstruction = -law.log_prob(x).sum(dim=1)
    divergence = log_normal(eps, log_std)[0] - replay.prior.log_prob(z, d)[0]
    wanted = class_loss + reconstruction + divergence
    torch.testing.assert_close(got, wanted)
    got.sum().backward()
    wanted.sum().backward()
    for mine, other in zip(model.parameters(), replay.parameters(), strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.covers("L3")
def test_with_many_samples_the_label_term_is_the_integral_over_s(dtype):  # spec 6.1
    mean, std, slope = torch.tensor([0.3, -1.2], dtype=dtype), 0.8, 2.0
    s = mean + std * torch.randn(100_000, 2, generator=stream("s")).to(dtype)
    probit = torch.distributions.Normal(0.0, 1.0)
    zero = torch.zeros_like(s)
    got = lacim.elbo(probit.cdf(slope * s).log(), zero, zero, zero)
    closed = probit.cdf(slope * mean / math.sqrt(1 + (slope * std) ** 2)).log()
    torch.testing.assert_close(got, closed.to(dtype), atol=1e-2, rtol=0)


@pytest.mark.covers("L3")
def test_bound_stays_below_the_evidence_and_meets_it_at_the_exact_posterior():  # spec 6.2
    model = linear_model()
    x, y, d = labelled()
    with torch.no_grad():
        evidence = torch.cat([exact(model, x[d == k], y[d == k], k)[0] for k in (0, 1)])
        loose = model.bound(x, y, d, samples=20_000)
        for k in (0, 1):
            make_posterior_exact(model, k)
        tight = model.bound(x, y, d, samples=20_000)
    assert (loose < evidence - 0.05).all()
    torch.testing.assert_close(tight, evidence, atol=2e-2, rtol=0)


def test_few_samples_bias_the_bound_downwards():
    model = linear_model()
    x, y, d = labelled()
    with torch.no_grad():
        model.classifier[0].weight *= 10  # so that the weights of samples differ
        for k in (0, 1):
            make_posterior_exact(model, k)
        evidence = torch.cat([exact(model, x[d == k], y[d == k], k)[0] for k in (0, 1)])
        one = torch.stack([model.bound(x, y, d, samples=1) for _ in range(500)]).mean(dim=0)
    assert one.mean() < evidence.mean() - 0.05


@given(st.integers(1, 8), st.integers(0, 10_000))
def test_weights_sum_to_one(samples, seed):  # spec 6.3
    log_y, value = torch.randn(2, samples, 3, generator=stream("w", seed)).double()
    constant = torch.full_like(log_y, 2.5)
    zero = torch.zeros_like(log_y)
    label = log_y.logsumexp(dim=0) - math.log(samples)
    torch.testing.assert_close(lacim.elbo(log_y, constant, zero, zero), label + 2.5)
    inner = lacim.elbo(log_y, value, zero, zero, class_weight=0.0)
    assert ((inner >= value.amin(0) - 1e-9) & (inner <= value.amax(0) + 1e-9)).all()


def test_the_bound_is_finite_at_huge_logits(dtype):  # spec 6.3
    logits = torch.tensor([[1e3, -1e3], [-1e3, 1e3]], dtype=dtype, requires_grad=True)
    log_y = logits.log_softmax(dim=1)
    zero = torch.zeros(2, 2, dtype=dtype)
    value = lacim.elbo(log_y, zero - 7, zero, zero)
    value.sum().backward()
    assert value.isfinite().all()
    assert logits.grad.isfinite().all()
    naive = log_y.exp().mean(dim=0).log() - 7  # the weights of two underflow to 0/0 elsewhere
    torch.testing.assert_close(value, naive)


@pytest.mark.covers("L3")
def test_a_label_that_tells_nothing_gives_the_ordinary_bound_plus_a_constant():  # spec 6.3
    log_x, log_prior, log_q = torch.randn(3, 16, 4, generator=stream("t")).double()
    constant = torch.full((16, 4), math.log(0.5)).double()
    ordinary = (log_x + log_prior - log_q).mean(dim=0)
    got = lacim.elbo(constant, log_x, log_prior, log_q)
    torch.testing.assert_close(got, ordinary + math.log(0.5))


def test_unweighted_samples_are_another_objective():
    log_y = torch.tensor([[0.9], [0.1]]).log()
    value, zero = torch.tensor([[-1.0], [-5.0]]), torch.zeros(2, 1)
    wrong = math.log(0.5) + value.mean()
    assert abs(lacim.elbo(log_y, value, zero, zero).item() - wrong) > 1


def test_gradients_flow_through_the_weights():
    log_y, log_x = (t.double() for t in torch.randn(2, 4, 2, generator=stream("g")))
    zero = torch.zeros(4, 2).double()
    log_y.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda a: lacim.elbo(a, log_x, zero, zero), log_y)


# ---- who may see what ----


@pytest.mark.covers("L3")
def test_the_label_head_does_not_see_v():  # spec 6.4
    model = linear_model(v_dim=2)
    t = torch.randn(3, 6, 3, generator=stream("t")).double().requires_grad_(True)
    y = torch.arange(6) % 2
    model.log_label(y, t[..., : model.s_dim]).sum().backward()
    assert (t.grad[..., 1:] == 0).all()
    assert (t.grad[..., :1] != 0).any()


def test_decoder_and_label_head_know_no_domain():  # spec 6.4
    model = lacim.LaCIM((3, 14, 14), domains=3, generator=stream("init"))
    for part in (model.decoder, model.classifier):
        assert "domain" not in " ".join(inspect.signature(part.forward).parameters)
        assert all(3 not in p.shape[:1] for p in part.parameters() if p.ndim == 3)
    same = lacim.LaCIM((3, 14, 14), domains=1, generator=stream("init"))
    for part in ("decoder", "classifier"):
        mine, other = (list(getattr(m, part).parameters()) for m in (model, same))
        assert [p.shape for p in mine] == [p.shape for p in other]


@pytest.mark.parametrize("prior", PRIORS)
def test_parameters_of_a_domain_learn_from_that_domain_only(prior):  # spec 6.4
    model = linear_model(prior)
    x, y, _ = labelled()
    (-model.bound(x, y, torch.zeros(6).long()).mean()).backward()
    tables = {"heads": model.heads[-1].weight.grad.unflatten(0, (2, -1)), "q": model.lower.grad}
    if prior in ("table", "full"):
        tables |= {"mean": model.prior.mean.grad, "std": model.prior.log_std.grad}
    if prior == "full":
        tables["lower"] = model.prior.lower.grad
    if prior == "mixture":
        tables["weights"] = model.prior.weights.grad
    if prior == "rho":
        maps = [m[0].weight.grad for m in model.prior.maps]
        tables["rho"] = torch.stack([torch.cat(maps[:2]), torch.cat(maps[2:])])
    for name, grad in tables.items():
        assert (grad[1] == 0).all(), name
        assert (grad[0] != 0).any(), name


@pytest.mark.covers("L3")
@pytest.mark.parametrize("prior", ["rho", "table", "full", "mixture"])
@pytest.mark.parametrize("together", [True, False], ids=["mixed batches", "one domain a batch"])
def test_priors_of_domains_differ_while_training(prior, together):  # spec 6.5
    draw = stream("data")
    x = torch.randn(64, 5, generator=draw) + torch.tensor([[-2.0], [2.0]]).repeat_interleave(32, 0)
    y, d = (x[:, 0] > 0).long(), torch.arange(2).repeat_interleave(32)
    model = lacim.LaCIM(
        (5,), domains=2, s_dim=1, v_dim=1, decoder="generic", prior=prior, lr=1e-2,
        generator=stream("init"),
    ).train()  # fmt: skip
    parts = [slice(None)] if together else [d == 0, d == 1]
    for _ in range(15):
        for rows in parts:
            model.optimizer.zero_grad()
            (-model.bound(x[rows], y[rows], d[rows]).mean()).backward()
            model.optimizer.step()
    assert model.training
    z = torch.randn(32, 2, generator=draw)
    zero, one = (torch.full((32,), k) for k in (0, 1))
    density = model.prior.log_prob(z, zero) - model.prior.log_prob(z, one)
    moved = model.prior.transport(z, zero) - model.prior.transport(z, one)
    assert max(density.abs().max(), moved.abs().max()) > 0.01


def test_full_prior_is_the_correlated_normal(dtype):
    prior = linear_model().prior.to(dtype)
    z = torch.randn(3, 4, 2, generator=stream("z")).to(dtype)
    root = torch.diag(prior.log_std[1].exp()) @ (torch.eye(2).to(dtype) + prior.lower[1].tril(-1))
    law = torch.distributions.MultivariateNormal(prior.mean[1], root @ root.T)
    got = prior.log_prob(z, torch.ones(4).long())
    torch.testing.assert_close(got, law.log_prob(z), atol=1e-4, rtol=1e-4)


def test_mixture_prior_makes_s_and_v_correlate_within_a_domain():
    prior = lacim.DomainPrior("mixture", 2, 1, 1, parts=2, generator=stream("init"))
    with torch.no_grad():
        prior.mean.copy_(torch.tensor([[2.0, 2.0], [-2.0, -2.0]]))
        prior.weights.copy_(torch.tensor([[0.0, 0.0], [9.0, -9.0]]))
    at = torch.tensor([[2.0, 2.0], [2.0, -2.0]])
    zero, one = torch.zeros(2).long(), torch.ones(2).long()
    both = prior.log_prob(at, zero)
    wanted = math.log(0.5) - LOG_2PI + math.log1p(math.exp(-16.0))
    assert both[0].item() == pytest.approx(wanted, abs=1e-5)
    assert both[0] - both[1] > 7
    gain = prior.log_prob(at, one)[0] - both[0]
    assert gain.item() == pytest.approx(math.log(2), abs=1e-3)


# ---- decoders ----


@pytest.mark.parametrize("maps", [1, 4])
def test_paint_scores_an_image_as_if_it_had_painted_it(maps, device, dtype):
    paint = lacim.Paint(5, 2, (3, 6, 6), maps, 16, generator=stream("init")).to(device, dtype)
    draw = stream("t")
    s, v = (torch.randn(4, 7, k, generator=draw).to(device, dtype) for k in (5, 2))
    x = torch.rand(7, 3, 6, 6, generator=draw).to(device, dtype)
    direct = ((x - paint(s, v)) ** 2).sum(dim=(-3, -2, -1))
    torch.testing.assert_close(paint.squared_error(x, s, v), direct, rtol=1e-4, atol=1e-4)


def test_paint_gives_shape_to_s_alone_and_colour_to_v_alone():
    paint = lacim.Paint(5, 2, (3, 6, 6), generator=stream("init"))
    draw = stream("t")
    s, v = torch.randn(2, 5, generator=draw), torch.randn(2, 2, generator=draw)
    image = paint(s, v).detach()
    assert torch.linalg.matrix_rank(image[0].flatten(1)) == 1
    repainted = paint(s, v.flip(0)).detach()
    ratio = repainted / image
    torch.testing.assert_close(ratio, ratio[:, :, :1, :1].expand_as(ratio), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 14, 14), (3, 28, 28), (6,)])
@pytest.mark.parametrize("decoder", ["linear", "generic", "paint", "film"])
def test_encoders_and_decoders_take_rows_and_both_sizes_of_image(shape, decoder):
    if len(shape) == 3 and decoder == "linear":
        return
    if len(shape) == 1 and decoder in ("paint", "film"):
        with pytest.raises(ValueError, match=r"expected a shape \(c, h, w\) to paint, got \(6,\)"):
            lacim.LaCIM(shape, domains=2, decoder=decoder, generator=stream("init"))
        return
    model = lacim.LaCIM(shape, domains=2, decoder=decoder, samples=3, generator=stream("init"))
    x, y = torch.rand(8, *shape, generator=stream("x")), torch.arange(8) % 2
    before = model.bound(x, y, y).mean().item()
    for _ in range(10):
        out = model.update([(x, y), (x, y)])
    assert out["loss"] < -before
    assert model.predict(x).exp().sum(dim=1).tolist() == pytest.approx([1.0] * 8, abs=1e-5)


# ---- inference ----


def image_model(prior="table"):
    model = lacim.LaCIM((3, 14, 14), domains=2, prior=prior, generator=stream("init"))
    x, y = torch.rand(16, 3, 14, 14, generator=stream("x")), torch.arange(16) % 2
    for _ in range(20):
        model.update([(x, y), (x.flip(0), y)])
    return model, x


@pytest.mark.covers("L4")
@pytest.mark.parametrize("prior", ["table", "rho"])
def test_prediction_takes_x_alone_and_other_examples_change_nothing(prior):  # spec 6.6
    model, x = image_model(prior)
    for function in (lacim.infer_latents, model.predict, lacim.predictions):
        assert not {"y", "domain", "label"} & set(inspect.signature(function).parameters)
    model.double()
    x = x.double()

    def latents(rows, size):
        gaussian = lacim.latent_gaussian(model, x, generator=stream("gaussian"))
        return lacim.infer_latents(
            model, rows, prior=gaussian, steps=20, batch_size=size, generator=stream("i")
        )

    together = latents(x, 16)
    for size in (1, 5):
        for whole, part in zip(together, latents(x, size), strict=True):
            torch.testing.assert_close(whole, part, rtol=1e-6, atol=1e-6)
    alone = latents(x[3:4], 16)
    torch.testing.assert_close(alone.optimised, together.optimised[3:4], rtol=1e-6, atol=1e-6)


def test_a_mean_over_the_batch_would_let_the_other_examples_in():
    model, x = image_model()
    start = torch.zeros(16, model.latent).requires_grad_(True)

    def objective(rows, reduce):
        likelihood = model.log_likelihood(x[:rows], start[:rows])
        value = reduce(likelihood) - 0.01 * (start[:rows] ** 2 + start[:rows]).sum()
        return torch.autograd.grad(value, start)[0][0]

    torch.testing.assert_close(objective(1, torch.sum), objective(16, torch.sum))
    assert not torch.allclose(objective(1, torch.mean), objective(16, torch.mean), rtol=0.5)


@pytest.mark.covers("L4")
@pytest.mark.parametrize("ridge", [0.0, 2.0])
def test_ascent_through_a_linear_decoder_finds_the_ridge_solution(ridge):  # spec 6.7
    model = linear_model()
    x, _, _ = labelled(30)
    mean, precision = torch.tensor([0.5, -0.2]).double(), ridge * torch.eye(2).double()
    weight, bias = model.decoder.net[0].weight, model.decoder.net[0].bias
    inverse_noise = (-2 * model.log_scale_x).exp()
    left = inverse_noise * weight.T @ weight + precision
    right = inverse_noise * (x - bias) @ weight + mean @ precision
    closed = torch.linalg.solve(left, right.T).T.detach()
    found = lacim.infer_latents(model, x, prior=(mean, precision), steps=400, draws=0)
    torch.testing.assert_close(found.optimised, closed, atol=1e-3, rtol=0)
    assert (found.after >= found.before).all()


@pytest.mark.covers("L4")
def test_the_objective_never_ends_below_its_best_candidate_even_if_steps_explode():  # spec 6.7
    model, x = image_model()
    draw = stream("i")
    found = lacim.infer_latents(model, x, steps=5, lr=1e3, generator=draw)
    assert (found.after >= found.before).all()
    noise = torch.zeros(1, model.latent)
    candidates = model.candidates(x, noise)
    best = lacim.infer_latents(model, x, steps=0, draws=0)
    reconstructions = model.log_likelihood(x, candidates)
    torch.testing.assert_close(best.before, reconstructions.amax(dim=0).detach())
    assert (best.initial == best.optimised).all()


@pytest.mark.covers("L4")
def test_candidates_and_ascent_do_not_depend_on_the_label_head():  # spec 6.7
    model, x = image_model()
    before = lacim.infer_latents(model, x, steps=5, generator=stream("i"))
    with torch.no_grad():
        for weight in model.classifier.parameters():
            weight.normal_(generator=stream("other"))
    after = lacim.infer_latents(model, x, steps=5, generator=stream("i"))
    assert torch.equal(before.initial, after.initial)
    assert torch.equal(before.optimised, after.optimised)
    assert not torch.equal(before.amortised, after.amortised)


@pytest.mark.covers("L4")
def test_three_predictions_are_reported_apart_and_a_refit_head_beside_them():
    model, x = image_model()
    found = lacim.infer_latents(model, x, steps=5, generator=stream("i"))
    said = lacim.predictions(model, found)
    assert list(said) == ["amortised", "initial", "optimised"]
    y = (found.optimised[:, 0] > found.optimised[:, 0].median()).long()
    head = lacim.refit_head(model, found.optimised, y, generator=stream("head"))
    refit = lacim.predictions(model, found, head)["refit"]
    assert (refit.argmax(dim=1) == y).all()
    v_only = found.optimised.clone()
    v_only[:, : model.s_dim] = 0
    constant = head(v_only[:, : model.s_dim])
    torch.testing.assert_close(constant, constant[:1].expand_as(constant))


def test_the_domain_free_prior_is_the_gaussian_of_all_proposals(dtype):
    model = linear_model("table", full_posterior=False).to(dtype)
    x = torch.randn(5000, 5, generator=stream("x")).to(dtype)
    mean, precision = lacim.latent_gaussian(model, x, draws=50, generator=stream("g"))
    means, log_stds = model.posterior(x)
    torch.testing.assert_close(mean, means.mean(dim=(0, 1)), atol=0.3, rtol=0)
    spread = torch.cov(means.flatten(0, 1).T) + torch.diag((2 * log_stds).exp().mean(dim=(0, 1)))
    off = torch.linalg.inv(precision) / spread
    assert off.diag().tolist() == pytest.approx([1.0, 1.0], abs=0.3)
    assert precision[0, 1] == precision[1, 0] == 0  # s and v: what correlates them is confounding


@pytest.mark.covers("L7")
def test_saliency_marks_the_pixels_that_a_classifier_reads_and_no_others():
    model = lacim.ERM((1, 6, 6), domains=1, generator=stream("init"))
    model.features = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 64))
    with torch.no_grad():
        model.features[1].weight.fill_(1.0)[:, 3:] = 0  # the three pixels at the top left
        model.features[1].bias.fill_(1.0)
    x = torch.rand(4, 1, 6, 6, generator=stream("x"))
    marked = lacim.saliency(model, x)
    assert marked.shape == x.shape
    assert (marked.flatten(1)[:, 3:] == 0).all()
    assert (marked.flatten(1)[:, :3] > 0).all()
    step = 1e-3
    moved = x.clone()
    moved[:, 0, 0, 0] += step

    def margin(rows):
        return model.classify(rows).topk(2, dim=1).values.diff(dim=1).neg()[:, 0]

    change = (margin(moved) - margin(x)).abs() / step
    torch.testing.assert_close(change, marked[:, 0, 0, 0], rtol=0.02, atol=1e-4)


# ---- errors ----


def bad(call, *args, **kwargs):
    return lambda: call(*args, generator=stream("bad"), **kwargs)


BAD = {
    "prior": (
        bad(lacim.LaCIM, (5,), domains=2, decoder="linear", prior="flow"),
        r"DomainPrior: expected kind to be one of 'rho', .*'single', got 'flow'",
    ),
    "decoder": (
        bad(lacim.LaCIM, (5,), domains=2, decoder="gan"),
        r"make_decoder: expected decoder to be one of 'linear'.*, got 'gan'",
    ),
    "samples": (
        bad(lacim.LaCIM, (5,), domains=2, samples=0),
        r"LaCIM: expected samples of at least 1, got 0",
    ),
    "domains": (
        bad(lacim.LaCIM, (5,), domains=0),
        r"LaCIM: expected domains of at least 1, got 0",
    ),
    "shape": (bad(lacim.ERM, (3, 4), domains=1), r"backbone: expected shape \(features,\) or"),
    "scm": (
        bad(lacim.simulate_scm, "cubic", 5, 3),
        r"simulate_scm: expected variant to be one of 'linear', 'fair', 'official', got 'cubic'",
    ),
    "correlations": (
        bad(lacim.simulate_scm, "linear", 5, 3),
        r"simulate_scm: expected domains as a list of correlations, got 3",
    ),
    "correlation": (
        bad(lacim.simulate_scm, "linear", 5, [1.5]),
        r"simulate_scm: expected correlation in \[-1, 1\], got 1.5",
    ),
    "number": (
        bad(lacim.simulate_scm, "fair", 5, [0.9]),
        r"simulate_scm: expected domains as a number, got \[0.9\]",
    ),
    "size": (bad(lacim.simulate_scm, "fair", 0, 2), r"simulate_scm: expected n of at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_images_of_another_shape_than_the_models_are_refused(unchecked_shapes):
    model = lacim.LaCIM((3, 14, 14), domains=2, generator=stream("init"))
    with pytest.raises(ValueError, match=r"LaCIM: expected x of shape \(batch, 3, 14, 14\), got"):
        model.predict(torch.zeros(2, 3, 28, 28))


def test_a_domain_that_the_model_does_not_have_is_refused():
    model = linear_model()
    x, y, d = labelled()
    for wrong in (d + 1, d - 1):
        with pytest.raises(ValueError, match=r"LaCIM: expected domain in \[0, 1\], got"):
            model.bound(x, y, wrong)


def test_inference_refuses_what_it_cannot_do(unchecked_shapes):
    model, x = image_model()
    with pytest.raises(TypeError, match=r"infer_latents: expected a generator to draw candidates"):
        lacim.infer_latents(model, x)
    with pytest.raises(ValueError, match=r"infer_latents: expected starts of at least 1, got 0"):
        lacim.infer_latents(model, x, starts=0, draws=0)
    with pytest.raises(ValueError, match=r"refit_head: expected y of shape \(16,\), got \(3,\)"):
        lacim.refit_head(
            model, torch.zeros(16, 18), torch.zeros(3).long(), generator=stream("head")
        )
    with pytest.raises(ValueError, match=r"latent_gaussian: expected draws of at least 2, got 1"):
        lacim.latent_gaussian(model, x, draws=1, generator=stream("g"))


def test_no_global_random_state_moves():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    model, x = image_model()
    found = lacim.infer_latents(model, x, steps=2, generator=stream("i"))
    lacim.refit_head(model, found.optimised, torch.arange(16) % 2, steps=2, generator=stream("h"))
    lacim.simulate_scm("fair", 5, 2, generator=stream("s"))
    grey, digits = torch.zeros(4, 28, 28), torch.zeros(4).long()
    lacim.colored_mnist(grey, digits, 0.5, generator=stream("c"))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
