"""The shape in which images are judged: it is chosen from the good images, printed, and kept."""

import argparse
import copy

import numpy as np
import pytest
import torch
from helpers import LITE, call, check_export, draw_synthetic, refuse
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

import evaluate
import synth
import train
from kit import InputError, shapes
from kit.data import read_batch, read_region
from kit.shapes import shape_in_file
from methods import load

STRIP = (64, 320)  # (height, width) of drawn strips


@pytest.mark.parametrize(
    "text, size", [("384", 384), ("native", "native"), ("256x1024", (256, 1024)), ("x", None), ("1x2x3", None)]
)
def test_what_stands_behind_size(text, size):
    if size is None:
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            shapes.parsed_size(text)
    else:
        assert shapes.parsed_size(text) == size and shapes.size_text(size) == text


@pytest.mark.parametrize(
    "size, word", [(10, "out of range"), ((100, 128), "multiples of 32"), ((32, 32), "fewer pixels")]
)
def test_sizes_out_of_range_are_refused(size, word):
    with pytest.raises(InputError, match=word):
        shapes.check_size(size)


def images_of(folder, *all_of_them):
    """Files of grey images of these shapes (H, W)."""
    folder.mkdir(exist_ok=True)
    for i, (height, width) in enumerate(all_of_them):
        Image.new("L", (width, height), 100).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize(
    "size, image, expected",
    [
        (384, (448, 448), 384),
        (300, (50, 50), 288),
        (100, (256, 256), 96),
        (384, (256, 4096), (96, 1536)),
        (384, (1250, 500), (608, 256)),
        ("native", (1250, 500), (1248, 512)),
        ("native", (450, 450), 448),
        ((64, 128), (500, 500), (64, 128)),
    ],
)
def test_as_many_pixels_in_the_shape_of_the_images(tmp_path, size, image, expected):
    files = images_of(tmp_path / "images", image, image, (40, 90))  # the median, so one odd image changes nothing
    assert shapes.input_size(size, files) == expected


def test_a_photograph_s_shape_is_that_of_the_turned_one(tmp_path, monkeypatch):
    turned = Image.Exif()
    turned[0x0112] = 6
    for name in ("turned.jpg", "turned.png", "turned.tif", "turned.webp"):
        Image.new("RGB", (80, 40)).save(tmp_path / name, exif=turned)
        assert shape_in_file(tmp_path / name) == (80, 40)
    before, after = split_at_pixels((tmp_path / "turned.png").read_bytes())
    assert b"eXIf" in before
    exif = before[before.index(b"eXIf") - 4 : before.index(b"eXIf") + 4 + before[before.index(b"eXIf") - 1] + 4]
    (tmp_path / "behind.png").write_bytes(before.replace(exif, b"") + after[:-12] + exif + after[-12:])
    assert shape_in_file(tmp_path / "behind.png") == (80, 40)
    (tmp_path / "none.png").write_text("no image")
    assert shape_in_file(tmp_path / "none.png") is None
    Image.new("RGB", (80, 40)).save(tmp_path / "plain.png")
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("decodes the image"))
    assert shape_in_file(tmp_path / "plain.png") == (40, 80)


def split_at_pixels(png: bytes) -> tuple[bytes, bytes]:
    """A PNG file up to its pixels, and the rest."""
    start = png.index(b"IDAT") - 4
    return png[:start], png[start:]


