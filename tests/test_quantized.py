from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import call, refuse
from PIL import Image
from torch import fx, nn

import evaluate
import train
from kit import data, folders, good, quantized
from kit.backbone import BACKBONES
from kit.command_line import training_options
from kit.good import camera_copy
from kit.images import read_image, to_tensor
from methods import load

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not quantized.is_fast(CPU), reason="this processor has no VNNI")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with random weights of a ResNet18, whose batch norms keep the activations in a usual range."""
    torch.manual_seed(0)
    backbone = BACKBONES["resnet18"]()
    state = backbone.make().state_dict()
    for name, value in state.items():
        if name.endswith("running_var"):
            value.copy_(torch.rand_like(value) + 2)
        if name.endswith("bn1.bias"):
            value.copy_(0.1 * torch.randn_like(value))
    file = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(state, file)
    return file


@pytest.fixture(scope="module")
def rounded_run(category, weights, tmp_path_factory):
    """A run of the nearest neighbour whose backbone computes in int8."""
    out = tmp_path_factory.mktemp("rounded") / "run"
    options = [
        "--method",
        "nearest",
        "--backbone",
        "resnet18",
        "--weights",
        weights,
        "--size",
        96,
        "--bank",
        100,
        "--int8",
    ]
    call(train.main, "--data", category, "--out", out, *options)
    return out


def small_net() -> fx.GraphModule:
    """One convolution and a ReLU."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval().requires_grad_(False)
    return fx.symbolic_trace(net)


def test_a_convolution_in_int8_is_the_sum_of_integers():
    """Oracle: the same convolution by hand, in NumPy's integers."""
    net, x = small_net(), torch.rand(2, 3, 64, 64)
    (scale_in, zero_in), (scale_out, zero_out) = quantized.scales_of(net, [x]).tolist()
    weight, bias = net.get_submodule("0").weight.numpy(), net.get_submodule("0").bias.numpy()
    scales = np.abs(weight).max(axis=(1, 2, 3)) / 127.5
    whole_weight = np.clip(np.rint(weight / scales[:, None, None, None]), -128, 127).astype(np.int64)
    whole = np.clip(np.rint(x.numpy() / scale_in) + zero_in, 0, 255).astype(np.int64) - int(zero_in)
    windows = np.lib.stride_tricks.sliding_window_view(whole, (3, 3), axis=(2, 3))
    sums = np.einsum("bchwij,ocij->bohw", windows, whole_weight)
    result = sums * scales[:, None, None] * scale_in + bias[:, None, None]
    expected = np.clip(np.rint(result / scale_out) + zero_out, zero_out, 255) - zero_out
    for make in (quantized.as_int8, quantized.as_rounded):
        found = make(net, torch.tensor([[scale_in, zero_in], [scale_out, zero_out]]))(x).numpy() / scale_out
        off = np.abs(found - expected)
        assert off.max() < 1.01 and (off > 0.01).mean() < 1e-3  # halves may be rounded either way
    assert zero_out == 0 and expected.max() > 200


def test_corrected_biases_reduce_the_error(weights):
    torch.manual_seed(0)
    backbone, images = BACKBONES["resnet18"](), torch.rand(8, 3, 96, 128)
    backbone.load_imagenet(str(weights))
    inputs = backbone.normalised(images)
    exact = [x.clone() for x in backbone.net(inputs).values()]
    scales = quantized.scales_of(backbone.net, [inputs])
    errors = []
    for _ in range(2):
        rounded = quantized.as_int8(backbone.net, scales)(inputs).values()
        errors.append(sum(((x - y) ** 2).sum() for x, y in zip(rounded, exact, strict=True)))
        quantized.correct_biases(backbone.net, scales, inputs)
    assert errors[1] < 0.8 * errors[0]


def test_features_in_int8_are_close_to_float32_and_depend_on_the_image_alone(weights):
    backbone, images = BACKBONES["resnet18"](), torch.rand(4, 3, 96, 128)
    backbone.load_imagenet(str(weights))
    exact = backbone.features(images)
    backbone.quantize([images[:2], images[2:]])
    rounded = backbone.features(images)
    error = (rounded - exact).norm() / (exact - exact.mean(dim=(0, 2, 3), keepdim=True)).norm()
    assert 0.001 < error < 0.2
    assert torch.equal(torch.cat([backbone.features(image[None]) for image in images]), rounded)


