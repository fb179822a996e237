"""The settings of a detector: the options of each method, with their defaults. --method takes the methods listed here,
and train.py their options. The methods themselves are in methods/. No PyTorch here: the command line is read with this
file."""

from dataclasses import dataclass, field, fields

FALSE_ALARM = 0.02  # default share of good images that may be flagged
# Different good images that a threshold needs. Training on five calibrates with all five, each judged by a model that
# at least two others have trained. With four or fewer, median and spread of the scores depend on single images: on
# *wood*, such a detector flagged a quarter to three quarters of other good images.
LEAST_IMAGES = 5
FOR_HELD_OUT = 4 * LEAST_IMAGES  # good images, if only the held-out quarter calibrates
LITE0 = "efficientnet_lite0"  # the backbone whose weights come with pip
UNIT = 32  # pixels: sides are multiples of it, so that each layer of a backbone can halve them

Shape = tuple[int, int]  # (height, width), in pixels


def as_shape(size: int | Shape) -> Shape:
    """The shape of a size; a number means a square."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a detector, as plain values that the checkpoint stores. The fields here are facts; the class of
    each method adds its options, with their defaults. `size` and `backbone` are among these."""

    method: str
    images: int  # number of good images
    held_out: int  # number of these that calibrate and are not trained on
    seed: int = 0
    data: str = ""  # the folder they came from
    category: str = ""  # its name
    false_alarm: float = FALSE_ALARM  # the default rate of this detector
    roi: str | None = None  # the mask image of the region of interest
    taught: tuple[tuple[str, str], ...] = ()  # training images other than those of `data`: path and hash of each
    good: tuple[str, ...] = ()  # hashes of the good images, including the held-out ones


@dataclass(frozen=True, kw_only=True)
class CLFlowSettings(Settings):
    """The options of CL-Flow, and their defaults."""

    method: str = "clflow"
    size: int | Shape = 384
    epochs: int = 3
    batch: int = 2048  # rows
    lr: float = 2e-3
    textures: str | None = None
    defects: str | None = None  # folder of real defects
    defect_masks: str | None = None
    corrections: str | None = None  # file
    backbone: str = "resnet18"
    int8: bool = True  # the backbone, on CPUs that are fast at it
    bank: int = 16000
    local: bool = True
    steps: int = 2  # of the flow
    classification_weight: float = 1.0
    smoothing: float = 0.1
    contrast_weight: float = 1.0
    temperature: float = 1.0

    @property
    def has_classifier(self) -> bool:
        """Whether a loss trains a classifier."""
        return self.classification_weight > 0 or self.contrast_weight > 0


@dataclass(frozen=True, kw_only=True)
class NearestSettings(Settings):
    """The options of the nearest neighbour, and their defaults."""

    method: str = "nearest"
    size: int | Shape = 384
    backbone: str = "resnet18"
    int8: bool = False
    bank: int = 16000
    local: bool = True


@dataclass(frozen=True, kw_only=True)
class PaperSettings(Settings):
    """The options of CL-Flow in the paper's own form, and their defaults."""

    method: str = "paper"
    size: int | Shape = 256
    epochs: int = 5
    batch: int = 4  # images x+; half as many x-
    lr: float = 2e-3
    textures: str | None = None
    backbone: str = "resnet18"
    steps: int = 8  # of each flow
    classification_weight: float = 0.1
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
    """The settings of a method, and the options that differ in the demo, which is small and uses weights from pip."""

    settings: type[Settings]
    demo: dict[str, object] = field(default_factory=dict)
    least_images: int = LEAST_IMAGES  # good images that training needs, for a threshold

    @property
    def defaults(self) -> dict[str, object]:
        """The options of the method: its settings that are not facts. train.py refuses all other options."""
        facts = {fact.name for fact in fields(Settings)}
        return {option.name: option.default for option in fields(self.settings) if option.name not in facts}


OPTIONS = {
    "clflow": Options(CLFlowSettings, {"backbone": LITE0, "size": 256}),
    "paper": Options(PaperSettings, {"backbone": LITE0}, least_images=FOR_HELD_OUT),
    "nearest": Options(NearestSettings, {"backbone": LITE0, "size": 256}),
    "autoencoder": Options(
        AutoencoderSettings,
        {"size": 128, "epochs": 8, "lr": 5e-3, "backbone": LITE0, "bank": 1000},
        least_images=FOR_HELD_OUT,
    ),
}