def test_what_is_done_to_images_is_told(tmp_path, capsys):
    files = images_of(tmp_path / "images", (256, 4096))
    assert shapes.told(files, (96, 1536)) == (
        "images of 4096 x 256 pixels are judged at 1536 x 96: a 20-pixel defect shrinks to 8 pixels; "
        "use --size 256x4096 for full resolution"
    )
    assert shapes.told(files, (256, 4096)) == ""
    square = images_of(tmp_path / "square", (1000, 1000))
    assert shapes.told(square, (992, 992)) == "" and "shrinks" in shapes.told(square, (960, 960))
    Image.new("L", (40, 40)).save(tmp_path / "small.png")  # --size native would not take these
    grown = shapes.told([tmp_path / "small.png"], (384, 384))
    assert grown == "images of 40 x 40 pixels are judged at 384 x 384: a 20-pixel defect grows to 192 pixels"
    odd = images_of(tmp_path / "odd", (100, 100), (100, 109), (100, 112))
    shapes.print_others(odd, (64, 64))
    said = capsys.readouterr().out
    assert f"1 of 3 images have another aspect ratio than 64 x 64, for example {odd[2].as_posix()} (112 x 100)" in said


# ---------------------------------------------------------------- strips, from training to the verdict


def draw_strips(folder, count, rng, dark_at=None):
    """Strips with a smooth pattern; with a dark square of 8 pixels at column `dark_at`."""
    folder.mkdir(parents=True)
    for i in range(count):
        columns = np.arange(STRIP[1]) / 9 + rng.uniform(0, 6)
        strip = 130 + 40 * np.sin(columns)[None] + rng.normal(0, 4, STRIP)
        if dark_at is not None:
            strip[28:36, dark_at : dark_at + 8] = 0
        Image.fromarray(np.uint8(strip.clip(0, 255))).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def strips(tmp_path_factory):
    """A category of strips. Defects are at column 250; those of the kind "left" are at column 40. The folder
    left_without has the images of that kind without their defects."""
    category = tmp_path_factory.mktemp("strips")
    rng = np.random.default_rng(0)
    draw_strips(category / "train" / "good", 24, rng)
    draw_strips(category / "test" / "good", 8, rng)
    draw_strips(category / "test" / "right", 6, rng, dark_at=250)
    left_without = copy.deepcopy(rng)
    draw_strips(category / "test" / "left", 6, rng, dark_at=40)
    draw_strips(category / "left_without", 6, left_without)
    return category


@pytest.fixture(scope="module")
def strips_run(strips, tmp_path_factory):
    """A run that was trained on strips; their right half is the region of interest."""
    run = tmp_path_factory.mktemp("strips_run") / "run"
    mask = np.zeros(STRIP, np.uint8)
    mask[:, 160:] = 255
    roi = run.with_name("roi.png")
    Image.fromarray(mask).resize((640, 128), Image.Resampling.NEAREST).save(roi)  # any size
    call(train.main, "--data", strips, "--roi", roi, "--size", 143, *LITE, "--epochs", 1, "--batch", 512, "--out", run)
    return run


def test_only_the_region_of_interest_counts(strips, strips_run, tmp_path):
    model = load(strips_run / "model.pt")
    assert model.shape == STRIP and model.pixels == 64 * 160
    right = [model.inspect(strips / "test" / "right" / f"{i}.png") for i in range(6)]
    left = [model.inspect(strips / "test" / "left" / f"{i}.png") for i in range(6)]
    without = [model.inspect(strips / "left_without" / f"{i}.png").score for i in range(6)]
    good = [model.inspect(strips / "test" / "good" / f"{i}.png") for i in range(8)]
    worst_good = max(verdict.score for verdict in good)
    assert min(verdict.score for verdict in right) > 1.5 * worst_good
    assert [verdict.score for verdict in left] == pytest.approx(without, rel=0.05)  # the defect does not count
    for verdict in right:
        (x0, y0, x1, y1) = verdict.regions[0].box
        assert x0 < 258 and x1 > 250 and y0 < 36 and y1 > 28
    assert all((verdict.anomaly_map[:, :152] == 0).all() for verdict in left)  # outside, except near the border
    call(evaluate.main, strips_run, "--images", strips / "test" / "left", "--out", tmp_path / "found")
    shown = np.asarray(Image.open(tmp_path / "found" / "0.png.png").convert("L"), dtype=float)
    assert shown[40:80, 100:140].mean() < 0.5 * shown[40:80, 200:240].mean()  # dimmed


