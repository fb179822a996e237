"""The table of methods: what --method may name, and what each brings. A new one is a line here."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

import autoencoder
import clflow
import nearest
from kit.detector import Detector, read_checkpoint
from kit.errors import InputError


@dataclass(frozen=True)
class Method:
    """A detector and the losses that train it, if anything is trained; the `defaults` of its options, of which train.py
    refuses all others; and what differs for the demo, which is small and has no weights but pip's."""

    detector: type[Detector]
    losses: type[nn.Module] | None
    defaults: dict[str, object]
    demo_defaults: dict[str, object]


METHODS = {
    "clflow": Method(
        detector=clflow.CLFlow,
        losses=clflow.Losses,
        defaults={
            "size": 384,
            "epochs": 8,
            "batch": 8192,
            "lr": 2e-3,
            "textures": None,
            "backbone": "resnet18",
            "weights": None,
            "bank": 8000,
            "local": True,
            "steps": 2,
            "classification_weight": 1.0,
            "smoothing": 0.1,
            "contrast_weight": 0.0,
            "contrast": "energy",
            "temperature": 1.0,
        },
        demo_defaults={"backbone": "efficientnet_lite0"},
    ),
    "patchcore": Method(
        detector=nearest.Nearest,
        losses=None,
        defaults={"size": 384, "backbone": "resnet18", "weights": None, "bank": 8000, "local": True},
        demo_defaults={"backbone": "efficientnet_lite0"},
    ),
    "autoencoder": Method(
        detector=autoencoder.Autoencoder,
        losses=autoencoder.Losses,
        defaults={
            "size": 256,
            "epochs": 20,
            "batch": 8,
            "lr": 2e-3,
            "textures": None,
            "backbone": "resnet18",
            "weights": None,
            "bank": 4000,
        },
        demo_defaults={"size": 128, "epochs": 8, "lr": 5e-3, "backbone": "efficientnet_lite0", "bank": 1000},
    ),
}


def load(path: Path | str, device: str = "cpu") -> Detector:
    """The detector of checkpoint `path`, ready to judge. Raises InputError if it is missing or is not one."""
    checkpoint = read_checkpoint(path)
    try:
        return METHODS[checkpoint["settings"]["method"]].detector.restore(checkpoint, device)
    except (KeyError, RuntimeError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as a clflow checkpoint ({error!r:.200})") from error
