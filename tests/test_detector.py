"""Map, score, calibration, checkpoint, and `inspect`, which users call from Python."""

import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import NoBackbone, call, mask_of
from PIL import Image
from scipy import ndimage
from torchvision.transforms.functional import gaussian_blur

import evaluate
import kit.detector
from kit import InputError, data, folders
from kit.detector import FORMAT, Detector, anomaly_map, has_fast_bfloat16, image_score, read_checkpoint
from kit.images import read_image
from kit.settings import Settings
from methods import load


def test_map_of_one_position_is_a_bell_of_its_energy():
    e = torch.zeros(1, 8, 8)
    e[0, 3, 5] = 2
    found = anomaly_map(e, (64, 64))
    assert found.shape == (1, 64, 64)
    peak = divmod(int(found.argmax()), 64)
    assert peak[0] in (27, 28) and peak[1] in (43, 44)  # the middle of the position; each has 8 pixels
    assert found.sum().item() == pytest.approx(2 * 8 * 8, rel=0.01)
    assert torch.allclose(anomaly_map(torch.full((1, 8, 8), 3.0), (64, 64)), torch.full((1, 64, 64), 3.0), atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (96, 400), (65, 91)])
def test_map_is_interpolated_then_filtered(shape):
    e = torch.rand(2, 8, 11)
    large = F.interpolate(e[:, None], shape, mode="bilinear")
    sigma = np.sqrt(shape[0] * shape[1]) / 128
    kernel = 2 * round(3 * sigma) + 1
    expected = gaussian_blur(large, [kernel, kernel], [sigma, sigma])[:, 0]
    assert torch.allclose(anomaly_map(e, shape), expected, atol=1e-5)


def test_image_score_is_the_mean_of_the_top_percent():
    maps = torch.arange(400.0).reshape(1, 20, 20)
    assert image_score(maps).item() == pytest.approx((396 + 397 + 398 + 399) / 4)


def test_a_long_map_is_made_in_parts_that_are_the_whole(monkeypatch):
    e = torch.randn(2, 6, 300, generator=torch.Generator().manual_seed(0))
    whole = anomaly_map(e, (48, 2400))
    asked = []
    weights_along = kit.detector.weights_along
    monkeypatch.setattr(kit.detector, "weights_along", lambda *a: asked.append(a[:2]) or weights_along(*a))
    monkeypatch.setattr(kit.detector, "PART", 64)
    assert torch.allclose(anomaly_map(e, (48, 2400)), whole, atol=1e-5)
    assert len(asked) == 6 and max(positions for positions, _ in asked) <= 64 + 2 * 4
    uneven = torch.randn(1, 6, 130, generator=torch.Generator().manual_seed(1))
    assert anomaly_map(uneven, (48, 1000)).shape == (1, 48, 1000)


def test_a_large_image_scores_as_its_worst_part(monkeypatch):
    """Parts of 20 x 20 pixels; 1 % of a part are four pixels."""
    for module in (kit.windows, kit.detector):
        monkeypatch.setattr(module, "SIDE", 20)
    spot, scattered = torch.zeros(100, 80), torch.zeros(100, 80)
    spot[51:53, 37:39] = 1
    scattered[[3, 40, 70, 95], [5, 70, 10, 75]] = 1  # the same number of high pixels, in four parts
    assert image_score(torch.stack((spot, scattered))).tolist() == [1, 0.25]
    small = torch.zeros(20, 40)  # at most two parts in size: judged as a whole, with the pixel count of one part
    small[[3, 16], [5, 35]] = 1
    assert image_score(small[None]).item() == 0.5
    assert image_score(spot[None], pixels=200).item() == 1 and image_score(scattered[None], pixels=200).item() == 0.5


@dataclass(frozen=True, kw_only=True)
class BrightnessSettings(Settings):
    method: str = "brightness"
    size: int = 64


class Brightness(Detector):
    """Two experts with energies that are easy to compute: the grey value of a position, and ten times its square."""

    def __init__(self, held_out: int):
        super().__init__(BrightnessSettings(images=held_out, held_out=held_out), NoBackbone(), [1 / 2, 1 / 2])

    def energies(self, images, excluded=None):
        grey = images[:, 0, ::8, ::8]
        return [grey, 10 * grey**2]