def test_a_checkpoint_gives_the_same_scores_and_other_machines_nearly_the_same(rounded_run, category, monkeypatch):
    files = folders.list_images(category / "test" / "good")
    model = load(rounded_run / "model.pt")
    assert model.backbone.has_int8 and not model.precision_warning()
    scores = evaluate.scores_and_peaks(model, files)
    assert np.array_equal(evaluate.scores_and_peaks(load(rounded_run / "model.pt"), files), scores)
    monkeypatch.setattr(quantized, "is_fast", lambda device: False)
    elsewhere = evaluate.scores_and_peaks(load(rounded_run / "model.pt"), files)
    assert 0 < np.abs(elsewhere / scores - 1).max() < 0.05
    monkeypatch.setattr(quantized, "IS_AVAILABLE", False)
    assert "int8" in load(rounded_run / "model.pt").precision_warning()


def test_an_export_rounds_as_the_detector_does(rounded_run, category, tmp_path, capsys):
    file = tmp_path / "model.pt2"
    call(evaluate.main, rounded_run, "--export", file)
    said = capsys.readouterr().out
    assert "could not be converted" not in said
    program = torch.export.load(file).module()
    model = load(rounded_run / "model.pt")
    # The threshold is converted by the ratio of the scores of camera copies.
    copies = []
    for number, path in enumerate(evaluate.some_good(category)):
        copies.append(camera_copy(read_image(path, model.shape), np.random.default_rng(number)))
    copies = to_tensor(np.stack(copies))
    ratio = (program(copies)[1].sum() / model(copies)[1].sum()).item()
    assert abs(ratio - 1) > 5e-3
    expected = ratio * model.thresholds().score
    assert float(said.split("thresholds: ")[1].split()[0]) == pytest.approx(expected, rel=2e-3)
    images = data.read_batch(folders.list_images(category / "test" / "good")[:2], model.shape)
    scores = model(images)[1]
    model.for_export()
    assert not model.backbone.has_int8
    exported = program(images)[1]
    assert (exported - model(images)[1]).abs().max() < 1e-3 * exported.max()
    assert (exported / scores - 1).abs().max() < 0.05


def test_large_images_are_measured_for_int8_in_parts(tmp_path, monkeypatch):
    """All of a large image at once would need gigabytes. The parts lie in the region of interest, here a white one."""
    for number in range(3):
        photo = np.zeros((256, 512, 3), np.uint8)
        photo[128:, :64] = 255
        Image.fromarray(photo).save(tmp_path / f"{number}.png")
    seen = []
    backbone = SimpleNamespace(can_quantize=True, quantize=lambda batches: seen.extend(batches))
    monkeypatch.setattr(good, "is_fast", lambda device: True)
    for shape, expected, parts in (((1024, 2048), (512, 512), 6), ((512, 1024), (512, 1024), 3)):
        roi = torch.zeros(shape, dtype=torch.bool)
        roi[-200:, :200] = True
        settings = SimpleNamespace(int8=True, seed=0)
        model = SimpleNamespace(settings=settings, backbone=backbone, device=None, shape=shape, roi=roi)
        good.quantize_backbone(model, sorted(tmp_path.iterdir()))
        images = torch.cat(seen)
        assert images.shape == (parts, 3, *expected) and (images.amax(dim=(1, 2, 3)) > 0.9).all()
        seen.clear()


def test_a_clflow_computes_in_int8_by_default(tiny, weights, tmp_path, capsys):
    """Other tests train on an EfficientNet-Lite0, which has no int8."""
    options = ["--weights", weights, "--size", 96, "--epochs", 1, "--batch", 64]
    call(train.main, "--data", tiny, "--out", tmp_path / "run", *options)
    assert "the backbone computes in int8" in capsys.readouterr().out
    model = load(tmp_path / "run" / "model.pt")
    assert model.settings.backbone == "resnet18" and model.settings.int8 and model.backbone.has_int8
    verdict = model.inspect(folders.list_images(tiny / "test" / "chip")[0])
    assert np.isfinite(verdict.score) and np.isfinite(verdict.threshold) and np.isfinite(verdict.anomaly_map).all()
    assert training_options(["--data", "x", "--no-int8"])[1]["int8"] is False


def test_int8_without_effect_is_refused(category, tmp_path, monkeypatch, capsys):
    options = ["--method", "nearest", "--backbone", "efficientnet_lite0", "--data", category, "--out", tmp_path / "run"]
    refuse(train.main, capsys, *options, "--int8", words=["--int8", "efficientnet_lite0"])
    refuse(train.main, capsys, *options, "--method", "paper", "--int8", words=["--int8", "--method paper"])
    monkeypatch.setattr(train, "is_fast", lambda device: False)
    options[3] = "resnet18"
    refuse(train.main, capsys, *options, "--int8", words=["--int8", "cpu", "VNNI"])
