"""The method's tests, against independent oracles: its second explanation. python -m pytest -q"""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import clflow
import synth
from flows import Flow2D


def randomised(flow: Flow2D) -> Flow2D:
    """Every parameter random: a flow that starts as the identity would pass vacuously."""
    with torch.no_grad():
        for p in flow.parameters():
            p.normal_(0, 0.3)
    return flow


# ---------------------------------------------------------------- flows.py


@pytest.mark.parametrize("channels, kernels, ratio", [(4, (3,), 1.0), (5, (3, 1), 0.5), (2, (1,), 2.0)])
def test_flow_inverse_undoes_forward(channels, kernels, ratio):
    torch.manual_seed(0)
    flow = randomised(Flow2D(channels, steps=4, kernel_sizes=kernels, hidden_ratio=ratio)).double()
    x = torch.randn(2, channels, 5, 4, dtype=torch.float64)
    z, _ = flow(x)
    assert not torch.allclose(z, x, atol=0.1)
    assert torch.allclose(flow.inverse(z), x, atol=1e-9)


def test_log_scale_is_softly_clamped_by_the_hyperbolic_tangent():
    step = randomised(Flow2D(4, steps=1)).steps[0]
    a = 20 * torch.randn(1, 2, 5, 5)
    s, t = step.scale_and_shift(a)
    assert torch.allclose(s, 2 * torch.tanh(0.1 * step.subnet(a)[:, :2]), atol=1e-6) and s.abs().max() > 1.5
    assert torch.equal(t, step.subnet(a)[:, 2:])


@pytest.mark.parametrize("channels, kernels", [(4, (3,)), (5, (3, 1))])
def test_flow_log_determinant_is_that_of_the_autograd_jacobian(channels, kernels):
    torch.manual_seed(1)
    flow = randomised(Flow2D(channels, steps=3, kernel_sizes=kernels)).double()
    x = torch.randn(1, channels, 3, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v)[0], x).reshape(x.numel(), x.numel())
    log_det = flow(x)[1]
    assert log_det.shape == (1, 3, 4)
    assert log_det.sum().item() == pytest.approx(torch.linalg.slogdet(jacobian).logabsdet.item(), abs=1e-9)


def test_flow_log_determinant_per_position_with_1x1_kernels():
    """Without neighbours each position has a Jacobian of its own, so that even the single terms have an oracle."""
    torch.manual_seed(2)
    flow = randomised(Flow2D(4, steps=3, kernel_sizes=(1,))).double()
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    log_det = flow(x)[1]
    for i in range(2):
        for j in range(2):
            pixel = x[:, :, i : i + 1, j : j + 1]
            jacobian = torch.autograd.functional.jacobian(lambda v: flow(v)[0], pixel).reshape(4, 4)
            assert log_det[0, i, j].item() == pytest.approx(torch.linalg.slogdet(jacobian).logabsdet.item(), abs=1e-9)


@pytest.mark.parametrize(
    "channels, kernels, count",
    [((64, 128, 256), (3,), 4_657_408), ((64, 128, 256), (3, 1), 2_593_024), ((256, 512, 1024), (3, 1), 41_337_856)],
)
def test_flow_parameter_counts_match_fastflow(channels, kernels, count):
    with torch.device("meta"):
        flows = [Flow2D(c, 8, kernels) for c in channels]
    assert sum(p.numel() for flow in flows for p in flow.parameters()) == count


def test_flow_starts_as_a_permutation_with_zero_log_determinant():
    x = torch.randn(2, 6, 3, 3).contiguous(memory_format=torch.channels_last)
    z, log_det = Flow2D(6)(x)
    assert z.is_contiguous(memory_format=torch.channels_last)  # or the next convolution would have to reorder it
    assert torch.equal(z.sort(dim=1).values, x.sort(dim=1).values) and not log_det.any()


# ---------------------------------------------------------------- synth.py


