import os

# Tests run on the CPU, so that they are the same on every machine. With CUDA_VISIBLE_DEVICES=0 they run on a GPU, but
# some do not allow for its rounding.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Arrays this small gain nothing from several threads. On a busy machine threads wait for each other: on two cores the
# tests then took more than twice as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import kit  # noqa: F401 (first, before PyTorch is imported)

# isort: split
import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import (
    FINISHED,
    LITE,
    NEAREST,
    NOWHERE,
    PATIENT,
    ROOT,
    SMALL,
    TINY,
    TORCHRUN,
    call,
    take_few_steps,
)
from PIL import Image
from torch.utils.data import DataLoader

import evaluate
import train
from kit import calibration, good
from kit.demo import draw_demo
from kit.windows import keep_freed_memory
from methods import autoencoder, paper

keep_freed_memory()  # as the scripts do


@pytest.fixture(scope="session", autouse=True)
def few_steps():
    """Fewer painted defects, camera copies and steps: most tests look at what a training writes, and not at how well it
    learns. An export compares fewer images, nothing is painted in background processes, and pictures are compressed
    less. All of this holds in copies of this process, but not in scripts in new processes."""
    with pytest.MonkeyPatch.context() as patch:
        take_few_steps(patch, painted=16, steps=5)
        patch.setattr(calibration, "COPIES", 5)
        patch.setattr(good, "LEAST_COPIES", 16)
        patch.setattr(good, "DataLoader", in_this_process)
        patch.setattr(evaluate, "COMPARED", 4)
        patch.setattr(Image.Image, "save", with_fast_png(Image.Image.save))
        yield


def in_this_process(*arguments, **options) -> DataLoader:
    """A loader without background processes. To fork this large process takes longer than painting a few small
    images."""
    return DataLoader(*arguments, **options | {"num_workers": 0, "multiprocessing_context": None})


def with_fast_png(save: Callable) -> Callable:
    """Image.save that writes PNG files faster: they are larger, and have the same pixels."""

    def save_faster(image: Image.Image, to: object, format: str | None = None, **options) -> None:
        if format == "PNG":
            options["compress_level"] = 1
        save(image, to, format, **options)

    return save_faster


@pytest.fixture
def background_processes(monkeypatch):
    """PyTorch's own loader again, for tests of its background processes."""
    monkeypatch.setattr(good, "DataLoader", DataLoader)


@pytest.fixture(scope="session", autouse=True)
def real_processes(request, tmp_path_factory) -> Iterator[dict[str, subprocess.Popen]]:
    """Commands of tests that only wait for a new interpreter, which takes seconds to import PyTorch. They start with
    the session and run beside the first tests. The keys are the names of their tests."""
    patient = tmp_path_factory.mktemp("patient") / "patient.py"
    patient.write_text(PATIENT)
    missing = ["--data", NOWHERE]
    commands = {
        "test_bad_input_is_one_line_in_a_real_process": ["train.py", *missing],
        "test_what_stops_all_processes_is_said_once": [*TORCHRUN, patient, *missing, *LITE, "--device", "cpu"],
    }
    collected = {item.name for item in request.session.items}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = {
        name: subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, **pipes)
        for name, command in commands.items()
        if name in collected
    }
    yield started
    for process in started.values():
        process.terminate()  # torchrun then ends its own processes
        process.wait()


@pytest.fixture(scope="session")
def category(tmp_path_factory) -> Path:
    """A drawn category in MVTec AD layout. Tests must not change it."""
    data = tmp_path_factory.mktemp("small")
    draw_demo(data, SMALL)
    return data


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A drawn category with fewer images. Tests must not change it."""
    data = tmp_path_factory.mktemp("tiny")
    draw_demo(data, TINY)
    return data


@pytest.fixture(scope="session")
def pair(tiny, tmp_path_factory) -> Path:
    """The test images of a category, one good and one defective, for tests that look at files, lines and refusals.
    Tests must not change it."""
    data = tmp_path_factory.mktemp("pair")
    for name in ("test/good/000.png", "test/chip/000.png", "ground_truth/chip/000.png"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny / name, data / name)
    return data


def train_blind(category: Path, out: Path, *options: object) -> Path:
    """The run folder `out`. Training could not see the category's test folder."""
    blind = out.with_name(f"{out.name}-category") / category.name
    shutil.copytree(category / "train", blind / "train")
    call(train.main, "--data", blind, "--out", out, *options)
    shutil.copytree(category / "test", blind / "test")
    shutil.copytree(category / "ground_truth", blind / "ground_truth")
    return out


@pytest.fixture(scope="session")
def finished_run(category, tmp_path_factory) -> Path:
    """A CL-Flow run. Tests must not change it; they change a copy."""
    with pytest.MonkeyPatch.context() as patch:
        take_few_steps(patch, painted=64, steps=50)
        patch.setattr(calibration, "COPIES", 10)
        return train_blind(category, tmp_path_factory.mktemp("run"), *LITE, *FINISHED)


@pytest.fixture(scope="session")
def measured_run(finished_run, tmp_path_factory) -> Path:
    """A copy of the CL-Flow run, measured on its test images. Tests must not change it."""
    run = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("measured") / "run"))
    call(evaluate.main, run)
    return run


@pytest.fixture(scope="session")
def nearest_run(category, tmp_path_factory) -> Path:
    """A run of the nearest prototype. Beside it, said.txt has what the training printed."""
    out = tmp_path_factory.mktemp("nearest") / "run"
    with open(out.with_name("said.txt"), "w") as said, contextlib.redirect_stdout(said):
        return train_blind(category, out, *NEAREST)


@pytest.fixture(scope="session")
def projecting_run(category, tmp_path_factory) -> Path:
    """A run of the autoencoder."""
    options = ["--method", "autoencoder", *LITE, "--size", 96, "--epochs", 2, "--batch", 4, "--lr", 0.005]
    options += ["--bank", 800]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoencoder, "IMAGES_PER_EPOCH", 216)  # to save time
        return train_blind(category, tmp_path_factory.mktemp("projecting"), *options)


@pytest.fixture(scope="session")
def paper_run(category, tmp_path_factory) -> Path:
    """A run of CL-Flow in the paper's own form."""
    options = ["--method", "paper", *LITE, "--size", 128, "--epochs", 2, "--steps", 4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "IMAGES_PER_EPOCH", 108)  # to save time
        return train_blind(category, tmp_path_factory.mktemp("paper"), *options)


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy of the CL-Flow run, to write into."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))
