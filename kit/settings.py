"""What a detector is made with: the options of each method, and their defaults. These are what --method may name, and
what train.py takes beside it. The methods themselves are in methods/. No PyTorch here: the command line is read with
it."""

from dataclasses import dataclass, field, fields

FALSE_ALARM = 0.02  # default share of good images that may be flagged
# Different good images that a threshold takes. Training on five calibrates with all five, and at least two images teach
# what judges the others. With four or fewer, median and spread of the scores hang on single images: measured on *wood*,
# a detector flags a quarter to three quarters of other good images.
LEAST_IMAGES = 5
FOR_HELD_OUT = 4 * LEAST_IMAGES  # good images, where held-out ones alone calibrate: these are a quarter of few images
UNIT = 32  # pixels: sides are multiples of it, so that every layer of a backbone halves them evenly

Shape = tuple[int, int]  # (height, width), in pixels


def as_shape(size: int | Shape) -> Shape:
    """A number stands for a square."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a detector was made with: plain values, which the checkpoint keeps. These are facts; each method's own class
    adds its options, with their defaults. `size` and `backbone` are among them."""

    method: str
    images: int  # good ones, of which
    held_out: int  # calibrate and are not trained on
    seed: int = 0
    data: str = ""  # the folder they came from
    category: str = ""  # its name
    false_alarm: float = FALSE_ALARM  # where nobody asks for another rate
    roi: str | None = None  # the picture that marks the region of interest
    taught: tuple[tuple[str, str], ...] = ()  # images beside those of `data`: path and hash of each
    good: tuple[str, ...] = ()  # hashes of the good images, of held-out ones, too


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
    least_images: int = LEAST_IMAGES  # good ones that training takes, for a threshold

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
    "paper": Options(PaperSettings, {"backbone": "efficientnet_lite0"}, least_images=FOR_HELD_OUT),
    "nearest": Options(NearestSettings, {"backbone": "efficientnet_lite0"}),
    "autoencoder": Options(
        AutoencoderSettings,
        {"size": 128, "epochs": 8, "lr": 5e-3, "backbone": "efficientnet_lite0", "bank": 1000},
        least_images=FOR_HELD_OUT,
    ),
}