def test_perlin_is_zero_on_its_lattice_and_smooth_between():
    rng = np.random.default_rng(0)
    noise = np.concatenate([synth.perlin(96, 160, (4, 8), rng).ravel() for _ in range(20)])
    assert abs(noise.mean()) < 0.05 and 0.2 < noise.std() < 0.5 and np.abs(noise).max() <= 1.0 + 1e-9
    smooth = synth.perlin(256, 256, (2, 2), rng)
    assert max(np.abs(np.diff(smooth, axis=k)).max() for k in (0, 1)) < 0.05  # no seam where cells meet

    class Fixed:  # no rotation and no offset: the lattice then lies on every 8th pixel
        def uniform(self, low, high, size=None):
            return np.random.default_rng(3).uniform(low, high, size) if size else 0.0

    on_lattice = synth.perlin(32, 32, (4, 4), Fixed())[::8, ::8]
    assert np.abs(on_lattice).max() < 1e-9


def test_perlin_mask_is_a_few_percent_of_the_image():
    rng = np.random.default_rng(1)
    share = np.mean([(synth.perlin(64, 64, tuple(2 ** rng.integers(0, 6, 2)), rng) > 0.5).mean() for _ in range(200)])
    assert 0.02 < share < 0.15


def drawn(shape=(64, 80)) -> np.ndarray:
    """A grey disc on white: an object on a plain background."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    disc = np.hypot(y - shape[0] / 2, x - shape[1] / 2) < 20
    return np.where(disc[..., None], [0.3, 0.35, 0.4], 0.95).astype(np.float32)


def test_synthesize_agrees_with_its_mask_and_box():
    image = drawn()
    for seed in range(50):
        anomalous, mask, (y0, x0, y1, x1) = synth.synthesize(image, np.random.default_rng(seed))
        assert anomalous.dtype == np.float32 and 0 <= anomalous.min() and anomalous.max() <= 1
        assert mask.any() and np.array_equal(anomalous[~mask], image[~mask])
        assert np.abs(anomalous - image)[mask].mean() > 0.03
        assert mask[y0:y1, x0:x1].sum() == mask.sum()
        assert mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()


def test_synthesize_is_reproducible_and_varied():
    image, seeds = drawn(), range(10)
    first = [synth.synthesize(image, np.random.default_rng(s))[0] for s in seeds]
    again = [synth.synthesize(image, np.random.default_rng(s))[0] for s in seeds]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({a.tobytes() for a in first}) == len(first)


def test_synthesize_makes_thin_and_large_defects():
    areas = [synth.synthesize(drawn((128, 128)), np.random.default_rng(s))[1].sum() for s in range(60)]
    assert min(areas) < 30 and max(areas) > 300


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_synthesize_ends_on_featureless_images(value):
    anomalous, mask, _ = synth.synthesize(np.full((32, 48, 3), value, np.float32), np.random.default_rng(0))
    assert mask.any() and (anomalous != value).any()


def test_defects_of_grey_images_are_grey():
    grey = drawn().mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    for seed in range(20):
        assert np.ptp(synth.synthesize(grey, np.random.default_rng(seed))[0], axis=-1).max() < 1e-6


def test_foreground_finds_an_object_and_leaves_textures_alone():
    image = drawn()
    truth = (image != image[0, 0]).any(axis=-1)
    assert (synth.foreground(image) == truth).mean() > 0.98
    assert (synth.foreground(1 - image) == truth).mean() > 0.98  # bright on dark as well as dark on bright
    assert synth.foreground(np.random.default_rng(0).random((64, 64, 3), dtype=np.float32)).all()


# ---------------------------------------------------------------- clflow.py: energies and losses by hand


def test_energy_is_the_gaussian_nll_per_dimension():
    torch.manual_seed(0)
    z, log_det = torch.randn(2, 5, 3, 3), torch.randn(2, 3, 3)
    exact = -torch.distributions.Normal(0, 1).log_prob(z).mean(dim=1) - log_det / 5
    assert torch.allclose(clflow.energy(z, log_det) + 0.5 * math.log(2 * math.pi), exact, atol=1e-6)


def test_classification_loss_by_hand_and_its_gradient():
    normal, anomalous = torch.tensor([0.0, 2.0]), torch.tensor([5.0], requires_grad=True)
    middle = torch.tensor(6.0)

    def bce(e, label):
        p = 1 / (1 + math.exp(-(e - 6) / 2))
        return -label * math.log(p) - (1 - label) * math.log(1 - p)

    expected = (bce(0, 0.05) + bce(2, 0.05)) / 4 + bce(5, 0.95) / 2
    loss = clflow.classification_loss(normal, anomalous, middle, smoothing=0.1, temperature=2.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert anomalous.grad.item() < 0  # descent raises the anomaly's energy
    far = torch.tensor([26.0], requires_grad=True)
    clflow.classification_loss(normal, far, middle, 0.1, 2.0).backward()
    assert far.grad.item() > 0  # beyond the smoothed label it is not pushed any further


def test_info_nce_by_hand():
    loss = clflow.info_nce(torch.tensor([2.0]), torch.tensor([[1.0, 0.0]]), temperature=0.5)
    assert loss.item() == pytest.approx(-math.log(math.exp(4) / (math.exp(4) + math.exp(2) + 1)), rel=1e-5)
    anomalous = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = clflow.info_nce(anomalous, torch.tensor([0.0, 0.5]), temperature=1.0)  # the same negatives for both
    each = [-math.log(math.exp(a) / (math.exp(a) + 1 + math.exp(0.5))) for a in (1, 2)]
    assert loss.item() == pytest.approx(sum(each) / 2, rel=1e-5)
    loss.backward()
    assert (anomalous.grad < 0).all()  # descent raises the energies of anomalies


def test_contrast_cosine_pushes_the_negative_box_away_and_pulls_globally():
    box = torch.tensor([[1.0, 0.0]], requires_grad=True)
    negative = torch.tensor([[3.0, 3.0]], requires_grad=True)
    pull = torch.tensor([[0.0, 2.0]], requires_grad=True)
    loss = clflow.contrast_cosine(box, negative, pull, temperature=1.0)
    cosine = math.sqrt(0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(cosine)), rel=1e-5)
    loss.backward()

    away, nearer = (F.cosine_similarity(box, x - 0.1 * x.grad).item() for x in (negative, pull))
    assert away < cosine and nearer > 0


def test_tamed_energy_is_continuous_and_grows_like_the_logarithm():
    e = torch.tensor([-3.0, 0.5, 1.0, 1.0001, math.e, 1e8], requires_grad=True)
    tame = clflow.tamed(e)
    assert torch.allclose(tame, torch.tensor([-3.0, 0.5, 1.0, 1.0001, 2.0, 1 + 8 * math.log(10)]), atol=1e-5)
    tame.sum().backward()
    assert e.grad[:3].tolist() == [1, 1, 1] and e.grad[-1].item() == pytest.approx(1e-8)


def test_whitening_whitens():
    torch.manual_seed(0)
    mix = torch.diag(torch.arange(1.0, 5.0)) @ torch.linalg.qr(torch.randn(4, 4)).Q
    x = torch.randn(5000, 4) @ mix + 3
    norm = clflow.Whitening(4)
    norm.fit(x)
    y = norm(x.T.reshape(1, 4, 50, 100)).flatten(2)[0]
    assert y.mean(dim=1).abs().max() < 1e-4 and (torch.cov(y) - torch.eye(4)).abs().max() < 0.05


def test_whitening_needs_float64_on_the_cpu_only():
    """Some devices (mps) do not have it: whatever becomes float64 has to be sent to the CPU by the same call."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if kwargs.get("dtype") == torch.float64:
                assert kwargs.get("device") == torch.device("cpu"), func
            return func(*args, **kwargs)

    with Watch():
        clflow.Whitening(3).fit(torch.randn(100, 3))


