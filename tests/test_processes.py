"""Real processes under torchrun."""

import csv
import json

import numpy as np
import pytest
import torch
from helpers import LITE, TORCHRUN, script

from kit.processes import ALONE, join_processes


def test_without_torchrun_a_process_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert join_processes() == ALONE and ALONE.first


def test_two_processes_do_what_one_does(category, tmp_path):
    """They train one model together, and judge its test images; of several runs, each trains one."""
    options = ["--data", category, *LITE, "--size", 64, "--epochs", 2, "--steps", 2]
    logs, metrics = [], []
    for name, start in (("one", []), ("two", TORCHRUN)):
        result = script(*start, "train.py", *options, "--out", tmp_path / name)
        assert result.returncode == 0 and result.stdout.count("epoch 2/2") == 1, result.stderr
        result = script(*start, "evaluate.py", tmp_path / "one")
        assert result.returncode == 0, result.stderr
        metrics.append(json.loads((tmp_path / "one" / "metrics.json").read_text()))
        with open(tmp_path / name / "log.csv") as file:
            losses = ("loss", "nll", "classification", "contrast")
            logs.append([[float(row[loss]) for loss in losses] for row in csv.DictReader(file)])
    assert np.allclose(logs[1], logs[0], rtol=0.01), logs
    states = [torch.load(tmp_path / name / "model.pt", weights_only=True)["state"] for name in ("one", "two")]
    one, two = (torch.cat([state[k].flatten() for k in state if "subnet.2.weight" in k]) for state in states)
    assert (one - two).norm() < 0.1 * one.norm()  # 0.4 without shared gradients
    assert {**metrics[0], "ms_per_image": 0} == pytest.approx({**metrics[1], "ms_per_image": 0}, abs=1e-6)

    result = script(*TORCHRUN, "train.py", *options, "--epochs", 1, "--seeds", 2, "--out", tmp_path / "seeds")
    assert result.returncode == 0 and result.stdout.count("epoch 1/1") == 1, result.stderr
    assert [row["seed"] for row in json.loads((tmp_path / "seeds" / "results.json").read_text())] == [0, 1]
