"""Pictures for people: the sheet of synthetic defects, the explanation, the toy."""

import numpy as np
import torch
from forked import start
from helpers import ROOT, call, draw_synthetic, refuse
from PIL import Image

import evaluate
from kit import data, folders
from methods import load
from methods.stages import stages_of


def test_a_sheet_of_synthetic_defects(category, tmp_path, capsys):
    call(draw_synthetic, category, "--out", tmp_path / "sheet.png", "--size", 64)
    rows = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    assert rows.shape[1] == 960 and rows.shape[0] > 8 * 200
    before, mask, after = rows[:, 5:235], rows[:, 485:715, 0], rows[:, 725:955]
    changed = np.abs(after - before).sum(axis=-1)
    assert changed[mask > 200].mean() > 5 * changed[mask < 50].mean()
    again = tmp_path / "again.png"
    ended = start("synth.py", category, "--out", again, "--size", 64).ended()  # as a user starts it
    assert ended.returncode == 0 and f"wrote {again}" in ended.stdout, ended.stderr
    assert (np.asarray(Image.open(again)) == np.asarray(Image.open(tmp_path / "sheet.png"))).all()
    refuse(draw_synthetic, capsys, tmp_path / "none", words=["FOLDER", "no such folder"])


def test_explanation_of_an_image(run, category, tmp_path, capsys):
    chip = folders.list_images(category / "test" / "chip")[3]
    call(evaluate.main, run, "--explain", chip, "--out", tmp_path / "why.png")
    assert Image.open(tmp_path / "why.png").width > 900
    model = load(run / "model.pt")
    region = model.inspect(chip).regions[0]
    assert Image.open(chip).width != model.shape[1] and f"box {region.box}" in capsys.readouterr().out
    images = data.read_batch([chip], model.shape)
    stages = dict(stages_of(model, images))
    with torch.no_grad():
        flow, distance, odds = model.expert_energies(model.encode(images))
    found = [stages[name] for name in stages if name.startswith("tamed E") or name.startswith("log-odds")]
    assert torch.allclose(found[0], flow[0], atol=1e-3) and torch.allclose(found[1], odds[0], atol=1e-3)
    (seen,) = [stages[name] for name in stages if name.startswith("|r|")]
    assert torch.allclose(seen, distance[0], atol=1e-3)
    z_part, log_det_part = (
        next(m for name, m in stages.items() if name.startswith(s)) for s in ("1/2 mean", "log|det|")
    )
    e = z_part - log_det_part
    assert torch.allclose(torch.where(e <= 1, e, 1 + e.clamp(min=1).log()), flow[0], atol=1e-3)
    assert all(m.shape == flow[0].shape for m in stages.values())
    refuse(evaluate.main, capsys, run, "--explain", tmp_path / "none.png", words=["none.png"])
    refuse(evaluate.main, capsys, run, "--explain", chip, "--images", chip, words=["--explain", "--images"])


def test_the_toy_learns_two_moons(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import toy

    call(toy.main, "--out", tmp_path / "toy.png", "--steps", 20)
    assert Image.open(tmp_path / "toy.png").width > 900
    torch.manual_seed(0)
    flow = toy.train(steps=100, contrast_weight=0.0)
    moons = toy.moons(500)
    with torch.no_grad():
        inside, outside = toy.energies(flow, moons).mean(), toy.energies(flow, toy.elsewhere(500)).mean()
        back = flow.inverse(flow(moons.T[None, :, None])[0])[0, :, 0].T
    assert inside + 1 < outside
    assert torch.allclose(back, moons, atol=1e-3)
