"""Several processes that share the work, started by torchrun or as torchrun starts them. They are on the CPU: several
processes cannot share one GPU."""

import csv
import json
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from forked import Started, start
from helpers import LITE, NOWHERE, QUICK, ROOT, call, take_few_steps

import evaluate
import train
from kit import command_line
from kit.detector import read_checkpoint
from kit.processes import ALONE, join_processes
from methods import load

CPU = ["--device", "cpu"]
FEW = {"painted": 64, "steps": 60, "in_thirds": 10}
FEW_STEPS = f"""
import sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
import pytest, helpers, train, kit.good
kit.good.LEAST_COPIES = 1
helpers.take_few_steps(pytest.MonkeyPatch(), **{FEW})
train.run_script(train.main)
"""  # train.py, faster


def test_without_torchrun_a_process_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert join_processes() == ALONE and ALONE.first


def two_ended(path: object, *arguments: object, **options: object) -> list[subprocess.CompletedProcess]:
    """`start_two`, at their end. Another try if the port was taken meanwhile, or if they lost each other; so give
    --resume to trainings."""
    results = [process.ended() for process in start_two(path, *arguments, **options)]
    said = "".join(result.stderr for result in results)
    if "another process of this run has ended" in said or "address already in use" in said.lower():
        print("another try after:", said)
        results = [process.ended() for process in start_two(path, *arguments, **options)]
    return results


def start_two(path: object, *arguments: object, machines: int = 1, folders: tuple = (ROOT, ROOT)) -> list[Started]:
    """Start a script in two processes, with the environment variables that torchrun gives them: on one machine, or on
    two "machines". They meet on the loopback address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    on_each = 2 // machines
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": f"{on_each}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    if sys.platform == "linux":
        shared["GLOO_SOCKET_IFNAME"] = "lo"
    return [
        start(path, *arguments, folder=folder, RANK=f"{rank}", LOCAL_RANK=f"{rank % on_each}", **shared)
        for rank, folder in enumerate(folders)
    ]


def errors_in(result: subprocess.CompletedProcess) -> list[str]:
    """Our own error lines, without torchrun's report. Checks that there is no traceback of train.py."""
    assert result.returncode != 0 and 'train.py", line' not in result.stderr, result.stderr
    return [line for line in result.stderr.splitlines() if line.startswith("error:")]


def test_what_stops_all_processes_is_said_once(request, real_processes):
    """The first process prints the line and ends; torchrun then ends the other one, which waits."""
    process = real_processes[request.node.name]
    stdout, stderr = process.communicate(timeout=300)
    result = subprocess.CompletedProcess([], process.returncode, stdout, stderr)
    assert errors_in(result) == [f"error: --data {NOWHERE}: no such folder"]


def test_an_error_on_one_machine_ends_all(category, tmp_path, monkeypatch):
    """The second machine does not have the images. It fails while the first one waits for it."""
    monkeypatch.setattr(command_line, "AFTER_THE_FIRST", 0.1)  # no torchrun ends the second one before
    options = ["--data", category.name, *LITE, *CPU, "--size", 64, "--epochs", 1, "--steps", 1]
    options += ["--out", tmp_path / "out"]
    (tmp_path / "elsewhere").mkdir()
    folders = category.parent, tmp_path / "elsewhere"
    processes = start_two("train.py", *options, machines=2, folders=folders)
    here, elsewhere = (process.ended() for process in processes)
    assert errors_in(elsewhere) == [f"error: --data {category.name}: no such folder"]
    (line,) = errors_in(here)
    assert "another process" in line and not (tmp_path / "out" / "model.pt").exists()


def losses_of(run) -> list[list[float]]:
    names = ("loss", "nll", "classification", "contrast")
    with open(run / "log.csv") as file:
        return [[float(row[name]) for name in names] for row in csv.DictReader(file)]


def weights_of(run) -> torch.Tensor:
    state = read_checkpoint(run / "model.pt")["state"]
    return torch.cat([value.flatten() for key, value in state.items() if "subnet.2.weight" in key])


def test_two_processes_do_what_one_does(category, tmp_path, monkeypatch):
    """They train one model together, and judge its test images. Both choose the same bank, so weights can be compared;
    with several camera copies of each image they would start the choice from different rows."""
    options = ["--data", category, *LITE, *CPU, "--size", 64, "--epochs", 1, "--steps", 2, "--batch", 512]
    one, two, faster = tmp_path / "one", tmp_path / "two", tmp_path / "faster.py"
    take_few_steps(monkeypatch, **FEW)
    monkeypatch.setattr("kit.good.LEAST_COPIES", 1)
    faster.write_text(FEW_STEPS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other processes: the last bits of a sum depend on the number of threads
    call(train.main, *options, "--out", one)
    torch.set_num_threads(threads)
    first, second = two_ended(faster, *options, "--resume", "--out", two)
    assert first.returncode == second.returncode == 0, f"{first.stderr}\n---- the other:\n{second.stderr}"
    assert (first.stdout + second.stdout).count("epoch 1/1") == 1
    apart = (weights_of(one) - weights_of(two)).norm() / weights_of(one).norm()
    assert np.allclose(losses_of(two), losses_of(one), rtol=0.02), (losses_of(two), losses_of(one))
    bank, other = (read_checkpoint(run / "model.pt")["state"]["prototypes.bank"] for run in (one, two))
    assert torch.allclose(bank, other, atol=1e-4)
    assert apart < 0.8, apart  # 1.07 without shared gradients

    here, there = two_ended(faster, *options, "--resume", "--out", tmp_path / "nodes", machines=2)
    assert here.returncode == there.returncode == 0, f"{here.stderr}\n---- the other:\n{there.stderr}"
    assert np.allclose(losses_of(tmp_path / "nodes"), losses_of(two), rtol=1e-3)

    call(evaluate.main, one, *CPU)
    alone = json.loads((one / "metrics.json").read_text())
    (one / "metrics.json").unlink()
    assert [result.returncode for result in two_ended("evaluate.py", one, *CPU)] == [0, 0]
    together = json.loads((one / "metrics.json").read_text())
    points = zip(alone.pop("operating_points"), together.pop("operating_points"), strict=True)
    time = {"ms_per_image": 0}
    assert alone | time == pytest.approx(together | time, abs=1e-6)
    assert all(a == pytest.approx(b, abs=1e-6) for a, b in points)
    scores = [load(run / "model.pt").good_scores[0].sort().values for run in (one, two)]
    assert len(scores[0]) == len(scores[1]) == 24  # all good images, but in another order


def test_of_several_runs_each_process_trains_one(tiny, tmp_path):
    options = ["--data", tiny, *QUICK, *CPU, "--seeds", 2, "--out", tmp_path]
    nothing_painted = ["--classification-weight", 0, "--contrast-weight", 0]
    results = two_ended("train.py", *options, *nothing_painted, "--resume")
    assert [result.returncode for result in results] == [0, 0], [result.stderr for result in results]
    assert sum(result.stdout.count("epoch 1/1") for result in results) == 1
    assert [row["seed"] for row in json.loads((tmp_path / "results.json").read_text())] == [0, 1]
