from functools import cache

import numpy as np
import pytest
import torch
from helpers import NoBackbone, call
from PIL import Image
from scipy import ndimage

import evaluate
import kit.good
from kit.camera import MEASURES, are_unusual, measures, quantization_step, usual, with_compression
from kit.demo import draw_button
from kit.detector import Detector
from kit.good import blurred, camera_copy, compressed, side_light, with_camera_copies
from kit.images import load_image, to_tensor
from kit.inspection import camera_line, differences
from kit.settings import NearestSettings


@cache
def photograph(number: int, defect: str) -> np.ndarray:
    image = np.float32(draw_button(np.random.default_rng([50, number]), defect)[0]) / 255
    image.flags.writeable = False
    return image


def photographs(count: int, defect: str = "good") -> list[np.ndarray]:
    return [photograph(i, defect) for i in range(count)]


def measured(image: np.ndarray, step: float = np.nan) -> np.ndarray:
    return with_compression(measures(to_tensor(image.copy()[None])), step)


def measures_of(images: list[np.ndarray]) -> np.ndarray:
    return np.stack([measured(image) for image in images])


@cache
def normal() -> np.ndarray:
    """The usual measures of twenty photographs."""
    return usual(measures_of(photographs(40)[20:]))


CHANGES = {
    "noisier": lambda image: image + np.random.default_rng(0).normal(0, 0.02, image.shape),
    "blurrier": lambda image: ndimage.gaussian_filter(image, (1.5, 1.5, 0)),
    "sharper": lambda image: image + 2 * (image - ndimage.gaussian_filter(image, (1, 1, 0))),
    "brighter": lambda image: image * 1.2,
    "darker": lambda image: image * 0.8,
    "brighter on the right": lambda image: image * np.linspace(0.8, 1.2, image.shape[1])[None, :, None],
    "brighter at the top": lambda image: image * np.linspace(1.2, 0.8, image.shape[0])[:, None, None],
    "of lower contrast": lambda image: 0.5 + 0.7 * (image - 0.5),
    "redder": lambda image: image * (1.1, 1, 0.9),
    "bluer": lambda image: image * (0.9, 1, 1.1),
}


@pytest.mark.parametrize("word", CHANGES)
@pytest.mark.parametrize("count", [1, 20])
def test_a_change_of_the_camera_is_named(word, count):
    images = [np.float32(CHANGES[word](image)).clip(0, 1) for image in photographs(count)]
    assert word in differences(measures_of(images), normal())
    found = measures(to_tensor(np.stack(images)))
    is_from_side = " on the " in word or " at the " in word
    assert are_unusual(found, torch.from_numpy(normal()))[:, int(is_from_side)].all()


def test_images_of_the_same_camera_do_not_differ_nor_do_defects():
    same_camera = measures_of(photographs(20))
    assert differences(same_camera, normal()) == []
    assert [differences(row[None], normal()) for row in same_camera] == [[]] * 20
    found = measures(to_tensor(np.stack(photographs(20))))
    assert not are_unusual(found, torch.from_numpy(normal())).any()
    assert not are_unusual(found + 9, torch.full((2, 8), torch.nan)).any()  # nothing is known
    assert differences(measures_of(photographs(20, "chip")), normal()) == []


def step_of(path) -> float:
    return quantization_step(load_image(path))


def test_compression_is_read_from_the_file(tmp_path):
    image = Image.fromarray(np.uint8(photographs(1)[0] * 255))
    image.save(tmp_path / "fine.jpg", quality=95)
    image.save(tmp_path / "poor.jpg", quality=30)
    image.save(tmp_path / "a.png")
    assert step_of(tmp_path / "a.png") == 0
    assert 0 < step_of(tmp_path / "fine.jpg") < step_of(tmp_path / "poor.jpg")
    image.convert("L").save(tmp_path / "grey.jpg")
    data = (tmp_path / "grey.jpg").read_bytes()
    data = data.replace(b"\xff\xdb\x00\x43\x00", b"\xff\xdb\x00\x43\x01", 1)  # the table gets another number,
    data = data.replace(b"\x01\x01\x11\x00", b"\x01\x01\x11\x01", 1)  # and the only channel refers to it
    (tmp_path / "renumbered.jpg").write_bytes(data)
    assert step_of(tmp_path / "renumbered.jpg") > 0
    pixels = photographs(1)[0]
    fine, poor, png = (measured(pixels, step_of(tmp_path / name))[None] for name in ("fine.jpg", "poor.jpg", "a.png"))
    assert differences(poor, usual(fine)) == ["more strongly compressed"]
    assert differences(png, usual(fine)) == ["less compressed"]
    assert differences(measured(pixels)[None], usual(fine)) == []  # an array: its compression is unknown


def test_the_line_names_all_differences():
    assert camera_line(["noisier"], 1).startswith("this image is noisier than the training images")
    assert camera_line(["darker", "noisier", "blurrier"], 9).startswith(
        "these 9 images are darker, noisier and blurrier than"
    )


