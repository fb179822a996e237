"""What the tests share: scripts in this process and in real ones, drawn categories."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clflow
import evaluate
from kit import calibration
from kit.backbone import Backbone
from kit.command_line import run_script
from kit.demo import draw_sheet
from kit.files import LIST
from methods import load
from synth import synthesize

ROOT = Path(__file__).parents[1]
LITE = ["--backbone", "efficientnet_lite0"]
FINISHED = ["--epochs", 3, "--size", 192, "--batch", 256, "--bank", 400]  # of finished_run
NEAREST = ["--method", "nearest", *LITE, "--size", 128, "--bank", 400]
QUICK = [*LITE, "--size", 64, "--epochs", 1, "--steps", 1, "--batch", 64]
QUICKEST = ["--method", "nearest", *LITE, "--size", 64, "--bank", 40]  # where the method does not matter
SMALL = {"train/good": 24, "test/good": 8, "test/crack": 4, "test/chip": 4, "test/stain": 4}
TINY = {"train/good": 12, "test/good": 5, "test/chip": 3}  # for tests that do not look at how well it learns
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
NOWHERE = ROOT / "no-such-folder"
PATIENT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train, kit.command_line
kit.command_line.AFTER_THE_FIRST = 60
train.run_script(train.main)
"""  # train.py on a machine that may be slow


def take_few_steps(patch: pytest.MonkeyPatch, painted: int, steps: int, in_thirds: int | None = None) -> None:
    """CL-Flow paints this many defects, and has this many steps per epoch, to save time. Tests that do not look at the
    threshold may take even fewer steps `in_thirds`, when the calibration trains on two thirds of the images."""
    patch.setattr(clflow, "PAINTED", painted)
    patch.setattr(clflow, "STEPS_PER_EPOCH", steps)
    if in_thirds is None:
        return
    retrain = calibration.retrain

    def retrain_briefly(*arguments) -> None:
        with pytest.MonkeyPatch.context() as brief:
            brief.setattr(clflow, "STEPS_PER_EPOCH", in_thirds)
            retrain(*arguments)

    patch.setattr(calibration, "retrain", retrain_briefly)


def call(main, *arguments: object) -> None:
    """Call a script's `main` in this process, as from the command line."""
    main([str(argument) for argument in arguments])


def draw_synthetic(arguments: list[str]) -> None:
    """`python synth.py` with these arguments."""
    draw_sheet(synthesize, arguments)


def refuse(main, capsys, *arguments: object, words: list) -> None:
    """Check that `main` with these arguments writes one line that contains these words, and exits with code 2."""
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: call(main, *arguments))
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and stderr.count("\n") == 1, stderr
    assert all(str(word) in stderr for word in words), stderr


def script(*arguments: object, **options) -> subprocess.CompletedProcess:
    """Run a command as a process of its own."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


def visible(folder: Path) -> list[str]:
    """The names of the files in a folder, except the list of the program's own files."""
    return sorted(path.name for path in folder.iterdir() if path.name != LIST)


def check_export(run: Path, images: torch.Tensor, to: Path, tolerance: float, loads: bool = True) -> None:
    """Check that the exported program gives the maps and scores of the run's own model in float32, if this model also
    searches the whole bank; otherwise nearly the same scores. Without `loads` the program is not read back from its
    file, which takes longest."""
    programs = []
    save = torch.export.save

    def keep_and_save(program: torch.export.ExportedProgram, file: object) -> None:
        programs.append(program)
        save(program, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export, "save", keep_and_save)
        call(evaluate.main, run, "--export", to)
    (program,) = programs
    if loads:
        program = torch.export.load(to)
    model = load(run / "model.pt")
    model.full_precision = True
    with torch.no_grad():
        exported = program.module()(images)
        _, scores = model(images)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            whole = model(images)
    for ours, theirs in zip(whole, exported, strict=True):
        assert ours.std() > 1e-3 and (ours - theirs).abs().max() < tolerance
    assert torch.allclose(scores, exported[1], rtol=0.03, atol=0.01)


def mask_of(path: Path) -> np.ndarray:
    """The true mask of a test image of a drawn category."""
    return np.asarray(Image.open(path.parents[2] / "ground_truth" / path.parent.name / path.name))


class NoBackbone(Backbone):
    """For detectors whose energies come from the pixels."""

    stride = 1
    reach = 0
