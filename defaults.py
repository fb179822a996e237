"""The options of each method, and their defaults: what --method may name, and what train.py takes beside it. No PyTorch
here: the command line is read with it. The methods themselves stand in methods.py."""

from dataclasses import dataclass, field, fields

from kit.settings import Settings
from kit.sizes import Shape


@dataclass(frozen=True, kw_only=True)
class CLFlowSettings(Settings):
    """The options of CL-Flow, and their defaults."""

    method: str = "clflow"
    size: int | Shape = 384
    epochs: int = 3
    batch: int = 2048  # rows
    lr: float = 2e-3
    textures: str | None = None
    defects: str | None = None  # folder of real ones
    defect_masks: str | None = None
    corrections: str | None = None  # file
    backbone: str = "resnet18"
    bank: int = 16000
    local: bool = True
    steps: int = 2  # of the flow
    classification_weight: float = 1.0
    smoothing: float = 0.1
    contrast_weight: float = 1.0
    temperature: float = 1.0

    @property
    def has_classifier(self) -> bool:
        """Whether there is a loss that trains one."""
        return self.classification_weight > 0 or self.contrast_weight > 0


@dataclass(frozen=True, kw_only=True)
class NearestSettings(Settings):
    """The options of the nearest neighbour, and their defaults."""

    method: str = "nearest"
    size: int | Shape = 384
    backbone: str = "resnet18"
    bank: int = 16000
    local: bool = True


@dataclass(frozen=True, kw_only=True)
class PaperSettings(Settings):
    """The options of CL-Flow in the paper's own form, and their defaults."""

    method: str = "paper"
    size: int | Shape = 256
    epochs: int = 4
    batch: int = 8  # images
    lr: float = 2e-3
    textures: str | None = None
    backbone: str = "resnet18"
    steps: int = 8  # of each flow
    classification_weight: float = 0.02
    smoothing: float = 0.1
    contrast_weight: float = 0.02
    contrast: str = "cosine"  # or "energy"
    temperature: float = 0.1


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings(Settings):
    """The options of the autoencoder, and their defaults."""

    method: str = "autoencoder"
    size: int | Shape = 256
    epochs: int = 20
    batch: int = 8  # images
    lr: float = 2e-3
    textures: str | None = None
    backbone: str = "resnet18"
    bank: int = 4000


@dataclass(frozen=True)
class Options:
    """The settings of a method, and what differs for the demo, which is small and has no weights but pip's."""

    settings: type[Settings]
    demo: dict[str, object] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, object]:
        """The options of the method, those of its settings that are not facts; train.py refuses all others."""
        facts = {fact.name for fact in fields(Settings)}
        return {option.name: option.default for option in fields(self.settings) if option.name not in facts}

    @property
    def is_trained(self) -> bool:
        """Whether there are epochs of anything."""
        return "epochs" in self.defaults


OPTIONS = {
    "clflow": Options(CLFlowSettings, {"backbone": "efficientnet_lite0"}),
    "paper": Options(PaperSettings, {"backbone": "efficientnet_lite0"}),
    "nearest": Options(NearestSettings, {"backbone": "efficientnet_lite0"}),
    "autoencoder": Options(
        AutoencoderSettings,
        {"size": 128, "epochs": 8, "lr": 5e-3, "backbone": "efficientnet_lite0", "bank": 1000},
    ),
}