# ---------------------------------------------------------------- clflow.py: which positions a loss sees


def test_positions_are_sampled_per_image_from_those_marked():
    where = torch.zeros(3, 50, dtype=torch.bool)
    where[0, 7], where[1, :3], where[2, ::2] = True, True, True
    places = clflow.sample(where, 200)
    assert [sorted(set(row)) for row in places.tolist()] == [[7], [0, 1, 2], list(range(0, 50, 2))]


def test_half_of_the_normal_sample_is_from_the_worst_twentieth():
    e = torch.arange(400.0).repeat(2, 1)
    drawn = clflow.sample_normal(e)
    assert drawn.shape == (2, 256)
    assert drawn[:, 128:].min() >= 380 and drawn[:, :128].min() < 100


def test_a_single_pixel_touches_its_position_and_spoils_its_neighbours():
    mask = torch.zeros(1, 1, 32, 32)
    mask[0, 0, 9, 17] = 1
    touched, beside = clflow.touched_positions(mask, (8, 8))
    assert touched.nonzero().tolist() == [[0, 2, 4]]
    assert (~beside).nonzero().tolist() == [[0, y, x] for y in (1, 2, 3) for x in (3, 4, 5)]


def test_bounding_box_of_two_blobs_holds_both_and_what_lies_between():
    where = torch.zeros(2, 7, 9, dtype=torch.bool)
    where[0, 1, 2], where[0, 4, 6] = True, True  # two blobs: rows and columns without any of them lie in between
    where[1, 3, 3] = True
    boxes = clflow.bounding_boxes(where)
    expected = torch.zeros_like(boxes)
    expected[0, 1:5, 2:7], expected[1, 3, 3] = True, True
    assert torch.equal(boxes, expected)