def test_nothing_outside_the_region_is_learnt_or_painted(strips, strips_run, tmp_path, capsys):
    """All prototypes come from the right half. Their number is a tenth of its rows."""
    options = ["--roi", strips_run.with_name("roi.png"), "--size", 143, *LITE, "--method", "nearest"]
    call(train.main, "--data", strips, *options, "--out", tmp_path / "run")
    assert "--roi: 50.0 % of the image is inspected" in capsys.readouterr().out
    model = load(tmp_path / "run" / "model.pt")
    images = sorted((strips / "train" / "good").iterdir())
    x = model.features(read_batch(images, STRIP)).permute(0, 2, 3, 1)  # (B, 8, 40, C)
    bank = model.prototypes.bank + model.prototypes.centre
    right = torch.cdist(bank, x[:, :, 20:].flatten(0, 2)).min(dim=1).values
    left = torch.cdist(bank, x[:, :, :20].flatten(0, 2)).min(dim=1).values
    assert len(bank) == 18 * 8 * 20 / 10 and right.max() < 0.1 * left.min()

    rng = np.random.default_rng(0)
    roi = np.zeros((64, 64), dtype=bool)
    roi[40:, :] = True
    for _ in range(50):
        _, mask, _ = synth.synthesize(rng.random((64, 64, 3), dtype=np.float32), rng, roi=roi)
        assert mask.any() and not mask[:40].any()


def test_a_wrong_region_of_interest_is_refused(strips, tmp_path, capsys):
    Image.new("L", (100, 100), 255).save(tmp_path / "square.png")
    Image.new("L", (320, 64), 0).save(tmp_path / "empty.png")
    for name, word in (("square", "100 x 100"), ("empty", "white"), ("missing", "no such file")):
        arguments = ["--data", strips, "--roi", tmp_path / f"{name}.png", *LITE, "--out", tmp_path / "run"]
        refuse(train.main, capsys, *arguments, words=["--roi" if name != "missing" else "missing.png", word])
    assert not (tmp_path / "run").exists()
    assert read_region(tmp_path / "square.png", (32, 64)).all()


def test_another_shape_is_judged_and_told(strips_run, tmp_path, capsys):
    (tmp_path / "new").mkdir()
    Image.new("L", (200, 200), 130).save(tmp_path / "new" / "square.png")
    call(evaluate.main, strips_run, "--images", tmp_path / "new", "--out", tmp_path / "found")
    said = capsys.readouterr().out
    assert (
        "1 of 1 images have another aspect ratio than 320 x 64, for example" in said
        and "square.png (200 x 200)" in said
    )
    assert (tmp_path / "found" / "scores.csv").read_text().count("\n") == 2


def test_strips_are_exported_explained_and_measured(strips, strips_run, tmp_path, capsys):
    images = read_batch(sorted((strips / "test" / "right").iterdir()), STRIP)
    check_export(strips_run, images, tmp_path / "strip.pt2", 1e-3, loads=False)
    call(evaluate.main, strips_run, "--explain", strips / "test" / "right" / "0.png", "--out", tmp_path / "why.png")
    said = capsys.readouterr().out
    assert "images (batch, 3, 64, 320)" in said and "320 x 64, judged at 320 x 64" in said
    sheet = Image.open(tmp_path / "why.png")
    assert sheet.width == 960 and sheet.height > 9 * 42 + 9 * 180  # nine stacked panels, each 1 : 5
    call(evaluate.main, strips_run, "--out", tmp_path / "elsewhere", "--data", strips)
    assert '"size": "64x320"' in (tmp_path / "elsewhere" / "metrics.json").read_text()
    call(draw_synthetic, strips, "--size", 143, "--out", tmp_path / "sheet.png")
    assert "20-pixel defect" not in capsys.readouterr().out  # they are not resized
