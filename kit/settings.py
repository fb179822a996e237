"""What a detector was made with. No PyTorch here: the command line is read with it."""

from dataclasses import dataclass

FALSE_ALARM = 0.02  # default share of good images that may be flagged
# Different good images that a threshold takes. Training on five calibrates with all five, and at least two images teach
# what judges the others. With four or fewer, median and spread of the scores hang on single images: measured on *wood*,
# a detector flags a quarter to three quarters of other good images.
LEAST_IMAGES = 5


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