# ---------------------------------------------------------------- clflow.py: all losses, position by position


class Given(torch.nn.Module):
    """A model whose latents are given, in place of a backbone and flows."""

    def __init__(self, latents: list, contrast: str):
        super().__init__()
        self.given = latents
        self.settings = {"classification_weight": 0.3, "contrast_weight": 0.7, "contrast": contrast}
        self.settings |= {"smoothing": 0.2, "temperature": 0.5}

    def latents(self, images):
        return self.given


def tame(e: float) -> float:
    return e if e <= 1 else 1 + math.log(e)


def cross_entropy(e: float, middle: float, label: float) -> float:
    p = 1 / (1 + math.exp(-(e - middle) / 0.5))
    return -label * math.log(p) - (1 - label) * math.log(1 - p)


@pytest.mark.parametrize("contrast", ["energy", "cosine"])
def test_losses_against_a_loop_over_positions(monkeypatch, contrast):
    """Three x+, two x- made from the first two; a scratch of one pixel, and two blobs. What the sampling drew is
    recorded; everything else is computed here anew, one position at a time."""
    torch.manual_seed(0)
    draws, sample = [], clflow.sample

    def recording(where, count):
        draws.append(sample(where, count))
        assert all(where[i, place] for i, row in enumerate(draws[-1].tolist()) for place in row)
        return draws[-1]

    monkeypatch.setattr(clflow, "sample", recording)
    monkeypatch.setattr(clflow, "POSITIONS", 5)
    monkeypatch.setattr(clflow, "BOX_POSITIONS", 6)
    mask = torch.zeros(2, 1, 24, 24)
    mask[0, 0, 9, 13] = 1
    mask[1, 0, 0:4, 0:4], mask[1, 0, 13:20, 16:20] = 1, 1
    scales = [(1.5 * torch.randn(5, 4, side, side), torch.randn(5, side, side)) for side in (6, 3)]
    found = clflow.Losses(Given(scales, contrast))(torch.empty(5, 3, 24, 24), mask)

    expected = np.zeros(3)
    for z, log_det in scales:
        side, step = z.shape[2], 24 // z.shape[2]
        positions = list(itertools.product(range(side), repeat=2))

        def energy(image, place, z=z, log_det=log_det, positions=positions):
            y, x = positions[place]
            return sum(float(v) ** 2 for v in z[image, :, y, x]) / 8 - float(log_det[image, y, x]) / 4

        def is_touched(pair, y, x, step=step, side=side):
            inside = 0 <= y < side and 0 <= x < side
            return inside and bool(mask[pair, 0, step * y : step * (y + 1), step * x : step * (x + 1)].any())

        def is_near(pair, y, x, is_touched=is_touched):
            return any(is_touched(pair, y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1))

        terms = [energy(image, place) for image in range(3) for place in range(len(positions))]
        for pair, (place, (y, x)) in itertools.product(range(2), enumerate(positions)):
            if not is_near(pair, y, x):
                terms.append(tame(energy(3 + pair, place)))
        nll = np.mean(terms)

        touched, anywhere, hard = (draws.pop(0).tolist() for _ in range(3))
        smooth_normal, smooth_anomalous, info = [], [], []
        for pair in range(2):
            normal = [tame(energy(pair, place)) for place in range(len(positions))]
            middle = np.mean(normal) + 4 * np.std(normal, ddof=1)
            worst = sorted(normal, reverse=True)[: math.ceil(len(normal) / 20)]
            reference = [normal[place] for place in anywhere[pair]] + [worst[place] for place in hard[pair]]
            anomalous = [tame(energy(3 + pair, place)) for place in touched[pair]]
            assert all(is_touched(pair, *positions[place]) for place in touched[pair])
            smooth_normal += [cross_entropy(e, middle, 0.1) for e in reference]
            smooth_anomalous += [cross_entropy(e, middle, 0.9) for e in anomalous]
            for e in anomalous:
                rivals = sum(math.exp(n / 0.5) for n in reference)
                info.append(-math.log(math.exp(e / 0.5) / (math.exp(e / 0.5) + rivals)))
        if contrast == "cosine":
            inside, elsewhere = (draws.pop(0).tolist() for _ in range(2))
            rows = z.flatten(2)
            box = [rows[pair, :, place] for pair in range(2) for place in inside[pair]]
            negatives = [rows[3 + pair, :, place] for pair in range(2) for place in inside[pair]]
            pulls = [rows[pair, :, place] for pair in range(2) for place in elsewhere[pair]]
            info = []
            for anchor, pull in zip(box, pulls, strict=True):
                similar = math.exp(F.cosine_similarity(anchor, pull, dim=0) / 0.5)
                rivals = sum(math.exp(F.cosine_similarity(anchor, other, dim=0) / 0.5) for other in negatives)
                info.append(-math.log(similar / (similar + rivals)))
        expected += np.array([nll, (np.mean(smooth_normal) + np.mean(smooth_anomalous)) / 2, np.mean(info)]) / 2
    assert not draws
    parts = [found[name].item() for name in ("nll", "classification", "contrast")]
    assert parts == pytest.approx(expected.tolist(), rel=1e-4)
    assert found["loss"].item() == pytest.approx(expected @ [1, 0.3, 0.7], rel=1e-4)


def test_nll_leaves_out_what_lies_near_a_defect():
    normal, anomalous = torch.tensor([[0.0, 1.0]]), torch.tensor([[math.e, 99.0]])
    beside = torch.tensor([[True, False]])
    assert clflow.nll_loss(normal, anomalous, beside).item() == pytest.approx((0 + 1 + 2) / 3)


def test_synthetic_defects_raise_their_energies_and_the_rest_sinks():
    """One step down the whole loss, on latents themselves: the direction in which each kind of position goes."""
    torch.manual_seed(0)
    z = torch.randn(2, 8, 8, 8)
    z.requires_grad_(True)
    mask = torch.zeros(1, 1, 32, 32)
    mask[0, 0, 8:16, 8:16] = 1
    losses = clflow.Losses(Given([(z, torch.zeros(2, 8, 8))], "energy"))
    losses(torch.empty(0), mask)["loss"].backward()
    change = clflow.energy(z - 0.1 * z.grad, torch.zeros(2, 8, 8)) - clflow.energy(z, torch.zeros(2, 8, 8))
    assert change[1, 2:4, 2:4].mean() > 0 > change[0].mean() and change[1, 5:].mean() < 0
