"""train.py as a user runs it: in this process, except where a test needs a process of its own."""

import csv
import gc
import json
import shutil
import signal
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked import start, wait_for
from helpers import FINISHED, LITE, QUICK, QUICKEST, ROOT, call, refuse, take_few_steps, visible
from PIL import Image

import clflow
import evaluate
import train
from kit import InputError, calibration, data, folders, search
from kit.demo import COUNTS, draw_demo
from kit.detector import read_checkpoint
from kit.files import LIST, STATE, UNFINISHED, OwnFiles, locked
from kit.processes import ALONE, Processes
from kit.rows import good_rows, painted_rows
from kit.training import Descent
from methods import autoencoder, load, paper


def log_of(run) -> list[dict]:
    with open(run / "log.csv") as file:
        return list(csv.DictReader(file))


def test_training_needs_no_test_folder_and_writes_its_log(finished_run):
    rows = log_of(finished_run)
    assert list(rows[0]) == ["epoch", "loss", "nll", "classification", "contrast", "seconds"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["nll"]) < float(rows[0]["nll"])
    assert Image.open(finished_run / "loss.png").width == 960
    assert visible(finished_run) == ["log.csv", "loss.png", "model.pt"]


# ---------------------------------------------------------------- held-out images


def test_the_model_is_calibrated_on_the_held_out_images_and_trained_on_the_others(category, tmp_path, monkeypatch):
    seen = {"held_out": set()}
    batches = data.batches

    def encoding(files, size):
        seen["held_out"].update(files)  # called again for images that are not kept in memory
        return batches(files, size)

    def fitting(model, pairs):
        seen.update(trained=set(pairs.files))
        return good_rows(model, pairs)

    def painting(model, pairs, images):
        seen.update(painted=set(pairs.files), textures=pairs.textures)
        return painted_rows(model, pairs, images)

    monkeypatch.setattr(data, "batches", encoding)
    monkeypatch.setattr("kit.rows.good_rows", fitting)
    monkeypatch.setattr("kit.rows.painted_rows", painting)
    noise = tmp_path / "textures" / "striped" / "noise.png"
    noise.parent.mkdir(parents=True)
    Image.effect_noise((64, 64), 80).save(noise)
    options = [*QUICK, "--textures", tmp_path / "textures"]
    call(train.main, "--data", category, "--out", tmp_path / "run", *options)
    assert len(seen["held_out"]) == 6 and not seen["trained"] & seen["held_out"]
    assert seen["painted"] == seen["trained"] and seen["textures"] == [noise]
    assert seen["trained"] | seen["held_out"] == set(folders.list_images(category / "train/good"))
    model = load(tmp_path / "run" / "model.pt")
    scores = [model.inspect(path).score for path in seen["held_out"]]
    assert sorted(model.good_scores[0, :6].tolist()) == pytest.approx(sorted(scores), abs=0.02)
    assert model.good_scores.shape == (2, 24)  # all good images; training images are judged as if new


# ---------------------------------------------------------------- seeds, choices, layouts


def test_same_seed_same_weights_and_another_seed_others(run_with_all_files, tiny, tmp_path):
    states = [read_checkpoint(run_with_all_files / "model.pt")["state"]]  # of seed 0
    for name, seed in (("b", 0), ("c", 1)):
        call(train.main, "--data", tiny, "--out", tmp_path / name, *QUICK, "--seed", seed)
        states.append(read_checkpoint(tmp_path / name / "model.pt")["state"])
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["flow.couplings.0.log_scale"], states[2]["flow.couplings.0.log_scale"])


def test_epochs_differ_in_their_random_numbers(tiny, tmp_path, monkeypatch):
    """Seeds count modulo 2^32: the epoch must not be lost in the upper bits."""
    draws, forward = [], clflow.Losses.forward

    def recording(*args):
        draws.append(torch.randint(10**9, (1,)).item())
        return forward(*args)

    monkeypatch.setattr(clflow.Losses, "forward", recording)
    call(train.main, "--data", tiny, "--out", tmp_path, *QUICK, "--epochs", 2)
    steps = 2 * clflow.STEPS_PER_EPOCH
    assert len(draws) == (1 + calibration.FOLDS) * steps  # each fold trains for the same number of steps
    assert len(set(draws[:steps])) == steps


