"""evaluate.py --watch, with the files of a camera: they grow, are renamed, vanish; the program is killed."""

import csv
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import CAN_FORK, start, wait_for
from helpers import call, refuse

import evaluate
from kit import folders, inspection, measuring, watching
from kit.detector import read_checkpoint
from kit.images import load_image
from methods import load


def rows_of(out, table="scores.csv") -> list[dict]:
    try:
        with open(out / table, newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


def watch_until(condition, *arguments) -> None:
    """evaluate.py --watch in this process, stopped between two looks once the condition holds."""

    def sleep(seconds):
        assert time.monotonic() < end, "nothing came of it"
        if condition():
            raise KeyboardInterrupt

    end = time.monotonic() + 60
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(watching.time, "sleep", sleep)
        call(evaluate.main, *arguments, "--watch")


def test_each_image_is_judged_once_and_none_is_lost(run, category, tmp_path, monkeypatch, capsys):
    if CAN_FORK:  # the copies of this process look more often
        monkeypatch.setattr(watching, "LOOK_EVERY", 0.3)
        monkeypatch.setattr(watching, "AT_A_LOOK", 2)
    inbox, out = tmp_path / "inbox", tmp_path / "out"
    inbox.mkdir()
    chips, goods = (folders.list_images(category / "test" / kind) for kind in ("chip", "good"))
    shutil.copy(chips[0], inbox / "a.png")
    command = ["evaluate.py", run, "--images", inbox, "--out", out, "--watch", "--device", "cpu"]
    watcher = start(*command)
    wait_for(lambda: len(rows_of(out)) == 1)
    whole = chips[1].read_bytes()
    with open(inbox / "slow.png", "wb") as file:  # half of it, for longer than two looks
        file.write(whole[:5000])
        file.flush()
        time.sleep(2.5 * watching.LOOK_EVERY)
        file.write(whole[5000:])
    shutil.copy(goods[0], inbox / "gone.tmp")
    os.rename(inbox / "gone.tmp", inbox / "b.png")
    (inbox / "tray 2").mkdir()
    shutil.copy(goods[1], inbox / "tray 2" / "c.png")
    wait_for(lambda: len(rows_of(out)) == 4)
    refuse(evaluate.main, capsys, run, "--images", chips[0], "--out", out, words=["--out", "another call"])
    watcher.kill()
    (inbox / "a.png").unlink()
    shutil.copy(goods[2], inbox / "d.png")  # arrived while the program was not running
    shutil.copy(chips[2], inbox / "b.png")  # another image under the same name
    (inbox / "broken.png").write_bytes(b"not an image")
    watcher = start(*command)
    wait_for(lambda: len(rows_of(out)) == 6)
    time.sleep(2.5 * watching.LOOK_EVERY)
    watcher.send_signal(signal.SIGINT)
    ended = watcher.ended(seconds=30)
    assert ended.returncode == 130 and "Traceback" not in ended.stderr and "4 images judged so far" in ended.stdout
    (line,) = [line for line in ended.stdout.splitlines() if "broken.png" in line]  # once, until the file changes
    assert line.startswith(f"not judged: {inbox / 'broken.png'}: cannot be read as an image")
    names = [row["file"] for row in rows_of(out)]
    assert sorted(names) == ["a.png", "b.png", "b.png", "d.png", "slow.png", "tray 2/c.png"]
    stamps = {(row["file"], row["bytes"], row["changed"]) for row in rows_of(out)}
    regions = {(row["file"], row["bytes"], row["changed"]) for row in rows_of(out, "regions.csv")}
    assert len(stamps) == 6 and len(regions) >= 2 and regions < stamps
    assert rows_of(out)[0]["anomalous"] == "1" and (out / "report.html").exists()


def test_an_image_may_vanish_while_it_is_judged(run, category, tmp_path, monkeypatch):
    path = Path(shutil.copy(folders.list_images(category / "test" / "chip")[0], tmp_path / "a.png"))

    def loaded_and_gone(path):
        image = load_image(path)
        path.unlink()
        return image

    monkeypatch.setattr(inspection, "load_image", loaded_and_gone)
    decoded = inspection.decode(path, load(run / "model.pt"))
    assert not path.exists() and np.isfinite(decoded.measures).all()


def test_watching_needs_a_folder(run, category, capsys):
    chip = folders.list_images(category / "test" / "chip")[0]
    refuse(evaluate.main, capsys, run, "--images", chip, "--watch", words=["--watch", "folder"])
    refuse(evaluate.main, capsys, run, "--watch", words=["--watch", "--images"])


def test_drift_is_said_while_watching(run, category, tmp_path, capsys):
    inbox, out = tmp_path / "inbox", tmp_path / "out"
    shutil.copytree(category / "test", inbox, ignore=shutil.ignore_patterns("good"))
    watch_until(lambda: len(rows_of(out)) == 12, run, "--images", inbox, "--out", out)
    said = capsys.readouterr().out.splitlines()
    while_watching = said[: next(i for i, line in enumerate(said) if line.startswith("wrote report.html"))]
    assert any(line.startswith("drift:") for line in while_watching)


def test_a_folder_that_vanishes_ends_nothing(tmp_path):
    folder = tmp_path / "tray"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.png").touch()
    listing = watching.Listing(folder)
    assert list(watching.unseen(folder, listing.look(), set())) == [folder / "a.png"]
    shutil.rmtree(folder)
    assert watching.unseen(folder, listing.look(), set()) == {}


def test_few_files_are_asked_each_time_and_none_is_forgotten(tmp_path, monkeypatch):
    """New files are found at once, also in new subfolders. Files that are overwritten in place are found in turn."""
    monkeypatch.setattr(watching, "IN_TURN", 10)
    for number in range(45):
        (tmp_path / f"{number:02}.png").touch()
    listing = watching.Listing(tmp_path)
    assert len(listing.look()) == 45
    looks = [listing.look() for _ in range(8)]
    assert max(map(len, looks)) == 10
    assert {path for look in looks for path in look} == set(tmp_path.iterdir())
    (tmp_path / "tray").mkdir()
    (tmp_path / "tray" / "new.png").touch()
    assert tmp_path / "tray" / "new.png" in listing.look()


def test_hidden_files_and_folders_are_not_watched(tmp_path):
    (tmp_path / ".thumbs").mkdir()
    for name in ("a.png", "._a.png", ".thumbs/a.png"):
        (tmp_path / name).touch()
    assert watching.Listing(tmp_path).look() == [tmp_path / "a.png"]


def test_the_last_fifty_are_the_last_judged(tmp_path):
    """A camera reuses names. a.png was judged twice, and last; c.png was judged by an earlier detector."""
    rows = ["c.png,9,0,,,,,5,1,old,1", "a.png,1,0,,,,,5,1,new,1", "b.png,2,0,,,,,5,2,new,1", "a.png,3,0,,,,,6,3,new,1"]
    header = ",".join(inspection.SCORES_COLUMNS)
    (tmp_path / "scores.csv").write_text("\n".join([header, *rows, ""]))
    entries = inspection.entries_of(tmp_path, tmp_path, tmp_path, "new")
    assert [(entry.name, entry.score) for entry in entries] == [("b.png", 2), ("a.png", 3)]
    (tmp_path / "category" / "train").mkdir(parents=True)
    (tmp_path / "category" / "train" / "good").symlink_to(tmp_path)  # the images of the training are behind a link
    assert all(entry.is_trained_on for entry in inspection.entries_of(tmp_path, tmp_path, tmp_path / "category", "new"))


def test_after_a_retraining_a_camera_keeps_its_history(run, category, tmp_path, monkeypatch, capsys):
    """The same call without --out, with another detector in the same run folder."""
    inbox = tmp_path / "inbox"
    shutil.copytree(category / "test" / "chip", inbox)
    out = tmp_path / "predictions" / "run" / "inbox"
    monkeypatch.chdir(tmp_path)
    watch_until(lambda: len(rows_of(out)) == 4, run, "--images", inbox)
    before, page = rows_of(out), (out / "report.html").read_bytes()
    saved = read_checkpoint(run / "model.pt")
    saved["state"]["good_scores"] += 0.5
    torch.save(saved, run / "model.pt")
    shutil.copy(category / "test" / "good" / "000.png", inbox / "new.png")
    capsys.readouterr()
    watch_until(lambda: len(rows_of(out)) == 5, run, "--images", inbox)
    assert "4 images judged so far" in capsys.readouterr().out
    after = rows_of(out)
    assert after[:4] == before and after[4]["file"] == "new.png"
    assert after[4]["detector"] == measuring.detector_fingerprint(saved["state"]) != before[0]["detector"]
    assert (out / f"report-{before[0]['detector']}.html").read_bytes() == page


def test_both_signals_end_it_in_order_also_in_the_background(run, category, tmp_path):
    """Started with SIGINT ignored, as nohup and & do."""
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    shutil.copy(folders.list_images(category / "test" / "chip")[0], inbox)
    outs = {number: tmp_path / f"{number}" for number in (signal.SIGTERM, signal.SIGINT)}
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        watchers = {
            number: start("evaluate.py", run, "--images", inbox, "--out", out, "--watch", "--device", "cpu")
            for number, out in outs.items()
        }
    finally:
        signal.signal(signal.SIGINT, before)
    for number, out in outs.items():
        watcher = watchers[number]
        wait_for(lambda out=out: len(rows_of(out)) == 1)
        (out / "report.html").unlink(missing_ok=True)
        watcher.send_signal(number)
        ended = watcher.ended(seconds=30)
        assert ended.returncode == 128 + number and "Traceback" not in ended.stderr
        assert "wrote report.html" in ended.stdout and (out / "report.html").exists()
