"""The good images' scores: what is odd among them, and that it does not decide."""

import contextlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import LITE, call
from PIL import Image

import evaluate
import train
from kit import calibration, data
from kit.demo import draw_button, write_png
from kit.detector import Detector
from kit.good import GoodImages
from kit.processes import Processes
from kit.settings import NearestSettings
from methods import load

NEAREST = ["--method", "nearest", *LITE, "--size", 128, "--bank", 400]


def test_a_defective_image_among_the_good_is_shown_and_does_not_decide(category, tmp_path, capsys):
    good = tmp_path / "good"
    shutil.copytree(category / "train/good", good)
    call(train.main, "--data", good, "--out", tmp_path / "clean", *NEAREST)
    assert "unlike the others" not in capsys.readouterr().out and not (tmp_path / "clean/suspects.png").exists()
    shutil.copy(data.list_images(category / "test/chip")[3], good / "chip.png")
    call(train.main, "--data", good, "--out", tmp_path / "spoilt", *NEAREST)
    assert "1 of the good images look unlike the others: chip.png" in capsys.readouterr().out
    assert Image.open(tmp_path / "spoilt/suspects.png").width == 960
    clean, spoilt = load(tmp_path / "clean/model.pt"), load(tmp_path / "spoilt/model.pt")
    assert spoilt.normal.shape == (2, 25)
    limits = clean.thresholds().score, spoilt.thresholds().score
    assert limits[1] == pytest.approx(limits[0], rel=0.15)
    chip = data.list_images(category / "test/chip")[1]
    assert clean.inspect(chip).anomalous and spoilt.inspect(chip).anomalous


def test_of_many_images_some_are_drawn(category, run, monkeypatch, capsys):
    monkeypatch.setattr(calibration, "LIMIT", 10)
    call(evaluate.main, run, "--recalibrate", category / "train/good")
    said = capsys.readouterr().out
    assert "took 10 of 24 images" in said and "from 10 good images" in said
    assert load(run / "recalibrated.pt").normal.shape == (2, 10)


# ---------------------------------------------------------------- as if they were new


def files_called(*names) -> GoodImages:
    return GoodImages([], [Path(name) for name in names])


def test_blocks_are_contiguous_in_the_natural_order_of_names():
    files = [Path(f"day/{number}.png") for number in (10, 2, 1, 11, 3, 20)]
    assert calibration.blocks(files, 3).tolist() == [1, 0, 0, 2, 1, 2]  # 1 2 | 3 10 | 11 20
    mixed = [Path(name) for name in ("b.png", "12.png", "a3.png", "a3b.png")]
    assert sorted(calibration.blocks(mixed, 4).tolist()) == [0, 1, 2, 3]  # names and numbers are comparable


def test_an_image_is_judged_without_itself_and_in_a_series_without_its_fifth():
    good = files_called(*(f"{number:03}.png" for number in range(30)))
    alone, series = calibration.AsNew(good, 0, alike=1.2), calibration.AsNew(good, 0, alike=3.0)
    assert alone.left_out(12).tolist() == [12] and not alone.is_series and alone.different == 30
    assert series.left_out(12).tolist() == list(range(12, 18)) and series.is_series and series.different == 10
    few = calibration.AsNew(files_called(*"abcdefgh"), 0, alike=9.0)  # of too few images nothing can be said
    assert not few.is_series


class Scored(Detector):
    """The score of an image is what it shows, 1 more where nothing is left out: its training is its neighbours'."""

    def __init__(self):
        super().__init__(NearestSettings(images=30, held_out=2, size=64), None, experts=1)

    def energies(self, images, without=None):
        return [torch.full((len(images), 8, 8), float(images.mean()) + len(without))]


@pytest.mark.parametrize("processes", [1, 3])
def test_scores_belong_to_their_images_whatever_the_processes(tmp_path, monkeypatch, processes):
    for number in range(30):
        Image.new("RGB", (64, 64), (5 * number,) * 3).save(tmp_path / f"{number}.png")
    good = GoodImages([], data.list_images(tmp_path))  # 0, 1, 10, 11, ...: not in their natural order
    parts = []
    monkeypatch.setattr(Processes, "concatenated", lambda self, rows: parts.append(rows) or torch.cat(parts))
    found = {}
    for fold in range(calibration.FOLDS):
        parts.clear()
        for rank in range(processes):
            shared = GoodImages([], good.trained_on, [], Processes(rank, processes))
            if rank < processes - 1:  # the last one has what all have found
                with contextlib.suppress(ValueError):
                    calibration.AsNew(shared, 0, 3.0).scores(Scored(), fold)
            else:
                found |= calibration.AsNew(shared, 0, 3.0).scores(Scored(), fold)
    for number, path in enumerate(good.trained_on):
        assert found[number][0].item() == pytest.approx(5 * int(path.stem) / 255 + 6, abs=1e-3)


def test_an_image_whose_energies_are_known_is_not_read(tmp_path):
    good = files_called("0.png", "1.png", "2.png")  # there are no such files
    as_new = calibration.AsNew(good, 0, alike=1.0)
    found = {}
    for fold in range(calibration.FOLDS):
        found |= as_new.scores(Scored(), fold, known=lambda number: [torch.full((1, 8, 8), 10.0 + number)])
    assert {number: round(score.item()) for number, (score, _) in found.items()} == {0: 10, 1: 11, 2: 12}


def test_a_series_is_named_and_its_threshold_holds_for_other_images(tmp_path, capsys):
    """Frames of a camera: ten buttons, eight times each."""
    rng = np.random.default_rng(0)
    for number in range(10):
        image, _ = draw_button(np.random.default_rng([0, number]), "good")
        for copy in range(8):
            moved = np.roll(image, rng.integers(-2, 3, 2), axis=(0, 1)) * rng.uniform(0.98, 1.02)
            write_png(tmp_path / "good" / f"{number}_{copy}.png", np.uint8(moved.clip(0, 255)))
    call(train.main, "--data", tmp_path / "good", "--out", tmp_path / "run", *NEAREST)
    said = capsys.readouterr().out
    model = load(tmp_path / "run" / "model.pt")
    different = int(model.different)
    assert "a series:" in said and 5 <= different <= 36 and f"about {different} different" in said
    assert model.normal.shape == (2, 72)  # not the held-out ones, which have neighbours among the others
    assert model.thresholds().images == different
    others = [draw_button(np.random.default_rng([9, number]), "good")[0] for number in range(40)]
    scores = np.array([model.inspect(image).score for image in others])
    assert (scores > model.thresholds(0.02).score).mean() <= 0.06


def test_independent_images_are_no_series(category, tmp_path, capsys):
    call(train.main, "--data", category, "--out", tmp_path, *NEAREST)
    assert "a series" not in capsys.readouterr().out and load(tmp_path / "model.pt").different == 24