def test_every_open_choice_can_be_flipped(tiny, tmp_path):
    choices = ["--contrast-weight", 0, "--classification-weight", 0, "--no-local", "--steps", 2]
    call(train.main, "--data", tiny, "--out", tmp_path / "run", *QUICK, *choices)
    assert list(log_of(tmp_path / "run")[0]) == ["epoch", "loss", "nll", "seconds"]
    model = load(tmp_path / "run" / "model.pt")
    assert len(model.flow.couplings) == 2 and model.classifier is None and len(model.levels) == 1


@pytest.mark.parametrize("layout", ["btad", "plain", "deep", "grey"])
def test_folders_of_other_kinds(tiny, tmp_path, layout, capsys):
    """BTAD with .bmp; a folder with good images only; 16-bit; grey and not square, in a path with a space."""
    folder = tmp_path / "my data"
    good = folder if layout == "plain" else folder / "train" / ("ok" if layout == "btad" else "good")
    parts = {tiny / "train/good": good}
    if layout != "plain":
        parts |= {tiny / "test/good": folder / "test/ok", tiny / "test/chip": folder / "test/ko"}
    for source, target in parts.items():
        target.mkdir(parents=True)
        for path in folders.list_images(source)[:6]:
            image = Image.open(path)
            if layout == "deep":
                Image.fromarray(np.asarray(image.convert("L"), dtype=np.uint16) * 257).save(target / path.name)
            elif layout == "grey":
                image.convert("L").resize((120, 80)).save(target / path.name)
            else:
                image.save(target / f"{path.stem}.bmp")
    call(train.main, "--data", folder, "--out", tmp_path / "out", *QUICKEST)
    if layout == "plain":
        refuse(evaluate.main, capsys, tmp_path / "out", words=["test/good", "--images"])
    else:
        call(evaluate.main, tmp_path / "out")
        assert json.loads((tmp_path / "out" / "metrics.json").read_text())["pixel_auroc"] is None  # no masks
    call(evaluate.main, tmp_path / "out", "--images", good, "--out", tmp_path / "new")
    assert len(list((tmp_path / "new").glob("*.png"))) == 6


@pytest.mark.usefixtures("background_processes")
def test_demo_trains_and_evaluates_without_data(tmp_path, monkeypatch):
    counts = dict.fromkeys(COUNTS, 4) | {"train/good": 24, "test/good": 8}
    monkeypatch.setattr("kit.demo.draw_demo", partial(draw_demo, counts=counts))
    take_few_steps(monkeypatch, painted=64, steps=50, in_thirds=5)
    call(train.main, "--out", tmp_path / "demo", "--epochs", 1, "--batch", 512)
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert metrics["image_auroc"] >= 0.95 and metrics["backbone"] == "efficientnet_lite0"
    assert len(list((tmp_path / "demo/data/demo/train/good").iterdir())) == 24
    assert len(list((tmp_path / "demo/pictures").glob("*/*.png"))) == 8 + 4 * 4


