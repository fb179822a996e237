"""The good images' scores: what is odd among them, and that it does not decide."""

import shutil

import pytest
from helpers import LITE, call
from PIL import Image

import evaluate
import train
from kit import calibration, data
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
