"""Data of known cause, the score of recovered latents, and folders that a reader obtains."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from coursekit import data, lacim, train
from coursekit.lacim.scm import Simulation


def stream(name, seed=0):
    return train.generator(seed, name)


def digits(n=1000):
    split = data.load("mnist")
    return torch.tensor(split.x_train[:n]), torch.tensor(split.y_train[:n])


def three_sigma(p, n):
    return 3 * math.sqrt(max(p * (1 - p), 1e-9) / n)


# ---- coloured digits ----


@pytest.mark.covers("L1")
@pytest.mark.parametrize("variant", ["lacim", "irm"])
@pytest.mark.parametrize("agreement", [0.1, 0.5, 0.8, 0.9])
def test_colour_agrees_with_the_label_as_often_as_asked(variant, agreement):  # spec 6.8
    images, classes = digits(5000)
    got = lacim.colored_mnist(images, classes, agreement, variant=variant, generator=stream("c"))
    share = (got.colour == got.y).double().mean().item()  # what a rule of colour alone scores
    assert abs(share - agreement) < three_sigma(agreement, 5000)


def test_the_colour_of_an_image_is_the_colour_that_is_reported():  # spec 6.8
    images, classes = digits()
    got = lacim.colored_mnist(images, classes, 0.8, generator=stream("c"))
    red_less_green = got.x[:, 0].sum(dim=(1, 2)) - got.x[:, 1].sum(dim=(1, 2))
    assert ((red_less_green > 0).long() == got.colour).all()
    irm = lacim.colored_mnist(images, classes, 0.8, variant="irm", generator=stream("c"))
    assert (irm.x.sum(dim=(2, 3)).argmax(dim=1) == irm.colour).all()


@pytest.mark.covers("L1")
def test_at_one_half_colour_says_nothing_about_the_label():  # spec 6.8
    images, classes = digits(5000)
    for variant in ("lacim", "irm"):
        got = lacim.colored_mnist(images, classes, 0.5, variant=variant, generator=stream("c"))
        table = torch.stack([got.y, got.colour]).double()
        assert abs(torch.corrcoef(table)[0, 1]) < 3 / math.sqrt(5000)


def test_labels_are_noisy_in_one_definition_and_not_in_the_other():  # spec 6.8
    images, classes = digits(5000)
    shape = (classes >= 5).long()
    clean = lacim.colored_mnist(images, classes, 0.9, generator=stream("c"))
    assert (clean.y == shape).all()
    noisy = lacim.colored_mnist(images, classes, 0.9, variant="irm", generator=stream("c"))
    flipped = (noisy.y != shape).double().mean().item()
    assert abs(flipped - 0.25) < three_sigma(0.25, 5000)
    copies = (noisy.colour == shape).double().mean().item()  # colour copies the noisy label
    assert abs(copies - (0.9 * 0.75 + 0.1 * 0.25)) < three_sigma(0.7, 5000)


def test_shapes_heights_and_background_are_those_of_the_definition():
    images, classes = digits(200)
    for side in (28, 14):
        x = lacim.colored_mnist(images, classes, 0.9, side=side, generator=stream("c")).x
        assert x.shape == (200, 3, side, side)
        assert 0 <= x.min()
        assert 0.7 < x.max() < 0.9
        assert (x[:, :, 0, 0] == 0).all()
    irm = lacim.colored_mnist(images[:, 0], classes, 0.9, variant="irm", generator=stream("c"))
    assert irm.x.shape == (200, 2, 14, 14)
    torch.testing.assert_close(irm.x.sum(dim=1), images[:, 0, ::2, ::2])


BAD_IMAGES = {
    "variant": ({"variant": "domainbed"}, r"expected variant to be one of 'lacim', 'irm', got"),
    "agreement": ({"agreement": 1.2}, r"expected agreement in \[0, 1\], got 1.2"),
    "side": ({"side": 20}, r"expected side to be one of 28, 14, got 20"),
    "irm side": ({"variant": "irm", "side": 28}, r"expected side to be one of 14, got 28"),
    "wide": ({"images": torch.zeros(4, 1, 28, 27)}, r"images of shape \(n, 1, 28, 28\), got \(4"),
    "colour": ({"images": torch.zeros(4, 3, 28, 28)}, r"images of shape \(n, 1, 28, 28\), got"),
    "bytes": ({"images": torch.full((4, 28, 28), 255.0)}, r"expected pixel in \[0, 1\], got 255"),
    "negative": ({"images": torch.full((4, 28, 28), -1.0)}, r"expected pixel in \[0, 1\], got -1"),
    "nan": ({"images": torch.full((4, 28, 28), torch.nan)}, r"expected pixel in \[0, 1\], got nan"),
    "digits": ({"digits": torch.tensor([0, 1, 2, 10])}, r"expected digit in \[0, 9\], got 10"),
    "below": ({"digits": torch.tensor([0, 1, 2, -1])}, r"expected digit in \[0, 9\], got -1"),
    "few": ({"digits": torch.tensor([0, 1])}, r"expected digits of shape \(4,\), got \(2,\)"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_and_digits_are_refused(case, unchecked_shapes):
    options, message = BAD_IMAGES[case]
    given_ = {"images": torch.zeros(4, 28, 28), "digits": torch.arange(4), "agreement": 0.9}
    with pytest.raises(ValueError, match=f"colored_mnist: .*{message}"):
        lacim.colored_mnist(**given_ | options, generator=stream("c"))


# ---- structural models ----


@pytest.mark.covers("L2")
def test_domains_shift_causes_and_leave_mechanisms_alone():
    sim = lacim.simulate_scm("linear", 20_000, [0.9, -0.9], generator=stream("scm"))
    assert isinstance(sim, Simulation)
    t = torch.cat([sim.s, sim.v], dim=1)
    weights, by_s, by_v = [], [], []
    for k, r in enumerate((0.9, -0.9)):
        rows = sim.domain == k
        assert torch.corrcoef(t[rows].T)[0, 1].item() == pytest.approx(r, abs=0.01)
        weights.append(torch.linalg.lstsq(t[rows], sim.x[rows]).solution)
        high = (sim.s[:, 0] - 0.2).abs() < 0.05
        by_s.append(sim.y[rows & high].double().mean().item())
        by_v.append(sim.y[rows & (sim.v[:, 0] > 1)].double().mean().item())
    torch.testing.assert_close(weights[0], weights[1], atol=0.2, rtol=0)  # p(x|s, v)
    assert by_s == pytest.approx([1 / (1 + math.exp(-1.2))] * 2, abs=0.06)  # p(y|s)
    assert by_v[0] > 0.9  # p(y|v) is what turns round
    assert by_v[1] < 0.1


@pytest.mark.covers("L2")
def test_y_listens_to_s_and_not_to_v():
    sim = lacim.simulate_scm("linear", 40_000, [0.9], generator=stream("scm"))
    near = (sim.s[:, 0]).abs() < 0.03
    y, v = sim.y[near].double(), sim.v[near, 0].double()
    assert abs(torch.corrcoef(torch.stack([y, v]))[0, 1]) < 4 / math.sqrt(int(near.sum()))


def test_the_fair_simulation_draws_s_and_v_apart_and_the_official_one_together():
    fair = lacim.simulate_scm("fair", 3000, 4, generator=stream("scm"))
    official = lacim.simulate_scm("official", 3000, 4, generator=stream("scm"))
    for sim, same in ((fair, False), (official, True)):
        assert sim.x.shape == (12_000, 4)
        assert sim.y.shape == (12_000, 2)
        centres = [
            torch.stack([part[sim.domain == k].mean(dim=0) for k in range(4)])
            for part in (sim.s, sim.v)
        ]
        apart = (centres[0] - centres[1]).abs().max().item()
        assert (apart < 0.2) == same


@pytest.mark.parametrize(("variant", "noise"), [("linear", 2.0), ("fair", 0.1), ("official", 1.0)])
def test_noise_of_x_is_that_of_the_table(variant, noise):
    domains = [0.5] if variant == "linear" else 1
    noisy, quiet = (
        lacim.simulate_scm(variant, 5000, domains, sigma=sigma, generator=stream("scm"))
        for sigma in (None, 0.0)
    )
    assert (noisy.x - quiet.x).std().item() == pytest.approx(noise, rel=0.03)


# ---- the score ----


@pytest.mark.covers("L5")
@given(st.integers(1, 5), st.integers(0, 1000))
def test_order_sign_and_scale_do_not_matter_to_the_score(dim, seed):  # spec 6.10
    draw = stream("latents", seed)
    truth = torch.randn(50, dim, generator=draw)
    scale = torch.randn(dim, generator=draw).sign() * (0.5 + torch.rand(dim, generator=draw))
    guess = (3 + scale * truth)[:, torch.randperm(dim, generator=draw)]
    assert lacim.mean_correlation_coefficient(truth, guess) == pytest.approx(1, abs=1e-5)


def test_the_score_matches_one_to_one():
    truth = torch.randn(500, 2, generator=stream("t"))
    twice = truth[:, [0, 0]] + 1e-3 * torch.randn(500, 2, generator=stream("n"))
    got = lacim.mean_correlation_coefficient(truth, twice)
    off = abs(np.corrcoef(truth.T)[0, 1])
    assert got == pytest.approx((1 + off) / 2, abs=0.01)  # a greedy match would score 1


@pytest.mark.covers("L5")
def test_independent_latents_score_near_zero_within_domains():  # spec 6.10
    draw = stream("independent")
    domain = torch.arange(5).repeat_interleave(2000)
    truth, guess = (10 * domain[:, None] + torch.randn(10_000, 2, generator=draw) for _ in "ab")
    assert lacim.mean_correlation_coefficient(truth, guess) > 0.97
    assert lacim.mean_correlation_coefficient(truth, guess, domain) < 0.05


@pytest.mark.covers("L5")
@pytest.mark.parametrize("domains", [3, 5])
def test_knowing_the_domain_alone_scores_high_pooled_on_the_official_simulation(
    domains,
):  # spec 6.10
    pooled, within, fair = [], [], []
    for seed in range(5):
        draw = stream("scm", seed)
        sim = lacim.simulate_scm("official", 1000, domains, generator=draw)
        noise = torch.randn(len(sim.s), 2, generator=draw)
        mean = torch.stack([sim.s[sim.domain == k].mean(dim=0) for k in range(domains)])
        guess = mean[sim.domain] + 1e-3 * noise
        pooled.append(lacim.mean_correlation_coefficient(sim.s, guess))
        within.append(lacim.mean_correlation_coefficient(sim.s, guess, sim.domain))
        sim = lacim.simulate_scm("fair", 1000, domains, generator=draw)
        mean = torch.stack([sim.s[sim.domain == k].mean(dim=0) for k in range(domains)])
        fair.append(lacim.mean_correlation_coefficient(sim.s, mean[sim.domain] + 1e-3 * noise))
    assert np.mean(pooled) > 0.97
    assert max(within) < 0.1
    assert np.mean(fair) < 0.85


def test_a_latent_that_is_constant_has_no_score():
    truth = torch.randn(10, 2, generator=stream("t"))
    guess = truth * torch.tensor([1.0, 0.0])
    with pytest.raises(ValueError, match=r"mean_correlation_coefficient: expected .*constant"):
        lacim.mean_correlation_coefficient(truth, guess)


# ---- folders ----


def make_nico(root):
    for k, place in enumerate(("cat/grass", "cat/snow", "dog/grass", "dog/snow")):
        folder = root / place
        folder.mkdir(parents=True)
        for i in range(k + 1):
            Image.new("RGB", (20, 10), (60 * k, 10 * i, 255)).save(folder / f"{i}.png")
    return root


@pytest.mark.covers("L6")
def test_nico_is_read_from_a_folder_of_classes_and_contexts(tmp_path):
    got = lacim.load_nico(make_nico(tmp_path), side=8)
    assert got.x.shape == (10, 3, 8, 8)
    assert got.y.tolist() == [0] * 3 + [1] * 7
    assert got.group.tolist() == [0] + [1] * 2 + [0] * 3 + [1] * 4
    assert (got.x[:, 2] == 1).all()
    assert got.x[-1, 0, 0, 0].item() == pytest.approx(180 / 255)


def test_a_missing_or_ill_laid_nico_folder_says_where_to_get_it_and_how_to_lay_it(tmp_path):
    says = r"load_nico: expected images in .*, got none\. Get it from .*https://nico.*<class>/<con"
    with pytest.raises(FileNotFoundError, match=says):
        lacim.load_nico(tmp_path / "nowhere")
    flat = tmp_path / "flat" / "cat"
    flat.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(flat / "1.png")
    with pytest.raises(FileNotFoundError, match=says):
        lacim.load_nico(tmp_path / "flat")
    root = make_nico(tmp_path / "broken")
    (root / "dog" / "snow" / "9.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"load_nico: expected an image, got .*9\.jpg"):
        lacim.load_nico(root)


def make_adni(root, rows="a,0,70,1.5\nb,1,65,0.5\nc,0,80,2.5\nd,1,75,3.5\n"):
    root.mkdir(exist_ok=True)
    (root / "subjects.csv").write_text("subject,label,age,tau\n" + rows)
    for k, name in enumerate("abcd"):
        np.save(root / f"{name}.npy", np.full((4, 5, 6), k / 4, dtype=np.float32))
    return root


@pytest.mark.covers("L6")
def test_adni_is_read_from_a_table_and_volumes_with_domains_by_age_or_tau(tmp_path):
    root = make_adni(tmp_path)
    by_age, by_tau = (lacim.load_adni(root, by=by, domains=2) for by in ("age", "tau"))
    assert by_age.x.shape == (4, 1, 4, 5, 6)
    assert by_age.x[:, 0, 0, 0, 0].tolist() == [0, 0.25, 0.5, 0.75]
    assert by_age.y.tolist() == [0, 1, 0, 1]
    assert by_age.group.tolist() == [0, 0, 1, 1]
    assert by_tau.group.tolist() == [0, 0, 1, 1]
    assert lacim.load_adni(root, by="age", domains=4).group.tolist() == [1, 0, 3, 2]


def test_a_missing_adni_folder_says_where_to_apply_and_how_to_lay_it_out(tmp_path):
    says = r"expected .*, got none\. Apply for it.*https://adni\.loni\.usc\.edu.*subjects\.csv with"
    with pytest.raises(FileNotFoundError, match=f"load_adni: {says}"):
        lacim.load_adni(tmp_path / "nowhere")
    root = make_adni(tmp_path)
    (root / "c.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"load_adni: expected a volume .*c\.npy.*Apply"):
        lacim.load_adni(root)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,0,old,1\n", r"expected numbers under label and age in .*subjects\.csv, got ValueError"),
        ("a,sick,70,1\n", r"expected numbers under label and age"),
        ("a,0,70,1\n", r"expected 3 subjects or more, got 1"),
        ("a\n", r"expected numbers under label and age"),
    ],
)
def test_a_table_of_subjects_that_lacks_something_is_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=f"load_adni: {message}"):
        lacim.load_adni(make_adni(tmp_path, rows))


def test_volumes_of_other_shape_or_range_are_refused(tmp_path):
    root = make_adni(tmp_path)
    np.save(root / "b.npy", np.zeros((4, 5, 7), dtype=np.float32))
    with pytest.raises(ValueError, match=r"load_adni: expected b\.npy of shape \(4, 5, 6\), got"):
        lacim.load_adni(root)
    np.save(root / "b.npy", np.full((4, 5, 6), 300, dtype=np.float32))
    with pytest.raises(ValueError, match=r"load_adni: expected a volume in \[0, 1\], got .*300"):
        lacim.load_adni(root)
    with pytest.raises(ValueError, match=r"load_adni: expected by to be one of 'age', 'tau', got"):
        lacim.load_adni(root, by="sex")
