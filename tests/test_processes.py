"""Real processes under torchrun."""

import csv
import json

import numpy as np
import pytest
import torch
from helpers import LITE, TORCHRUN, call, script

import clflow
import evaluate
import train
from kit.detector import read_checkpoint
from kit.processes import ALONE, join_processes
from methods import load

PAINTED = clflow.PAINTED  # as real processes have it


def test_without_torchrun_a_process_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert join_processes() == ALONE and ALONE.first


def losses_of(run) -> list[list[float]]:
    names = ("loss", "nll", "classification")
    with open(run / "log.csv") as file:
        return [[float(row[name]) for name in names] for row in csv.DictReader(file)]


def weights_of(run) -> torch.Tensor:
    state = read_checkpoint(run / "model.pt")["state"]
    return torch.cat([value.flatten() for key, value in state.items() if "subnet.2.weight" in key])


def test_two_processes_do_what_one_does(category, tmp_path, monkeypatch):
    """They train one model together, and judge its test images; of several runs, each trains one."""
    options = ["--data", category, *LITE, "--size", 64, "--epochs", 2, "--steps", 2]
    one, two = tmp_path / "one", tmp_path / "two"
    monkeypatch.setattr(clflow, "PAINTED", PAINTED)
    call(train.main, *options, "--out", one)
    result = script(*TORCHRUN, "train.py", *options, "--out", two)
    assert result.returncode == 0 and result.stdout.count("epoch 2/2") == 1, result.stderr
    apart = (weights_of(one) - weights_of(two)).norm() / weights_of(one).norm()
    assert np.allclose(losses_of(two), losses_of(one), rtol=0.01), (losses_of(two), losses_of(one))
    assert apart < 0.4  # 0.8 without shared gradients

    call(evaluate.main, one)
    alone = json.loads((one / "metrics.json").read_text())
    result = script(*TORCHRUN, "evaluate.py", one)
    assert result.returncode == 0, result.stderr
    together = json.loads((one / "metrics.json").read_text())
    points = zip(alone.pop("operating_points"), together.pop("operating_points"), strict=True)
    time = {"ms_per_image": 0}
    assert alone | time == pytest.approx(together | time, abs=1e-6)
    assert all(a == pytest.approx(b, abs=1e-6) for a, b in points)
    scores = [load(run / "model.pt").normal[0].sort().values for run in (one, two)]
    assert len(scores[0]) == len(scores[1]) == 24  # all good images, in another order

    result = script(*TORCHRUN, "train.py", *options, "--epochs", 1, "--seeds", 2, "--out", tmp_path / "seeds")
    assert result.returncode == 0 and result.stdout.count("epoch 1/1") == 1, result.stderr
    assert [row["seed"] for row in json.loads((tmp_path / "seeds" / "results.json").read_text())] == [0, 1]