def test_copies_are_a_little_worse_and_reproducible():
    (image,) = photographs(1)
    copies = [camera_copy(image, np.random.default_rng(i)) for i in range(30)]
    away = [np.abs(copy - image).mean() for copy in copies]
    assert all(copy.shape == image.shape and copy.dtype == np.float32 for copy in copies)
    assert all(0 <= copy.min() and copy.max() <= 1 for copy in copies)
    assert min(away) > 0 and max(away) < 0.04 and np.std(away) > 0.002
    assert (copies[3] == camera_copy(image, np.random.default_rng(3))).all()


def test_how_often_and_how_strongly_copies_are_changed(monkeypatch):
    """Half are blurred by 0.3 to 1.2 pixels, two thirds are compressed with quality 40 to 95. The strength of the noise
    is uniform in 0 to 0.03."""
    sigmas, qualities, noise = [], [], []
    monkeypatch.setattr(kit.good, "blurred", lambda image, sigma: sigmas.append(sigma) or image)
    monkeypatch.setattr(kit.good, "compressed", lambda image, quality: qualities.append(quality) or image)
    flat = np.full((32, 32, 3), (0.5, 0.4, 0.3), np.float32)
    rng = np.random.default_rng(0)
    for _ in range(600):
        noise.append((camera_copy(flat, rng) - flat).std())
    assert 265 <= len(sigmas) <= 335 and 365 <= len(qualities) <= 435
    assert 0.3 <= min(sigmas) < 0.33 and 1.17 < max(sigmas) <= 1.2 and np.mean(sigmas) == pytest.approx(0.75, abs=0.05)
    assert 40 <= min(qualities) < 42 and 92 < max(qualities) <= 95 and np.mean(qualities) == pytest.approx(67.5, abs=3)
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert np.quantile(noise, share) == pytest.approx(0.03 * share, abs=0.002)


def test_half_of_the_painted_images_are_replaced_by_a_camera_copy(monkeypatch):
    """Mask and box stay."""
    monkeypatch.setattr(kit.good, "camera_copy", lambda image, rng: f"copy of {image}")
    paint = with_camera_copies(lambda image, rng, other, roi: ("painted", "mask", "box"))
    rng = np.random.default_rng(0)
    found = [paint("image", rng, "other", "roi") for _ in range(600)]
    copied = sum(image == "copy of painted" for image, _, _ in found)
    assert 265 <= copied <= 335 and sum(image == "painted" for image, _, _ in found) == 600 - copied
    assert all((mask, box) == ("mask", "box") for _, mask, box in found)


def test_light_from_one_side_by_hand():
    """A ramp of 10 to 25 % in any direction, brighter on one side and darker on the other. The centre stays."""
    flat = np.full((65, 65, 3), 0.5, np.float32)
    angles, strengths = [], []
    for number in range(400):
        ramp = side_light(flat, np.random.default_rng(number))[..., 0] / 0.5 - 1
        down, across = ramp[64, 32], ramp[32, 64]
        assert ramp[32, 32] == pytest.approx(0, abs=1e-6)
        assert ramp[0, 32] == pytest.approx(-down, abs=1e-6) and ramp[0, 0] == pytest.approx(-down - across, abs=1e-6)
        assert ramp[48, 32] == pytest.approx(down / 2, abs=1e-6)
        angles.append(np.arctan2(down, across))
        strengths.append(np.hypot(down, across))
    assert 0.1 <= min(strengths) < 0.105 and 0.245 < max(strengths) <= 0.25 + 1e-6
    assert np.mean(strengths) == pytest.approx(0.175, abs=0.01)
    assert (np.histogram(angles, bins=4, range=(-np.pi, np.pi))[0] > 70).all()


LEAST = (0.1, 0.05, 0.05, 0.05, 0.2, 0.15, 0.05, 0.5)  # the smallest change of each measure that counts


@pytest.mark.parametrize("measure", range(8))
@pytest.mark.parametrize("deviation", [0.0, 1.0])
def test_from_which_change_on_images_differ_by_hand(measure, deviation):
    """A single image: four robust deviations, and at least the smallest change. The median of n images: 4 / sqrt(n)
    deviations, and no fewer than two."""
    middle = np.arange(8.0)
    normal = np.stack((middle, np.full(8, deviation)))
    for count, deviations in ((1, 4), (2, 4 / 2**0.5), (4, 2), (9, 2)):
        limit = max(deviations * deviation, LEAST[measure])
        for change, differs in ((1.01 * limit, True), (-1.01 * limit, True), (0.99 * limit, False)):
            images = np.tile(middle, (count, 1))
            images[:, measure] += change
            assert bool(differences(images, normal)) == differs
            if count == 1 and measure < 7:  # compression is not in the pixels
                found = are_unusual(torch.from_numpy(images[:, :7]), torch.from_numpy(normal))[0].tolist()
                is_side = measure in (1, 2)
                assert found == [differs and not is_side, differs and is_side]