def test_folder_of_categories_and_seeds(category, tiny, tmp_path):
    for name in ("nut", "bolt"):
        shutil.copytree(tiny, tmp_path / "all" / name)
        # An epoch's checkpoint has a threshold from the held-out images alone, so there must be more of these.
        for path in folders.list_images(category / "train/good")[12:20]:
            shutil.copy(path, tmp_path / "all" / name / "train/good")
        for kind in ("good", "chip"):  # two images of each kind are enough
            for path in folders.list_images(tmp_path / "all" / name / "test" / kind)[2:]:
                path.unlink()
    shutil.rmtree(tmp_path / "all" / "bolt" / "ground_truth")
    out = tmp_path / "out"
    command = ["--data", tmp_path / "all", "--out", out, *QUICK, "--seeds", 2, "--keep-epochs"]
    command += ["--classification-weight", 0, "--contrast-weight", 0]  # nothing is painted, to save time
    call(train.main, *command)
    rows = json.loads((out / "results.json").read_text())
    assert [(r["category"], r["seed"]) for r in rows] == [("bolt", 0), ("bolt", 1), ("nut", 0), ("nut", 1)]
    table = (out / "table.md").read_text().splitlines()
    pair = [r["image_auroc"] for r in rows if r["category"] == "nut"]
    assert f"| {np.mean(pair):.4f} ± {np.std(pair, ddof=1):.4f} |" in table[3] and "n/a" in table[2]

    before = {p: p.stat().st_mtime_ns for p in out.glob("*/*/*")}
    call(train.main, *command, "--resume")
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("*/*/*")}

    # Metrics at another threshold, or on other images, must not get into the table.
    call(evaluate.main, out / "nut" / "seed0", "--false-alarm", 0.5)
    call(evaluate.main, out / "nut" / "seed1", "--data", tmp_path / "all" / "bolt")
    call(evaluate.main, out / "bolt" / "seed1" / "epoch_01.pt")
    call(train.main, *command, "--resume")
    again = json.loads((out / "results.json").read_text())
    times = {"ms_per_image": 0}
    assert [row | times for row in again] == [row | times for row in rows]

    call(evaluate.main, out, "--curve")
    curves = json.loads((out / "curve.json").read_text())
    assert curves["image_auroc"]["nut/seed1"] == [[1, pytest.approx(rows[3]["image_auroc"])]]
    assert Image.open(out / "curve.png").width == 960
    call(evaluate.main, out / "nut" / "seed0", "--curve")
    call(evaluate.main, out / "nut" / "seed0")
    assert (out / "nut" / "seed0" / "curve.png").exists()  # an evaluation replaces its own files alone


# ---------------------------------------------------------------- interruptions


