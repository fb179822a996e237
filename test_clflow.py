"""Tests of the method against independent oracles. They also explain it a second time. Run: python -m pytest -q"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import clflow
import synth
from flows import Flow2D
from kit import InputError
from kit import rows as kit_rows
from kit.backbone import as_rows
from kit.processes import Processes
from kit.rows import Feed, GoodRows, Rows, codes, good_rows, origins, painted_rows, spread, touches
from kit.settings import CLFlowSettings


def randomised(flow: Flow2D) -> Flow2D:
    """Make every parameter random: a flow that starts as the identity would pass vacuously."""
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
    coupling = randomised(Flow2D(4, steps=1)).couplings[0]
    a = 20 * torch.randn(1, 2, 5, 5)
    s, t = coupling.s_and_t(a)
    assert torch.allclose(s, 2 * torch.tanh(0.1 * coupling.subnet(a)[:, :2]), atol=1e-6) and s.abs().max() > 1.5
    assert torch.equal(t, coupling.subnet(a)[:, 2:])


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
    """Without neighbours each position has its own Jacobian, so each term of the log-determinant has an oracle."""
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
    for cells, steepest in ((2, 0.05), (8, 0.1)):
        for _ in range(50):  # with random offsets of the lattice
            smooth = synth.perlin(256, 256, (cells, cells), rng)
            assert max(np.abs(np.diff(smooth, axis=k)).max() for k in (0, 1)) < steepest  # no seam where cells meet

    class Fixed:  # no rotation and no offset, so the lattice lies on every 8th pixel
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


def test_two_defects_are_one_painted_after_the_other(monkeypatch):
    """The foreground is computed only once, on the image without defects."""
    rng = np.random.default_rng(1)
    texture = rng.random((96, 96, 3), dtype=np.float32)
    for seed in range(10):
        together, mask, box = synth.synthesize(texture, np.random.default_rng(seed), defects=2)
        rng = np.random.default_rng(seed)
        one, first, _ = synth.synthesize(texture, rng, texture)
        both, second, _ = synth.synthesize(one, rng, texture)
        assert np.array_equal(together, both) and np.array_equal(mask, first | second)
        assert box == synth.bounding_box(mask)
    sought_on, foreground = [], synth.foreground
    monkeypatch.setattr(synth, "foreground", lambda image: sought_on.append(image) or foreground(image))
    disc = drawn()
    mask = synth.synthesize(disc, np.random.default_rng(0), defects=2)[1]
    assert len(sought_on) == 1 and sought_on[0] is disc
    assert mask[foreground(disc)].sum() == mask.sum() > 0


def test_synthesize_is_reproducible_and_varied():
    image, seeds = drawn(), range(10)
    first = [synth.synthesize(image, np.random.default_rng(s))[0] for s in seeds]
    again = [synth.synthesize(image, np.random.default_rng(s))[0] for s in seeds]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({a.tobytes() for a in first}) == len(first)


@pytest.mark.parametrize("rows, columns", [((20, 30), (33, 41)), ((0, 9), (0, 4)), ((57, 60), (70, 80))])
def test_a_defect_computed_around_its_mask_is_that_of_the_whole_image(rows, columns):
    mask = np.zeros((60, 80), dtype=bool)
    shape = rows[1] - rows[0], columns[1] - columns[0]
    mask[slice(*rows), slice(*columns)] = np.random.default_rng(0).random(shape) < 0.7
    part = synth.around(mask)
    assert mask[part].sum() == mask.sum() and mask[part].size < mask.size / 4
    image, everywhere = drawn((60, 80)), (slice(0, 60), slice(0, 80))
    for seed in range(20):  # the rim is softened by up to 1.5 pixels
        whole, found = (synth.opacity(m, np.random.default_rng(seed)) for m in (mask, mask[part]))
        assert np.allclose(whole[part], found, atol=1e-6)
        whole, found = (synth.shuffled(image, where, np.random.default_rng(seed)) for where in (everywhere, part))
        assert np.allclose(whole[part], found, atol=1e-6)


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
    z = torch.randn(5, 8)
    log_det = torch.randn(5)
    log_density = -0.5 * (z**2).sum(dim=1) - 4 * math.log(2 * math.pi) + log_det
    expected = -log_density / 8 - 0.5 * math.log(2 * math.pi)
    assert torch.allclose(clflow.energy(z, log_det), expected, atol=1e-6)


def cross_entropy(odds: float, label: float) -> float:
    p = 1 / (1 + math.exp(-odds))
    return -label * math.log(p) - (1 - label) * math.log(1 - p)


def test_classification_loss_by_hand_and_its_gradient():
    normal, anomalous = torch.tensor([-1.0, 2.0, -3.0]), torch.tensor([1.0], requires_grad=True)
    expected = sum(cross_entropy(odds, 0.05) for odds in (-1, 2, -3)) / 3 + cross_entropy(1, 0.95)
    loss = clflow.classification_loss(normal, anomalous, smoothing=0.1)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert anomalous.grad.item() < 0  # gradient descent raises the odds of anomalies
    far = torch.tensor([5.0], requires_grad=True)
    clflow.classification_loss(normal, far, smoothing=0.1).backward()
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


def test_tamed_energy_is_continuous_and_grows_like_the_logarithm():
    e = torch.tensor([-3.0, 0.5, 1.0, 1.0001, math.e, 1e8], requires_grad=True)
    tame = clflow.tamed(e)
    assert torch.allclose(tame, torch.tensor([-3.0, 0.5, 1.0, 1.0001, 2.0, 1 + 8 * math.log(10)]), atol=1e-5)
    tame.sum().backward()
    assert e.grad[:3].tolist() == [1, 1, 1] and e.grad[-1].item() == pytest.approx(1e-8)


class Given(torch.nn.Module):
    """A model with simple functions of the rows as latents and log-odds, instead of a flow and a classifier."""

    def __init__(self, **settings):
        super().__init__()
        given = {"classification_weight": 0.3, "smoothing": 0.2, "contrast_weight": 0.7, "temperature": 0.5}
        self.settings = CLFlowSettings(images=2, held_out=1, batch=80, **given | settings)

    def latents(self, rows):
        return 1.5 * rows, rows[:, 0]

    def log_odds(self, rows):
        return rows[:, 1] - 2 * rows[:, 2]


def test_losses_against_a_loop_over_rows(monkeypatch):
    torch.manual_seed(0)
    normal, anomalous = torch.randn(40, 4), 2 * torch.randn(3, 4)
    noise = torch.randn(3, 4)
    monkeypatch.setattr(torch, "randn_like", lambda rows: noise)
    found = clflow.Losses(Given())(normal, anomalous)

    def energy(row):
        return sum(float(1.5 * v) ** 2 for v in row) / 8 - float(row[0]) / 4

    def odds(row):
        return float(row[1] - 2 * row[2])

    nll = np.mean([energy(row) for row in normal[:3]])  # the flow sees as many normal rows as there are defect rows
    wrong = [cross_entropy(odds(row), 0.1) for row in normal]
    noised = [row + clflow.NOISE * move for row, move in zip(normal, noise, strict=False)]
    missed = [cross_entropy(odds(row), 0.9) for row in (*anomalous, *noised)]
    classification = np.mean(wrong) + np.mean(missed)
    info = []
    rivals = 2 * sum(math.exp(odds(row) / 0.5) for row in normal)  # of 80 rows, another process has 40
    for row in (*anomalous, *noised):
        similar = math.exp(odds(row) / 0.5)
        info.append(-math.log(similar / (similar + rivals)))
    parts = [found[name].item() for name in ("nll", "classification", "contrast")]
    assert parts == pytest.approx([nll, classification, np.mean(info)], rel=1e-4)
    assert found["loss"].item() == pytest.approx(nll + 0.3 * classification + 0.7 * np.mean(info), rel=1e-4)


@pytest.mark.parametrize("off", ["classification", "contrast"])
def test_a_proxy_task_of_weight_zero_is_left_out(off):
    rows = torch.randn(40, 4)
    found = clflow.Losses(Given(**{f"{off}_weight": 0}))(rows, rows[:3])
    assert off not in found and len(found) == 3


def test_the_contrast_raises_the_log_odds_of_defects_and_lowers_the_others():
    """One step of gradient descent, on the rows themselves, shows in which direction each kind moves."""
    torch.manual_seed(0)
    normal, anomalous = torch.randn(64, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    model = Given(classification_weight=0)
    clflow.Losses(model)(normal, anomalous)["contrast"].backward()

    def change(rows):
        return (model.log_odds(rows - 0.1 * rows.grad) - model.log_odds(rows)).mean()

    assert change(anomalous) > 0 > change(normal)


# ---------------------------------------------------------------- clflow.py: from features to rows, and back


def test_whitening_whitens_the_strongest_directions():
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(4, 4)).Q
    x = torch.randn(5000, 4) @ torch.diag(torch.tensor([1.0, 4, 2, 3])) @ directions + 3
    norm = clflow.Whitening(4, 2)
    norm.fit(x)
    y = norm(x)
    assert y.mean(dim=0).abs().max() < 1e-4 and (torch.cov(y.T) - torch.eye(2)).abs().max() < 0.05
    strongest = norm.weight[0] / norm.weight[0].norm()
    assert (strongest @ directions[1]).abs() > 0.99


def test_whitening_needs_float64_on_the_cpu_only():
    """Some devices (mps) have no float64. So a call that converts to float64 must also move the tensor to the CPU."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if kwargs.get("dtype") == torch.float64:
                assert kwargs.get("device") == torch.device("cpu"), func
            return func(*args, **kwargs)

    with Watch():
        clflow.Whitening(3, 2).fit(torch.randn(100, 3))