def test_calibration_by_hand():
    greys = np.array([0.1, 0.2, 0.3, 0.4, 0.9])
    model = Brightness(held_out=5)
    images = torch.full((5, 1, 3, 64, 64), 0.05)  # except a bright third
    images[..., 40:] = torch.tensor(greys, dtype=torch.float32).view(5, 1, 1, 1, 1)
    model.calibrate(map(model.energies, images))
    levels = [0.05, 10 * 0.05**2]  # the medians
    assert model.levels.tolist() == pytest.approx(levels)
    units = [0.3 - levels[0], 10 * 0.3**2 - levels[1]]  # from the level to the worst percent of the median image
    assert model.units.tolist() == pytest.approx(units, rel=1e-4)
    scores = ((greys - levels[0]) / units[0] + (10 * greys**2 - levels[1]) / units[1]) / 2
    assert model.good_scores[0].tolist() == pytest.approx(scores, abs=1e-4)
    assert model.good_scores[1].tolist() == pytest.approx(scores, abs=1e-4)  # the maximum is the score
    model.good_scores = torch.tensor([[1.0] * 20, [2.0] * 20])
    model.different = torch.tensor(20)
    assert 1 < model.thresholds().score < 1.5 and model.thresholds(0.5).anomaly_map == 2
    grey = 0.5  # by hand, its score is above the threshold:
    assert ((grey - levels[0]) / units[0] + (10 * grey**2 - levels[1]) / units[1]) / 2 > 1.5
    assert model.inspect(np.full((64, 64), grey)).anomalous
    assert not model.inspect(np.full((64, 64), 0.2)).anomalous


@pytest.mark.parametrize(
    "found, fast",
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True}, False),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, True),
        ({"cpu_name": "AMD EPYC"}, False),
        ({"avx512_bf16": True}, False),
    ],
)
def test_half_the_bits_are_used_where_that_is_faster(monkeypatch, found, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert has_fast_bfloat16(torch.device("cpu")) == fast


def test_experts_that_never_differ_do_not_divide_by_zero():
    model = Brightness(held_out=2)
    model.calibrate(model.energies(torch.full((1, 3, 64, 64), grey)) for grey in (0.5, 0.5))
    assert torch.isfinite(model.good_scores).all()


# ---------------------------------------------------------------- with a trained model


@pytest.fixture(scope="module")
def model(finished_run) -> Detector:
    return load(finished_run / "model.pt")


@pytest.fixture(scope="module")
def chip(category):
    return folders.list_images(category / "test" / "chip")[0]


def test_score_is_a_pure_function_of_one_image(model, category):
    files = folders.list_images(category / "test" / "good")
    images = data.read_batch(files, model.shape)
    with torch.no_grad():
        together = model(images)[1]
        singles = torch.cat([model(image[None])[1] for image in images])
    assert singles.std() > 0
    assert (together - singles).abs().max() < 1e-3 * model.good_scores[0].std()


@pytest.mark.parametrize("calibrated, judged", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_another_precision_than_that_of_the_calibration_is_told(
    run, pair, tmp_path, monkeypatch, capsys, calibrated, judged
):
    model = load(run / "model.pt")
    model.halved = torch.tensor(calibrated == "bfloat16")
    model.save(run / "model.pt")
    image = folders.list_images(pair / "test/good")[0]
    line = f"the threshold comes from scores in {calibrated}, but this machine judges in {judged}"
    out = ["--out", tmp_path / "out"]
    ways = [["--data", pair], ["--images", image, *out], ["--explain", image, "--out", tmp_path / "explained.png"]]
    for as_calibrated in (False, True):
        fast = (judged if not as_calibrated else calibrated) == "bfloat16"
        monkeypatch.setattr(kit.detector, "has_fast_bfloat16", lambda device, fast=fast: fast)
        for way in ways:
            call(evaluate.main, run, *way)
            assert capsys.readouterr().out.count(line) == (0 if as_calibrated else 1)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            again = load(run / "model.pt")
            again.inspect(image)
            again.inspect(image)
        assert [str(warning.message).startswith(line) for warning in told] == ([] if as_calibrated else [True])


def test_every_way_to_hand_over_an_image_gives_the_same_verdict(monkeypatch, model, chip):
    expected = model.inspect(chip)
    bytes_ = np.array(Image.open(chip))
    for image in (str(chip), Image.open(chip), bytes_, torch.from_numpy(bytes_).permute(2, 0, 1)):
        assert model.inspect(image).score == expected.score
    floats = read_image(chip)
    for image in (floats, torch.from_numpy(floats).permute(2, 0, 1)):  # rounded once more before the resizing
        assert model.inspect(image).score == pytest.approx(expected.score, rel=0.02)
    monkeypatch.setattr(model, "full_precision", True)  # bfloat16 may move a box by some pixels
    expected = model.inspect(chip)
    for image in (floats, torch.from_numpy(floats).permute(2, 0, 1)):
        verdict = model.inspect(image)
        assert verdict.score == pytest.approx(expected.score, rel=1e-3)
        assert verdict.regions[0].box == pytest.approx(expected.regions[0].box, abs=1)


def test_verdict_tells_where_the_defect_is_in_the_images_own_pixels(model, chip):
    verdict = model.inspect(chip)
    assert verdict.anomalous and verdict.score > verdict.threshold == model.thresholds().score
    truth = mask_of(chip)
    x0, y0, x1, y1 = verdict.regions[0].box
    assert truth[y0:y1, x0:x1].sum() > 0.5 * truth.sum() and (x1 - x0) * (y1 - y0) < 100**2
    assert np.corrcoef(verdict.anomaly_map.ravel(), ndimage.gaussian_filter(truth.astype(float), 6).ravel())[0, 1] > 0.2
    turned = Image.new("RGB", (300, 90))
    turned.getexif()[0x0112] = 6
    assert model.inspect(turned).anomaly_map.shape == (300, 90)
    assert model.inspect(Image.new("L", (300, 90))).anomaly_map.shape == (90, 300)


@pytest.mark.parametrize("image", [None, 3, [[0.5]], b"bytes"])
def test_what_is_no_image_is_refused_in_one_line(model, image):
    with pytest.raises(InputError, match="give a path"):
        model.inspect(image)


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5])
def test_a_share_of_false_alarms_is_between_0_and_1(model, share):
    with pytest.raises(InputError, match="false_alarm.*between 0 and 1"):
        model.inspect(Image.new("RGB", (64, 64)), false_alarm=share)