@pytest.mark.parametrize(
    "method",
    [
        [*LITE, "--steps", 2, "--batch", 64],
        ["--method", "autoencoder", *LITE, "--bank", 100],
        ["--method", "paper", *LITE, "--steps", 1, "--batch", 8],
    ],
)
def test_interrupted_training_resumes_to_the_same_weights(category, tmp_path, monkeypatch, capsys, method):
    """Ctrl-C in the second of two epochs leaves a usable checkpoint. --resume gives the result of an uninterrupted
    run."""
    monkeypatch.setattr(autoencoder, "IMAGES_PER_EPOCH", 18)
    monkeypatch.setattr(paper, "IMAGES_PER_EPOCH", 18)
    mine = tmp_path / "mine"
    shutil.copytree(category / "train", mine / "train")
    shutil.copytree(category / "test" / "chip", mine / "test" / "chip")
    shutil.copytree(category / "test" / "good", mine / "test" / "good")

    def arguments(out, *more):
        return ["--data", mine, "--out", tmp_path / out, *method, "--size", 64, "--epochs", 2, *more]

    call(train.main, *arguments("whole"))
    step, steps = torch.optim.Adam.step, []
    # In the second epoch. For the other methods an epoch has 3 steps: 18 images in batches of 8.
    interrupted_at = 3 + 2 if "--method" in method else clflow.STEPS_PER_EPOCH + 3

    def interrupted(self, *args):
        steps.append(1)
        if len(steps) == interrupted_at:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(train.main, *arguments("parts"))
    assert visible(tmp_path / "parts") == ["unfinished"]
    assert visible(tmp_path / "parts" / "unfinished") == ["log.csv", "loss.png", "state.pt"]
    stopped = load(tmp_path / "parts" / "unfinished" / "state.pt")
    assert torch.isfinite(stopped(torch.rand(1, 3, 64, 64))[1]).all()
    if "--method" in method:
        call(evaluate.main, tmp_path / "parts", "--images", mine / "test/chip/000.png", "--out", tmp_path / "found")
    else:
        call(evaluate.main, tmp_path / "parts")
    assert "not finished" in capsys.readouterr().out

    refuse(train.main, capsys, *arguments("parts"), words=["unfinished training", "--resume"])
    refuse(train.main, capsys, *arguments("parts", "--resume", "--lr", 0.1), words=["was started with --lr 0.002;"])
    refuse(train.main, capsys, *arguments("parts", "--resume", "--size", "64x96"), words=["started with --size 64;"])
    spare = folders.list_images(mine / "train" / "good")[3]
    spare.rename(spare.with_name("renamed.png"))  # the same number of images, but not the same ones
    refuse(train.main, capsys, *arguments("parts", "--resume"), words=["missing: train/good/003.png;", "--out"])
    spare.with_name("renamed.png").rename(spare)
    before = spare.read_bytes()
    shutil.copy(folders.list_images(mine / "test" / "good")[0], spare)  # the same name, but another image
    refuse(train.main, capsys, *arguments("parts", "--resume"), words=["good images of", "have changed"])
    spare.write_bytes(before)

    call(train.main, *arguments("parts", "--resume"))
    whole, parts = (load(tmp_path / name / "model.pt").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert [row["epoch"] for row in log_of(tmp_path / "parts")] == ["1", "2"]
    assert visible(tmp_path / "parts") == ["log.csv", "loss.png", "model.pt"]
    call(train.main, *arguments("parts", "--resume"))
    assert "already finished; to train again" in capsys.readouterr().out
    refuse(train.main, capsys, *arguments("parts", "--resume", "--epochs", 5), words=["was started with --epochs 2;"])


def test_training_in_place_of_an_older_run_leaves_nothing_of_it(run_with_all_files, tiny, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run_with_all_files, out)
    gone = OwnFiles(out, "measured").claim("pictures/chip/gone.png")
    gone.write_text("of an image that is not there any more")
    call(evaluate.main, out)
    assert not (out / "pictures" / "chip" / "gone.png").exists()
    call(train.main, "--data", tiny, "--out", out, *QUICK)
    assert visible(out) == ["log.csv", "loss.png", "model.pt"]


def contents(folder) -> dict[str, bytes]:
    """All files below a folder, except those of an unfinished training and the lists of our files."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    below = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        name: path.read_bytes() for name, path in below.items() if not name.startswith(UNFINISHED) and path.name != LIST
    }


@pytest.fixture(scope="module")
def run_with_all_files(tiny, tmp_path_factory):
    """A trained, measured and recalibrated run; tests only copy it."""
    out = tmp_path_factory.mktemp("all_files") / "run"
    call(train.main, "--data", tiny, "--out", out, *QUICK, "--keep-epochs")
    call(evaluate.main, out)
    call(evaluate.main, out, "--recalibrate", tiny / "test" / "good")
    return out


@pytest.mark.parametrize("stopped_after", [0, 1])
def test_a_retraining_that_is_stopped_leaves_the_detector_before(
    run_with_all_files, tiny, tmp_path, monkeypatch, capsys, stopped_after
):
    """It stops before its first step, or after an epoch. The earlier detector still judges, and --resume continues the
    new one."""
    out = tmp_path / "run"
    shutil.copytree(run_with_all_files, out)
    command = ["--data", tiny, "--out", out, *QUICK]
    before = contents(out)
    assert {"model.pt", "log.csv", "loss.png", "epoch_01.pt", "recalibrated.pt", "metrics.json"} < set(before)
    keep = train.keep

    def stopping(epoch, *rest):
        keep(epoch, *rest)
        if epoch.number == stopped_after:
            raise KeyboardInterrupt

    again = [*command, "--seed", 1, "--epochs", 2]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "keep", stopping)
        call(train.main, *again)
    assert contents(out) == before
    capsys.readouterr()
    call(evaluate.main, out, "--images", tiny / "test" / "chip", "--out", tmp_path / "found")
    said = capsys.readouterr().out
    assert "a later training in this folder is not finished" in said and contents(out) == before
    call(train.main, *again, "--resume")
    assert load(out / "model.pt").settings.seed == 1
    assert visible(out) == ["log.csv", "loss.png", "model.pt"] and len(log_of(out)) == 2


def test_a_first_training_that_is_stopped_before_its_first_epoch_judges_nothing(tiny, tmp_path, monkeypatch, capsys):
    keep = train.keep

    def stopping(*args):
        keep(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "keep", stopping)
        call(train.main, "--data", tiny, "--out", tmp_path / "run", *QUICK)
    command = [tmp_path / "run", "--images", tiny / "test" / "chip", "--out", tmp_path / "found"]
    refuse(evaluate.main, capsys, *command, words=["before the first epoch", "--resume"])
    command = [tmp_path / "run", "--export", tmp_path / "untrained.pt2"]
    refuse(evaluate.main, capsys, *command, words=["before the first epoch", "--resume"])
    assert not (tmp_path / "untrained.pt2").exists()


def test_two_links_to_folders_of_one_name_are_two_runs(tiny, tmp_path):
    for plant in ("A", "B"):
        shutil.copytree(tiny / "train", tmp_path / plant / "bottle" / "train")
        (tmp_path / "cats").mkdir(exist_ok=True)
        (tmp_path / "cats" / f"plant{plant}").symlink_to(tmp_path / plant / "bottle")
    call(train.main, "--data", tmp_path / "cats", "--out", tmp_path / "out", *QUICKEST)
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("model.pt")}
    assert found == {"plantA/seed0/model.pt", "plantB/seed0/model.pt"}
    assert load(tmp_path / "out/plantB/seed0/model.pt").settings.category == "plantB"


def test_no_two_runs_share_a_folder(category, tmp_path, capsys):
    """Two categories, and links among the folders of their runs."""
    for name in "ab":
        shutil.copytree(category / "train", tmp_path / "cats" / name / "train")
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "b").symlink_to(tmp_path / "out" / "a")
    command = ["--data", tmp_path / "cats", "--out", tmp_path / "out", *QUICK]
    refuse(train.main, capsys, *command, words=["the runs of both", "cats/a", "cats/b"])


def test_figures_of_a_run_where_another_call_is_writing_are_not_touched(run_with_all_files, tiny, tmp_path, capsys):
    """Each of several runs is locked before anything in its folder is changed."""
    out = tmp_path / "out"
    command = ["--data", tiny, "--out", out, *QUICK, "--seeds", 2]
    second = out / tiny.name / "seed1"
    shutil.copytree(run_with_all_files, second)
    before = contents(second)
    with locked(second):
        refuse(train.main, capsys, *command, words=["seed1", "another call is writing"])
    assert contents(second) == before and "metrics.json" in before


SLOW_WRITES = f"""
import sys, time, torch
sys.path.insert(0, {str(ROOT)!r})
save = torch.save
def slow(what, to):
    import io
    buffer = io.BytesIO()
    save(what, buffer)
    half = len(buffer.getvalue()) // 2
    with open(to, "wb") as file:
        for part in (buffer.getvalue()[:half], buffer.getvalue()[half:]):
            file.write(part)
            file.flush()
            time.sleep(0.3)
torch.save = slow
import clflow, train
clflow.PAINTED, clflow.STEPS_PER_EPOCH = 32, 10
train.main(sys.argv[1:])
"""


def test_a_kill_within_a_write_leaves_the_checkpoint_before(tiny, tmp_path):
    """Two kills, each while a checkpoint is half written, the third of its process. --resume continues the training in
    between."""
    (tmp_path / "slow.py").write_text(SLOW_WRITES)
    command = [tmp_path / "slow.py", "--data", tiny, "--out", tmp_path / "run", *QUICK, "--device", "cpu"]
    command += ["--epochs", 40, "--resume"]
    command += ["--classification-weight", 0, "--contrast-weight", 0]  # nothing is painted, to save time
    folder = tmp_path / "run" / UNFINISHED
    epochs = []
    for _ in range(2):
        process = start(*command)
        half = folder / f"{STATE}.tmp{process.pid}"
        deadline, seen = time.time() + 100, 0
        while seen < 3 and time.time() < deadline and process.returncode is None:
            if half.exists():
                seen += 1
                while seen < 3 and half.exists() and process.returncode is None:
                    time.sleep(0.01)
            time.sleep(0.01)
        assert process.returncode is None and seen == 3, process.stderr.read_text()
        time.sleep(0.15)  # during the pause in the middle of the write
        process.kill()
        assert half.exists(), "killed beside the write"
        epochs.append(len(read_checkpoint(folder / STATE)["progress"]["log"]))
    assert epochs == [1, 2]


# ---------------------------------------------------------------- bad input


def test_bad_training_input(category, tmp_path, capsys):
    def attempt(*arguments, words):
        refuse(train.main, capsys, "--out", tmp_path / "out", *arguments, words=words)

    (tmp_path / "empty").mkdir()
    (tmp_path / "bare" / "train" / "good").mkdir(parents=True)
    (tmp_path / "one").mkdir()
    shutil.copy(folders.list_images(category / "train" / "good")[0], tmp_path / "one")
    shutil.copytree(category / "train", tmp_path / "broken" / "train")
    (tmp_path / "broken" / "train" / "good" / "zz.png").write_bytes(b"\x89PNG broken")
    (tmp_path / "weights.pth").write_bytes(b"not weights")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    attempt("--data", tmp_path / "nowhere", words=["--data", "no such folder"])
    attempt("--data", tmp_path / "empty", words=["--data", "empty", "train/good"])
    attempt("--data", tmp_path / "bare", words=["bare", "no images", "train/good"])
    attempt("--data", tmp_path / "one", words=["only 1 good images", "give at least 5"])
    attempt("--data", tmp_path / "broken", *LITE, "--size", 64, words=["zz.png"])
    attempt("--data", category, "--backbone", "vgg", words=["--backbone", "vgg", "resnet18"])
    attempt("--data", category, "--weights", tmp_path / "weights.pth", words=["weights.pth", "--weights"])
    attempt("--data", category, "--weights", tmp_path / "other.pth", words=["other.pth", "fit"])
    attempt("--data", category, *LITE, "--textures", tmp_path / "empty", words=["--textures"])
    refuse(train.main, capsys, *QUICK, "--out", tmp_path / "weights.pth", words=["weights.pth"])
    for part in ("train/good/run", "test/run"):
        refuse(
            train.main, capsys, "--data", category, *LITE, "--out", category / part, words=["--out", "images are read"]
        )
    for flag, value in (("--epochs", 0), ("--seeds", 0), ("--size", 63), ("--epochs", "x"), ("--device", "x"),
                        ("--contrast", "x"), ("--smoothing", 2), ("--seed", -1), ("--lr", 0)):  # fmt: skip
        attempt("--data", category, *LITE, flag, value, words=[flag])


class Product(torch.nn.Module):
    """A loss for `Descent`: the sum of its two weights times a number."""

    model = SimpleNamespace(settings=SimpleNamespace(lr=0.1, epochs=1))

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def forward(self, number):
        return {"loss": (self.weight * number).sum()}


def test_a_training_that_diverges_ends_before_the_step():
    losses = Product()
    descent = Descent(losses, steps_per_epoch=10, weight_decay=0.0, processes=ALONE)
    assert descent.step([torch.tensor(3.0)]) == {"loss": 6}
    before = losses.weight.detach().clone()
    assert (before < 1).all()
    for number, loss in ((torch.nan, "nan"), (torch.inf, "inf")):
        with pytest.raises(InputError, match=rf"--lr: training diverged \(the loss is {loss}\); try a lower"):
            descent.step([torch.tensor(number)])
    assert torch.equal(losses.weight, before)


def test_options_without_effect_are_refused(category, tmp_path, capsys):
    def attempt(*arguments, words):
        refuse(train.main, capsys, "--data", category, "--out", tmp_path / "out", *arguments, words=words)

    for flag, value in (("--steps", 2), ("--classification-weight", 1), ("--contrast-weight", 1),
                        ("--contrast", "cosine"), ("--temperature", 2), ("--smoothing", 0)):  # fmt: skip
        attempt("--method", "autoencoder", flag, value, words=[flag, "--method autoencoder"])
    attempt("--contrast-weight", 0, "--temperature", 2, words=["--temperature", "no effect", "--contrast-weight 0"])
    for form in ("cosine", "energy"):
        attempt("--contrast", form, words=["--contrast has no effect with --method clflow"])
    attempt("--classification-weight", 0, "--smoothing", 0.2, words=["--smoothing", "no effect"])
    no_losses = ["--classification-weight", 0, "--contrast-weight", 0]
    for method in ("clflow", "paper"):
        attempt("--method", method, *no_losses, "--textures", "x", words=["--textures has no effect"])
    attempt("--no-local", "--bank", 99, words=["--bank", "no effect", "--no-local"])
    attempt("--method", "neares", words=["--method", "neares", "clflow", "paper", "nearest", "autoencoder"])


def test_weights_are_refused_where_every_run_has_its_own(run, category, tmp_path, capsys):
    """A resumed run has the backbone's weights in its checkpoint. A new run reads them."""
    command = ["--data", load(run / "model.pt").settings.data, *LITE, "--weights", tmp_path / "gone.pth", "--resume"]
    refuse(train.main, capsys, *command, "--out", run, words=["--weights has no effect with --resume"])
    refuse(train.main, capsys, *command, "--out", tmp_path / "new", words=["gone.pth", "cannot load ImageNet weights"])
    (tmp_path / "two" / category.name / "seed0").mkdir(parents=True)
    first = OwnFiles(tmp_path / "two" / category.name / "seed0", "trained")
    shutil.copy(run / "model.pt", first.claim("model.pt"))
    some = [*command, "--out", tmp_path / "two", "--seeds", 2]  # the second one has no checkpoint
    refuse(train.main, capsys, *some, *FINISHED, words=["gone.pth", "cannot load"])


def test_two_folders_of_the_same_name_do_not_share_a_run(tiny, tmp_path, monkeypatch, capsys):
    for name in "ab":
        shutil.copytree(tiny / "train" / "good", tmp_path / name / "good")
    monkeypatch.chdir(tmp_path)
    call(train.main, "--data", "a/good", *QUICKEST)
    assert (tmp_path / "runs" / "good" / "model.pt").exists()
    refuse(train.main, capsys, "--data", "b/good", *QUICKEST, words=["runs/good", "a/good", "--out"])


@pytest.mark.usefixtures("background_processes")
def test_unreadable_image_in_a_loader_worker_is_named_in_one_line(tiny, tmp_path, monkeypatch, capsys):
    shutil.copytree(tiny / "train", tmp_path / "data" / "train")
    monkeypatch.setattr("kit.good.CACHE_BYTES", 0)  # so that the workers decode
    fit = clflow.CLFlow.fit

    def spoil(model, rows, images, positions):
        fit(model, rows, images, positions)
        for path in (tmp_path / "data" / "train" / "good").iterdir():
            path.write_bytes(b"broken")

    monkeypatch.setattr(clflow.CLFlow, "fit", spoil)
    refuse(train.main, capsys, "--data", tmp_path / "data", "--out", tmp_path / "out", *QUICK,
           words=["error: ", "good", ".png"])  # fmt: skip
    # The garbage collector would wait five seconds for the workers of the loader that failed.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    gc.collect()


def test_weights_that_cannot_be_downloaded(category, tmp_path, monkeypatch, capsys):
    for name, value in (("TORCH_HOME", str(tmp_path)), ("http_proxy", "http://127.0.0.1:9"),
                        ("https_proxy", "http://127.0.0.1:9")):  # a proxy that refuses  # fmt: skip
        monkeypatch.setenv(name, value)
    refuse(train.main, capsys, "--data", category, "--out", tmp_path / "out", words=["--weights", "efficientnet_lite0"])


def test_skip_bad_goes_on_and_counts(tiny, tmp_path, capsys):
    shutil.copytree(tiny / "train" / "good", tmp_path / "images")
    whole = (tmp_path / "images" / "000.png").read_bytes()
    (tmp_path / "images" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    call(train.main, "--data", tmp_path / "images", "--out", tmp_path / "run", *QUICKEST, "--skip-bad")
    said = capsys.readouterr().out
    assert "skipped 1 of 13 images" in said and "truncated.png" in said


def test_what_no_run_wrote_is_not_removed(tiny, tmp_path, capsys):
    """A foreign file with the name of one of a run's files is refused before anything is done. Foreign folders stay;
    here one even has the images."""
    mine = tmp_path / "pictures"
    shutil.copytree(tiny / "train" / "good", mine)
    out = tmp_path / "out"
    shutil.copytree(mine, out / "pictures")
    call(train.main, "--data", mine, "--out", out, *QUICKEST)
    assert len(folders.list_images(mine)) == len(folders.list_images(out / "pictures")) == 12
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.pt").write_text("mine")
    words = ["model.pt", "give another --out"]
    refuse(train.main, capsys, "--data", tiny, "--out", tmp_path / "other", *QUICKEST, words=words)
    assert (tmp_path / "other" / "model.pt").read_text() == "mine"


def test_copies_of_one_image_are_refused_and_leave_nothing(category, tmp_path, capsys):
    one = folders.list_images(category / "train" / "good")[0]
    (tmp_path / "copies").mkdir()
    for number in range(12):  # the same pixels, but other bytes
        Image.open(one).save(tmp_path / "copies" / f"{number}.png", dpi=(number + 1, 1))
    command = ["--data", tmp_path / "copies", "--out", tmp_path / "out", *QUICK]
    refuse(train.main, capsys, *command, words=["--data", "copies of each other"])
    assert not list((tmp_path / "out").rglob("state.pt"))


def test_a_bank_of_all_rows_leaves_rows_to_learn_from(category, tmp_path):
    """There are as many prototypes as candidates. Each is its own nearest prototype, except for other images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "CANDIDATES", 100)
        patch.setattr("kit.rows.CANDIDATES", 100)
        call(train.main, "--data", category, "--out", tmp_path, *QUICK, "--bank", 100)
    model = load(tmp_path / "model.pt")
    assert len(model.prototypes.bank) == 100 and torch.isfinite(model.good_scores).all()


def test_training_does_not_even_list_the_test_folder(tiny, tmp_path, monkeypatch, capsys):
    def refused(category):
        raise AssertionError("training looks for test images")

    monkeypatch.setattr(folders, "test_folders", refused)
    call(train.main, "--data", tiny, "--out", tmp_path / "run", *QUICK)
    assert "to measure it" in capsys.readouterr().out


def test_a_training_that_could_not_start_leaves_no_mark(run, capsys):
    before = (run / "model.pt").read_bytes()
    options = ["--data", load(run / "model.pt").settings.data, "--out", run, *QUICK, "--weights", "none.pth"]
    refuse(train.main, capsys, *options, words=["none.pth"])
    assert not (run / UNFINISHED).exists() and (run / "model.pt").read_bytes() == before


def test_two_trainings_into_one_folder_the_second_is_refused(category, tmp_path, capsys):
    with locked(tmp_path / "run"):
        words = ["--out", "another call is writing"]
        refuse(train.main, capsys, "--data", category, "--out", tmp_path / "run", *QUICK, words=words)


def test_both_signals_end_a_training_in_order(tiny, tmp_path):
    command = ["train.py", "--data", tiny, *QUICK, "--device", "cpu", "--epochs", 500]
    command += ["--classification-weight", 0, "--contrast-weight", 0]  # nothing is painted, to save time
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and & leave it
    try:
        processes = {
            number: start(*command, "--out", tmp_path / f"{number}") for number in (signal.SIGTERM, signal.SIGINT)
        }
    finally:
        signal.signal(signal.SIGINT, before)
    for number, process in processes.items():
        wait_for(lambda process=process: "\nepoch 2/" in process.stdout.read_text())  # the first one is on the disk now
        process.send_signal(number)
        ended = process.ended(seconds=60)
        said = "stopped; to continue, add --resume to the same command\n"
        assert ended.returncode == 128 + number and ended.stderr == said
        assert read_checkpoint(tmp_path / f"{number}" / UNFINISHED / STATE)["progress"]["epoch"] >= 1


def test_more_processes_than_images_are_refused(category, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "join_processes", lambda: Processes(count=23))
    monkeypatch.setattr(train.dist, "barrier", lambda: None)  # the other processes do not exist
    words = ["23 processes", "18 training images", "start at most 18"]
    refuse(train.main, capsys, "--data", category, "--out", tmp_path / "run", *QUICK, words=words)
