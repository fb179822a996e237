import os

# The same on every machine. With CUDA_VISIBLE_DEVICES=0 they run on a GPU, whose rounding some of them do not expect.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Arrays this small gain nothing from more threads. Beside a busy process these wait for each other: on two cores the
# suite then took more than twice as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import kit  # noqa: F401 (first, before PyTorch is imported)

# isort: split
import shutil
from pathlib import Path

import pytest
from helpers import LITE, SMALL, call

import clflow
import train
from kit.demo import draw_demo
from methods import autoencoder


@pytest.fixture(scope="session", autouse=True)
def few_synthetic_defects():
    """And half of the steps, to save time; real processes paint all, and take all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clflow, "PAINTED", 64)
        patch.setattr(clflow, "STEPS_PER_EPOCH", 50)
        yield


@pytest.fixture(scope="session")
def category(tmp_path_factory) -> Path:
    """A drawn category in MVTec AD layout; no test may change it."""
    data = tmp_path_factory.mktemp("small")
    draw_demo(data, SMALL)
    return data


def train_blind(category: Path, out: Path, *options: object) -> Path:
    """`out`, a run that was trained with the category's test folder out of sight."""
    blind = out.with_name(f"{out.name}-category") / category.name
    shutil.copytree(category / "train", blind / "train")
    call(train.main, "--data", blind, "--out", out, *options)
    shutil.copytree(category / "test", blind / "test")
    shutil.copytree(category / "ground_truth", blind / "ground_truth")
    return out


@pytest.fixture(scope="session")
def finished_run(category, tmp_path_factory) -> Path:
    """A CL-Flow run; tests only read it (copy it to change it)."""
    return train_blind(category, tmp_path_factory.mktemp("run"), *LITE, "--epochs", 3, "--size", 192, "--batch", 1024)


@pytest.fixture(scope="session")
def projecting_run(category, tmp_path_factory) -> Path:
    """A run of the autoencoder."""
    options = ["--method", "autoencoder", *LITE, "--size", 128, "--epochs", 5, "--lr", 0.005]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoencoder, "IMAGES_PER_EPOCH", 350)  # a third: to save time
        return train_blind(category, tmp_path_factory.mktemp("projecting"), *options)


@pytest.fixture(scope="session")
def paper_run(category, tmp_path_factory) -> Path:
    """A run of CL-Flow in the paper's own form."""
    options = ["--method", "paper", *LITE, "--size", 128, "--epochs", 3, "--steps", 4]
    return train_blind(category, tmp_path_factory.mktemp("paper"), *options)


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy of the CL-Flow run, to write into."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))