SETTINGS = CLFlowSettings(backbone="efficientnet_lite0", size=64, images=5, held_out=1, bank=40)
CHANNELS = 40 + 112


@pytest.fixture
def model() -> clflow.CLFlow:
    """A model that is fitted to given features of five images. Nothing is trained; the flow's parameters are random."""
    torch.manual_seed(0)
    model = clflow.CLFlow(SETTINGS).eval()
    model.full_precision = True
    randomised(model.flow)
    with torch.no_grad():
        for coupling in model.flow.couplings:
            coupling.log_scale.mul_(0.1)
    model.fit(as_rows(features(5)), origins(as_rows(features(5)), range(5)), 64)
    return model


def features(images: int) -> torch.Tensor:
    """(images, C, 8, 8)."""
    return torch.randn(images, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_row_is_seen_from_its_nearest_prototype_on_the_scale_there(model):
    bank, spacing = model.prototypes.bank + model.prototypes.centre, model.prototypes.spacing
    rows = torch.randn(20, CHANNELS)
    expected = []
    for row in rows:
        nearest = (bank - row).norm(dim=1).argmin()
        expected.append((row - bank[nearest]) / spacing[nearest])
    assert torch.allclose(model.residual(rows), torch.stack(expected), atol=1e-4)
    model.settings = replace(model.settings, local=False)
    assert torch.equal(model.residual(rows), rows)


def test_every_position_keeps_its_place_from_features_to_energies(monkeypatch, model):
    """Each position alone, without its neighbours and its batch, gives the same energies."""
    x = features(3)
    monkeypatch.setattr(model, "features", lambda images: x)
    code = model.encode(torch.empty(3, 3, 64, 64))
    flow, distance, odds = model.expert_energies(code)
    assert flow.shape == distance.shape == odds.shape == (3, 8, 8) and flow.std() > 0.01
    for image, y, column in itertools.product(range(3), range(8), range(8)):
        r = model.residual(x[image, :, y, column][None])
        row = model.whitening(r)
        assert torch.allclose(code[image, :-1, y, column], row[0], atol=1e-3)
        assert torch.allclose(distance[image, y, column], r.norm(), atol=1e-3)
        alone = clflow.tamed(clflow.energy(*model.latents(row)))
        assert torch.allclose(flow[image, y, column], alone[0], atol=1e-3)
        assert torch.allclose(odds[image, y, column], model.log_odds(row)[0], atol=1e-3)


@pytest.mark.parametrize(
    "local, classifies, shares",
    [
        (True, True, [1 / 4, 1 / 4, 1 / 2]),
        (True, False, [1 / 2, 1 / 2]),
        (False, True, [1 / 2, 1 / 2]),
        (False, False, [1]),
    ],
)
def test_the_map_has_the_experts_that_there_are(local, classifies, shares):
    """Flow; distance, if there are prototypes; classifier, if a loss trains it."""
    weight = float(classifies)
    model = clflow.CLFlow(replace(SETTINGS, local=local, classification_weight=weight, contrast_weight=weight))
    energies = model.expert_energies(torch.randn(2, CHANNELS // 2 + 1, 8, 8))
    assert model.shares == shares and len(energies) == len(model.levels) == len(shares)
    one_sided = clflow.CLFlow(replace(SETTINGS, local=local, classification_weight=0.0))
    assert one_sided.classifier is not None  # the contrast trains it


def test_rows_are_seen_without_the_prototypes_of_their_own_image(model):
    """The oracle is a loop over a bank without the image's prototypes. If no other image is in the bank, this is
    refused."""
    bank, spacing = model.prototypes.bank + model.prototypes.centre, model.prototypes.spacing
    origin = model.prototypes.origin.clone()
    rows, images = as_rows(features(5)), origins(as_rows(features(5)), range(5))
    expected = []
    for row, image in zip(rows, images, strict=True):
        others = origin != image
        nearest = (bank[others] - row).norm(dim=1).argmin()
        expected.append((row - bank[others][nearest]) / spacing[others][nearest])
    seen = torch.cat(list(model.training_residuals(rows, images)))
    assert torch.allclose(seen, torch.stack(expected), atol=1e-3)
    with_own = model.residual(rows)
    assert (with_own.norm(dim=1) < 1e-3).sum() == len(bank) and seen.norm(dim=1).min() > 0.05
    model.prototypes.origin.fill_(0)
    with pytest.raises(InputError, match="copies of each other"):
        list(model.training_residuals(rows, torch.zeros(len(rows), dtype=torch.long)))


def test_the_feed_has_a_good_image_s_map_if_it_has_all_of_its_rows(monkeypatch, model):
    """It equals the map of the image itself without its own prototypes. It is zero outside the region of interest."""
    model.set_roi(torch.arange(64).repeat(64, 1) >= 16)  # six of the eight columns count
    x = features(5)
    rows, inside = spread(iter(x.half().split(2)), 5, model, 64, torch.Generator().manual_seed(0))
    copies = features(5).permute(0, 2, 3, 1)[:, 0, 2:].flatten(0, 1).half()  # six rows of each
    images = torch.cat((origins(rows, range(5)), origins(copies, range(5))))
    normal = GoodRows(torch.cat((rows, copies)), images, len(rows), inside)
    feed = Feed(model, normal, Rows(rows[:4], torch.arange(4)))
    for number in range(5):
        expected = model.code_map(x[number : number + 1], excluded=torch.tensor([number]))
        code = feed.stored_code_map(number)
        assert torch.allclose(code[..., 2:], expected[..., 2:], atol=0.01) and not code[..., :2].any()
    some, inside = spread([x.half()], 5, model, 40, torch.Generator())  # of 48
    part = Feed(model, GoodRows(some, origins(some, range(5)), len(some), inside), Rows(rows[:4], torch.arange(4)))
    assert len(some) == 5 * 40 and part.stored_code_map(0) is None


def test_copies_of_few_photographs_are_refused(model):
    photographs = torch.randn(2, 10, CHANNELS)  # fewer positions than prototypes
    rows = photographs.repeat(5, 1, 1).flatten(0, 1)
    with pytest.raises(InputError, match="copies of each other"):
        model.fit(rows, origins(rows, range(10)), 64)


def test_a_single_pixel_touches_its_position():
    mask = torch.zeros(2, 1, 32, 32)
    mask[0, 0, 9, 17] = 1
    mask[1, 0, 0:5, 31] = 1
    assert touches(mask, (8, 8)).flatten().nonzero()[:, 0].tolist() == [2 * 8 + 4, 64 + 7, 64 + 15]


class Painted:
    """Two images instead of files and loaders. A defect is painted on the second one, then one on the first."""

    files = ["a", "b"]
    processes = Processes()

    def normal(self):
        yield torch.zeros(2, 3, 64, 64)

    def copy_numbers(self):
        return range(2)

    def copies(self):
        yield torch.ones(2, 3, 64, 64)

    def painted(self, count):
        mask = torch.zeros(1, 1, 64, 64)
        mask[0, 0, :8, :20] = 1  # three positions
        for number in (1, 0):
            yield torch.full((1, 3, 64, 64), number + 2.0), mask, np.array([number])

    def image_index(self, number):
        return number % 2


def test_feed_gives_rows_of_good_images_their_copies_and_defects(monkeypatch, model):
    x = torch.cat((features(2), features(2) + 9))  # images 0 and 1 are good, 2 and 3 have defects
    monkeypatch.setattr(model, "features", lambda images: x[images[:, 0, 0, 0].long()])
    monkeypatch.setattr(kit_rows, "ROWS", 101)  # so fifty rows per image
    normal = good_rows(model, Painted())
    assert normal.image_indices.tolist() == 50 * [0] + 50 * [1] + 11 * [0] + 11 * [1]  # copies: a quarter
    assert torch.isin(normal.y[100:], as_rows(x[1:2]).half()).all()  # copies have the features of image 1 here
    feed = Feed(model, normal, painted_rows(model, Painted(), 300))
    assert len(feed.normal) == 122 and feed.normal.dtype == torch.float16

    # The rows of defects are ordered by image. Each is computed without the prototypes of its own image.
    three_of_each = torch.cat([x[number + 2, :, 0, :3].T for number in (0, 1)])
    expected = codes(model, Rows(three_of_each, torch.tensor([0, 0, 0, 1, 1, 1]))).float()
    assert torch.allclose(feed.anomalous.float(), expected, rtol=1e-2, atol=1e-2)
    for normal, anomalous in (feed.draw(30) for _ in range(5)):
        assert normal.shape == (30, CHANNELS // 2) and len(anomalous) == 8
        assert all((feed.anomalous[:, :-1].float() == row).all(dim=1).any() for row in anomalous)


def test_a_part_of_the_feed_has_no_row_of_other_images(monkeypatch, model):
    x = features(4)
    monkeypatch.setattr(model, "features", lambda images: x[images[:, 0, 0, 0].long()])
    feed = Feed(model, good_rows(model, Painted()), painted_rows(model, Painted(), 300))
    first = feed.subset(torch.tensor([True, False]))
    normal, anomalous = first.draw(500)
    mine = torch.cat((feed.normal[:64], feed.normal[128:144])).float()  # rows of the first image, and of its copy
    assert torch.isin(normal, mine).all() and torch.isin(anomalous, feed.anomalous[:3].float()).all()
    assert not torch.isin(feed.draw(500)[0], mine).all()  # the whole feed is unchanged
