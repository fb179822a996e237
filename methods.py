"""The table of methods: what --method may name, and what each brings. A new one is an entry here."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import autoencoder
import clflow
import nearest
from kit.detector import Detector, Settings, read_checkpoint
from kit.errors import InputError
from kit.training import Epoch


@dataclass(frozen=True)
class Method:
    """A detector; the loop that trains it, a generator `train(model, good images, progress)`; and what differs for the
    demo, which is small and has no weights but pip's."""

    detector: type[Detector]
    train: Callable[..., Iterator[Epoch]]
    demo_defaults: dict[str, object]

    @property
    def defaults(self) -> dict[str, object]:
        """The options of the method, those of its settings that are not facts; train.py refuses all others."""
        facts = {field.name for field in fields(Settings)}
        return {field.name: field.default for field in fields(self.detector.SETTINGS) if field.name not in facts}

    @property
    def is_trained(self) -> bool:
        """Whether there are epochs of anything."""
        return "epochs" in self.defaults


METHODS = {
    "clflow": Method(clflow.CLFlow, clflow.train, {"backbone": "efficientnet_lite0"}),
    "nearest": Method(nearest.Nearest, nearest.train, {"backbone": "efficientnet_lite0"}),
    "autoencoder": Method(
        autoencoder.Autoencoder,
        autoencoder.train,
        {"size": 128, "epochs": 8, "lr": 5e-3, "backbone": "efficientnet_lite0", "bank": 1000},
    ),
}


def load(path: Path | str, device: str = "cpu") -> Detector:
    """The detector of checkpoint `path`, ready to judge. Raises InputError if it is missing or is not one."""
    checkpoint = read_checkpoint(path)
    try:
        return METHODS[checkpoint["settings"]["method"]].detector.restore(checkpoint, device)
    except (KeyError, RuntimeError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as a clflow checkpoint ({error!r:.200})") from error