def test_grey_copies_stay_grey():
    grey = photographs(1)[0].mean(axis=2, keepdims=True).repeat(3, axis=2)
    for i in range(10):
        copy = camera_copy(grey, np.random.default_rng(i))
        assert np.ptp(copy, axis=2).max() < 0.005


def test_blur_and_compression_against_pillow(tmp_path):
    (image,) = photographs(1)
    flat = np.full_like(image, 0.5)
    assert np.allclose(blurred(flat, 2.0), 0.5)
    assert np.allclose(blurred(image, 1.0).mean(axis=(0, 1)), image.mean(axis=(0, 1)), atol=1e-3)
    Image.fromarray(np.uint8(np.round(image * 255))).save(tmp_path / "a.jpg", quality=50)
    assert (compressed(image, 50) == np.float32(Image.open(tmp_path / "a.jpg")) / 255).all()


def test_measures_by_numpy_and_scipy():
    """The same definitions, with other libraries and all pixels; and half of an image is measured as the whole."""
    (image,) = photographs(1)
    grey = image.mean(axis=2)
    binomial, wide = np.outer((1, 2, 1), (1, 2, 1)) / 16, np.zeros((5, 5))
    wide[::2, ::2] = binomial
    fine = ndimage.convolve(grey, binomial)
    coarse = ndimage.convolve(fine, wide)
    laplace = np.float32([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])
    noise = np.median(np.abs(ndimage.convolve(grey, laplace))) / (6 * 0.6745)
    sharpness = np.log(np.quantile(np.abs(grey - fine), 0.99) / np.quantile(np.abs(fine - coarse), 0.99))
    colour = np.log(image[..., 0].mean() / image[..., 2].mean())
    across, along = (np.log(half[128:].mean() / half[:128].mean()) for half in (grey.T, grey))
    expected = [np.log(grey.mean()), across, along, np.log(grey.std() + 0.01), np.log(noise + 2e-3), sharpness, colour]
    whole = measures(to_tensor(image[None].copy()))
    assert whole[0].tolist() == pytest.approx(expected, abs=0.03) and len(MEASURES) == len(expected) + 1
    beside = np.concatenate((image, np.full_like(image, image.mean())), axis=1)
    half = measures(to_tensor(beside[None]), inside=0.5)
    assert torch.allclose(half[:, [0, 4, 5]], whole[:, [0, 4, 5]], atol=0.1)  # light, noise, sharpness


def test_a_region_of_interest_far_from_the_middle_is_measured(monkeypatch):
    """Of a large image only the middle counts: the middle of the region."""
    monkeypatch.setattr("kit.camera.MIDDLE", 64)
    model = Detector(NearestSettings(images=1, held_out=1, size=256), NoBackbone(), [1.0])
    roi = torch.zeros(256, 256, dtype=torch.bool)
    roi[200:240, 8:60] = True
    model.set_roi(roi)
    (image,) = photographs(1)
    inside = np.ascontiguousarray(image[100:140, 100:152])
    pasted, noisier = np.zeros_like(image), np.zeros_like(image)
    pasted[200:240, 8:60] = inside
    noisier[200:240, 8:60] = inside + np.random.default_rng(0).normal(0, 0.1, inside.shape)
    expected = measures(to_tensor(inside[None]))
    found, found_noisier = (model.measures(to_tensor(photo[None]))[0] for photo in (pasted, noisier))
    assert found[[0, 6]].tolist() == pytest.approx(expected[0, [0, 6]].tolist(), abs=0.05)  # light and colour
    assert found_noisier[4] > found[4] + 0.5 and abs(found[4] - expected[0, 4]) < 0.3  # noise


def test_evaluate_says_how_new_images_differ_and_recalibrating_learns_them(run, category, tmp_path, capsys):
    """Unchanged images give no line, noisier ones do. After a recalibration on noisier images there is no line."""
    rng = np.random.default_rng(0)
    folders = {name: tmp_path / name for name in ("noisy", "new-good")}
    for folder in folders.values():
        folder.mkdir()
        for i in range(12):
            image = photographs(12)[i] + rng.normal(0, 0.03, (256, 256, 3))
            Image.fromarray(np.uint8(255 * image.clip(0, 1))).save(folder / f"{i}.png")
    call(evaluate.main, run, "--images", category / "test" / "good", "--out", tmp_path / "a")
    assert "than the training images" not in capsys.readouterr().out
    call(evaluate.main, run, "--images", folders["noisy"], "--out", tmp_path / "b")
    assert "these 12 images are noisier than the training images" in capsys.readouterr().out
    call(evaluate.main, run, "--recalibrate", folders["new-good"])
    call(evaluate.main, run / "recalibrated.pt", "--images", folders["noisy"], "--out", tmp_path / "c")
    assert "than the training images" not in capsys.readouterr().out
