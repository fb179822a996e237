"""The table of methods: the detector of each, and its training loop. To add a method, add an entry here and one in
kit/settings.py."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import clflow
from kit import InputError
from kit.detector import Detector, read_checkpoint
from kit.files import MODEL
from kit.training import Epoch
from methods import autoencoder, nearest, paper


@dataclass(frozen=True)
class Method:
    """A detector, and its training loop: a generator `train(model, good images, progress)`."""

    detector: type[Detector]
    train: Callable[..., Iterator[Epoch]]


METHODS = {
    "clflow": Method(clflow.CLFlow, clflow.train),
    "paper": Method(paper.Paper, paper.train),
    "nearest": Method(nearest.Nearest, nearest.train),
    "autoencoder": Method(autoencoder.Autoencoder, autoencoder.train),
}


def load(path: Path | str, device: str = "cpu") -> Detector:
    """The detector of the checkpoint or run folder `path`, ready to judge. Raises InputError if the file is missing or
    is not a checkpoint."""
    if Path(path).is_dir():
        path = Path(path) / MODEL
    checkpoint = read_checkpoint(path)
    try:
        model = METHODS[checkpoint["settings"]["method"]].detector.restore(checkpoint)
    except (KeyError, RuntimeError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as a clflow checkpoint ({error!r:.200})") from error
    return model.to(device)