def test_a_tensor_of_0_to_255_is_not_taken_for_one_of_0_to_1(model):
    with pytest.raises(InputError, match=r"0..255, not 0..1"):
        model.inspect(torch.arange(256.0).expand(3, 256, 256))


# ---------------------------------------------------------------- brightness


def test_the_exposure_of_unusual_images_is_compensated(finished_run, category):
    """Images of half the brightness get the usual mean and standard deviation, and almost the score that they had."""
    model = load(finished_run / "model.pt")
    images = data.read_batch(folders.list_images(category / "test/good")[:3], model.shape)
    assert torch.equal(model.in_usual_brightness(images), images)
    dark = model.in_usual_brightness(0.5 * images)
    usual_mean, usual_deviation, _ = model.brightness.tolist()
    for image, found in zip(images, dark, strict=True):
        expected = usual_mean + (image - image.mean()) * usual_deviation / image.std(correction=0)
        assert torch.allclose(found, expected.clamp(0, 1), atol=1e-4)
    one_is_dark = torch.cat((images[:1], 0.5 * images[1:]))
    assert torch.equal(model.in_usual_brightness(one_is_dark), torch.cat((images[:1], dark[1:])))
    usual_score = model(images)[1]
    assert (model(0.5 * images)[1] / usual_score - 1).abs().max() < 0.2
    model.brightness.fill_(torch.nan)
    assert (model(0.5 * images)[1] > 1.2 * usual_score).all()
    assert torch.isfinite(model.in_usual_brightness(torch.zeros(1, 3, *model.shape))).all()


def test_usual_brightness_by_hand(finished_run):
    model = load(finished_run / "model.pt")
    levels = torch.tensor([0.40, 0.42, 0.44, 0.50, 0.60])
    half = torch.ones(model.shape, dtype=torch.bool)
    half[:, ::2] = False
    model.set_roi(half)
    images = levels[:, None, None, None].repeat(1, 3, *model.shape)
    images[..., ::2] = 0  # outside the region of interest
    model.learn_brightness(model.brightness_of(images))
    changes = np.abs(np.log(levels.numpy() / 0.44))
    assert model.brightness.tolist() == pytest.approx([0.44, 0, 4 * 1.4826 * np.median(changes)], rel=1e-3, abs=1e-4)
    model.learn_brightness(model.brightness_of(images[2:3]).repeat(1, 5))
    assert model.brightness[2].item() == pytest.approx(0.1)


# ---------------------------------------------------------------- checkpoints


def test_checkpoint_is_self_contained(model, finished_run, tmp_path):
    checkpoint = read_checkpoint(finished_run / "model.pt")
    assert checkpoint["format"] == FORMAT and checkpoint["progress"] is None
    model.save(tmp_path / "again.pt")
    again = load(tmp_path / "again.pt")
    assert again.settings == model.settings
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_what_is_no_checkpoint_is_named_in_one_line(tmp_path):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    torch.save({"format": 4, "settings": {}}, tmp_path / "older.pt")
    torch.save({"format": FORMAT, "settings": {"method": "x"}, "state": {}}, tmp_path / "strange.pt")
    for name, word in (("junk", "cannot be read"), ("other", "cannot be read"), ("older", "format 4.*train it again"),
                       ("strange", "cannot be read"), ("missing", "no such file")):  # fmt: skip
        with pytest.raises(InputError, match=word) as error:
            load(tmp_path / f"{name}.pt")
        assert name in str(error.value) and "\n" not in str(error.value)
