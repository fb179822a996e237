"""benchmarks/ladder.py on a drawn category, with a tiny budget."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import LITE, ROOT, call

import clflow
from kit.demo import draw_demo
from methods import paper

sys.path.insert(0, str(ROOT / "benchmarks"))
import ladder  # noqa: E402

SIDE = 128  # smaller masks would vanish


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(paper, "IMAGES_PER_EPOCH", 18)
    monkeypatch.setattr(clflow, "STEPS_PER_EPOCH", 5)
    monkeypatch.setattr(ladder, "SMALL", SIDE)
    few = ["--epochs", 2, "--steps", 2]
    monkeypatch.setattr(ladder, "PAPER", {step: [*options, *few] for step, options in ladder.PAPER.items()})
    monkeypatch.setattr(ladder, "OURS", {step: (SIDE, changed) for step, (_, changed) in ladder.OURS.items()})


@pytest.fixture
def few(tmp_path) -> Path:
    """A drawn category with fewer images than most; the paper's form needs 20 good ones."""
    draw_demo(tmp_path / "few", {"train/good": 20, "test/good": 3, "test/chip": 3})
    return tmp_path / "few"


def lines(out, name) -> list[dict]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def test_the_ladder_goes_on_where_it_was_stopped(tiny, few, tmp_path, monkeypatch, capsys):
    command = [few, "--out", tmp_path, *LITE]
    climb, climbed = ladder.climb, []

    def stopped(category, step, seed, args):
        if step == ladder.STEPS[4]:
            raise KeyboardInterrupt
        return climb(category, step, seed, args)

    monkeypatch.setattr(ladder, "climb", stopped)
    with pytest.raises(KeyboardInterrupt):
        call(ladder.main, *command)
    assert [row["step"] for row in lines(tmp_path, few.name)] == ladder.STEPS[:4]
    monkeypatch.setattr(ladder, "climb", lambda *args: climbed.append(args[1]) or climb(*args))
    call(ladder.main, *command)
    rows = lines(tmp_path, few.name)
    assert [row["step"] for row in rows] == ladder.STEPS and climbed == ladder.STEPS[4:]
    assert all(0 <= row["image_auroc"] <= 1 and 0.5 < row["pixel_auroc"] <= 1 and row["seconds"] > 0 for row in rows)
    figures = [(row["image_auroc"], row["pixel_auroc"]) for row in rows]
    assert all(here != before for before, here in zip(figures[:-1], figures[1:-1], strict=False))
    assert figures[-1] == figures[-2]  # the last step has larger images, but not here
    assert f"| {ladder.STEPS[0]} | {rows[0]['image_auroc']:.4f} |" in capsys.readouterr().out


def test_the_table_by_hand(tmp_path, capsys):
    """The table of two categories with two seeds. A third category does not have all steps yet."""
    figures = {"a": [(0.9, 0.8), (0.7, 0.9)], "b": [(0.6, 0.8), (1.0, 0.9)], "c": [(0.1, 0.1)]}
    for name, by_step in figures.items():
        rows = []
        for step, pair in zip(ladder.STEPS, by_step, strict=False):
            for seed, auroc in enumerate(pair):
                rows.append({"category": name, "step": step, "seed": seed, "image_auroc": auroc, "seconds": 10 + seed})
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(ladder.main, "none", "--out", tmp_path, "--table")
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("| step | mean of 2 ")
    assert table[2] == f"| {ladder.STEPS[0]} | 0.7750 | 0.700 (b) | 10 |"  # a: .85, b: .70
    assert table[3] == f"| {ladder.STEPS[1]} | 0.8750 | 0.800 (a) | 10 |" and len(table) == 4


class LogOdds(torch.nn.Module):
    def log_odds(self, rows):
        return rows[:, 0]


def test_without_noise_painted_rows_are_the_only_anomalous_ones():
    normal, anomalous = torch.randn(8, 3), torch.randn(2, 3)
    found = ladder.LossesWithoutNoise(LogOdds()).log_odds(normal, anomalous)
    assert torch.equal(found[0], normal[:, 0]) and torch.equal(found[1], anomalous[:, 0])
    with_noise = clflow.Losses(LogOdds()).log_odds(normal, anomalous)
    assert len(with_noise[1]) == 4
