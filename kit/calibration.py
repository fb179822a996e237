"""The scores of good images, which set the thresholds."""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kit import InputError, data
from kit.camera import are_unusual, quantization_step, usual, with_compression
from kit.detector import Detector
from kit.good import GoodImages, camera_copy, side_light
from kit.images import load_image, named, read_image, to_tensor
from kit.processes import counted
from kit.rows import Feed, HeldOut, retrain
from kit.settings import LEAST_IMAGES
from kit.training import Epoch
from kit.verdict import LEAST_SCORE, allowance

FOLDS = 3  # blocks of good images for the calibration
ALIKE = 2.5  # from this result of `alike_in_order` on, images are a series
EQUALS = 2  # held-out images; the weight of the assumption that thirds and held-out images have equal medians
MEASURED = 50  # good images at most, to find what is usual
COPIES = 30  # of held-out images for each change, on which the detector is tested
SERIES = 20  # with fewer images, a series cannot be recognised
LIMIT = 1000  # images at most that set a threshold, in addition to the held-out ones
ASKED = 40  # images at most that `alike_in_order` examines


def calibrate_on(model: Detector, files: list[Path]) -> None:
    """Calibrate a detector on good images that its training has not seen."""
    model.calibrate((model.energies_in_windows(images) for images in data.batches(files, model.shape)), files)


class CrossValidation:
    """Judges the good images that a detector was trained on, each as if it were new. So all of them set the threshold,
    not only the held-out ones. It resembles CV+ (Barber, Candes, Ramdas, Tibshirani, arXiv 1905.02928), but CV+'s
    guarantee does not apply: see `kit.verdict.threshold`.

    `indices` belong to the images that are judged: at most LIMIT, chosen at random. `fold` (n,) divides all n images
    into FOLDS thirds in the order of their names. An image is judged by a flow and a classifier that were trained
    without its third, and by the bank without the image's own prototypes. In a series, neighbours are near copies (as
    the frames of a camera are), so the prototypes of the image's whole fifth are left out. Without its whole third the
    bank would be too poor, and scores too high. The images of a series count as fewer `different` ones."""

    def __init__(self, good: GoodImages, seed: int, alike: float):
        self.good = good
        count = len(good.trained_on)
        self.indices = sorted(np.random.default_rng(seed).permutation(count)[:LIMIT].tolist())
        self.fold = blocks(good.trained_on, FOLDS)
        self.fifth = blocks(good.trained_on, 5)
        self.is_series = is_series(alike, count)
        self.different = max(1, round(count / alike)) if self.is_series else count
        if self.is_series and self.different < LEAST_IMAGES:
            raise InputError(
                f"--data: these {count} images look like a series (neighbours in name order are near copies): they "
                f"count as about {self.different} different images; training needs at least {LEAST_IMAGES}. Add good "
                "images from other days"
            )

    def check_processes(self) -> None:
        """Raises InputError if the images of one process all come from a single third: when that third is judged, the
        process would have no images to train on."""
        count = self.good.processes.count
        for rank in range(count):
            if len(set(self.fold[rank::count].tolist())) < 2:
                raise InputError(
                    f"torchrun started {count} processes, too many for {len(self.fold)} training images; start fewer"
                )

    def excluded(self, index: int) -> Tensor:
        """The indices (n,) of the images whose prototypes do not count when this image is judged."""
        if self.is_series:
            return torch.nonzero(self.fifth == self.fifth[index])[:, 0]
        return torch.tensor([index])

    @torch.no_grad()
    def scores(self, model: Detector, fold: int, feed: Feed | None = None) -> dict[int, Tensor]:
        """The score and the map's maximum (2,) of each judged image of a block, by index. Each process judges its
        part."""
        processes = self.good.processes
        indices = [index for index in self.indices if self.fold[index] == fold]
        parts = [[n for n in indices if n % processes.count == rank] for rank in range(processes.count)]
        mine = parts[processes.rank]
        columns = [torch.empty(2, 0, device=model.device)]
        for index in counted(mine, "judging good images", len(mine)):
            columns.append(model.scores(self.energies(model, index, feed)))
        together = processes.concatenated(torch.cat(columns, dim=1).T)
        return dict(zip(itertools.chain(*parts), together, strict=True))

    def energies(self, model: Detector, index: int, feed: Feed | None) -> list[Tensor]:
        """The energies of an image as if it were new, from its file. If a `feed` has all rows of the image, they come
        from there: they were computed without the image's own prototypes, too. In a series more has to be left out."""
        code = feed.stored_code_map(index) if feed and not self.is_series else None
        if code is not None:
            return model.expert_energies(code)
        images = data.read_batch([self.good.trained_on[index]], model.shape)
        return model.energies_in_windows(images, self.excluded(index))

    def set_threshold(self, model: Detector, scores: dict[int, Tensor]) -> None:
        """Set the threshold from these scores, by index, and those of the held-out images. In a series the held-out
        images have near copies among the others and do not count; then a line is printed."""
        columns = torch.stack([scores[index] for index in self.indices], dim=1)
        judged = [(self.good.trained_on[index], self.excluded(index)) for index in self.indices]
        different = min(self.different, columns.shape[1])
        if not self.is_series:
            columns = torch.cat((model.good_scores, columns), dim=1)
            judged = model.calibrated_on + judged
            different = columns.shape[1]
        model.good_scores = columns
        model.different = torch.tensor(different, device=model.device)
        model.calibrated_on = judged
        if self.is_series:
            print_series(len(self.fold), different)


def plan_cross_validation(model: Detector, good: GoodImages, rows: Tensor, image_indices: Tensor) -> CrossValidation:
    """The `CrossValidation` of a CL-Flow, given some rows y (N, C) of good images and the images' indices (N,). Raises
    InputError if the images are too few, or too few for the number of processes."""
    alike = 1.0
    if model.settings.local:
        alike = alike_in_order(model.prototypes, model.dtype, good.trained_on, rows, image_indices)
    validation = CrossValidation(good, model.settings.seed, alike)
    validation.check_processes()
    return validation


def calibrate_by_cross_validation(
    validation: CrossValidation, feed: Feed, held_out: HeldOut, epochs: Callable[..., Iterator[Epoch]]
) -> None:
    """The calibration of a CL-Flow on all good images, third by third. Each third is judged by a flow and a classifier
    that were trained on the other two. `epochs(feed=feed, name=name)` trains the model's flow and classifier."""
    print("calibrating: each third of the good images is judged by a model trained on the other two", flush=True)
    model = held_out.model
    trained = model.flow, model.classifier
    scores = {}
    for fold in range(FOLDS):
        training = epochs(feed=feed.subset(validation.fold != fold), name=f"third {fold + 1}, epoch")
        retrain(held_out, training, fold)
        scores |= validation.scores(model, fold, feed)
    model.flow, model.classifier = trained
    held_out.calibrate()
    if not validation.is_series:  # its held-out images have near copies among the others
        factor = factor_to_held_out(torch.stack(list(scores.values()), dim=1), model.good_scores)
        scores = {index: factor * score for index, score in scores.items()}
    validation.set_threshold(model, scores)


def factor_to_held_out(scores: Tensor, held_out: Tensor) -> Tensor:
    """The factor (2,) that brings scores and maxima (2, m) of thirds to the height of those of held-out images (2, h).

    Scores of thirds tend to be too high: the bank was chosen with these images, so it has gaps where an image's own
    prototypes are left out. With ten images they are half again as high as those of new images. The factor is the ratio
    of the medians to the power h / (h + EQUALS), since the median of few held-out images is uncertain."""
    middle = scores.quantile(0.5, dim=1).clamp(min=LEAST_SCORE)
    held_out_middle = held_out.quantile(0.5, dim=1).clamp(min=LEAST_SCORE)
    count = held_out.shape[1]
    return (held_out_middle / middle) ** (count / (count + EQUALS))


@torch.no_grad()
def alike_in_order(
    prototypes: nn.Module, dtype: torch.dtype, files: Sequence[Path], rows: Tensor, image_indices: Tensor
) -> float:
    """How strongly neighbours in the order of names resemble each other; about 1 if the order means nothing.

    Of the nearest prototypes of an image (its own excluded), count those that come from the same tenth of the `files`,
    and divide by the number expected by chance. Rows y (N, C) come from the images with these indices (N,); at most
    ASKED images are examined. `prototypes` is a `bank.Prototypes`."""
    tenth = blocks(files, 10)
    origin = prototypes.origin.cpu()
    found, expected = 0.0, 0.0
    for image in range(0, len(tenth), math.ceil(len(tenth) / ASKED)):
        mine = rows[(image_indices == image).to(rows.device)].float()
        if not len(mine):  # with very many images, some have no rows here
            continue
        index = prototypes.nearest(mine, 1, dtype, torch.full((len(mine), 1), image))[0].cpu()
        is_near = tenth[origin] == tenth[image]
        others = origin != image
        found += float(is_near[index].float().mean())
        expected += float((is_near & others).sum() / others.sum().clamp(min=1))
    return found / max(expected, 1e-6)


def is_series(alike: float, images: int) -> bool:
    """Whether this many images are a series, given their `alike_in_order`."""
    return alike >= ALIKE and images >= SERIES


def print_series(images: int, different: int) -> None:
    print(
        f"these {images} images look like a series (neighbours in name order are near copies): they count as about "
        f"{different} different images. Add good images from other days for a more reliable threshold."
    )


def blocks(files: list[Path], count: int) -> Tensor:
    """The block number (n,) of each of n files. The `count` blocks are contiguous in the natural order of names (2
    before 10)."""
    order = sorted(range(len(files)), key=lambda number: natural(files[number]))
    block = torch.empty(len(files), dtype=torch.long)
    block[torch.tensor(order)] = torch.arange(len(files)) * count // len(files)
    return block


def natural(path: Path) -> list:
    """The key that sorts names as people do: digits count as numbers."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", path.as_posix())]


def measured_files(model: Detector, files: Sequence[Path]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For at most MEASURED of these files, evenly spread: the pixels (H, W, 3) that the model sees, and their measures
    (8,), see kit/camera.py."""
    for path in files[:: math.ceil(len(files) / MEASURED)]:
        image = load_image(path)
        pixels = named(path, image, model.shape)
        yield pixels, with_compression(model.measures(to_tensor(pixels[None])), quantization_step(image))


def learn_usual(model: Detector, files: Sequence[Path]) -> None:
    """Set what is usual in the training images: `camera` and `brightness` of the model, from some of these files."""
    measures, brightness = [], []
    for pixels, measures_of_one in measured_files(model, files):
        measures.append(measures_of_one)
        brightness.append(model.brightness_of(to_tensor(pixels[None])))
    model.camera = torch.from_numpy(usual(np.stack(measures))).to(model.camera)
    model.learn_brightness(torch.cat(brightness, dim=1))


@dataclass(frozen=True)
class Change:
    """A change of images on which a detector is tested: a name for the changed copies, what is unusual about them, the
    function that makes them, and the highest allowance for such images."""

    copies: str
    unusual: str
    make: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    most: float


CHANGES = (  # in the order of `Detector.allowances`
    Change(
        "slightly blurred, noisy or compressed copies of held-out good images",
        "light, contrast, noise, sharpness or colour",
        camera_copy,
        most=1.2,
    ),
    Change("copies of held-out good images in light from one side", "light on one side", side_light, most=2.0),
)


@torch.no_grad()
def judge_changed_copies(model: Detector, files: Sequence[Path]) -> None:
    """Judge copies of these held-out images, for each of the CHANGES, and print how many exceed the threshold. If the
    method learns from camera copies, their scores set the model's `allowances`, which lower the scores of unusual
    images."""
    model.allowances.fill_(1)
    limit = model.thresholds().score
    judged = [scores_of_copies(model, files, kind) for kind in range(len(CHANGES))]
    if model.LEARNS_CAMERA_COPIES:
        for kind, (scores, _) in enumerate(judged):
            found = allowance(limit, scores.cpu().numpy(), model.settings.false_alarm, CHANGES[kind].most)
            model.allowances[kind] = found
    for change, (scores, is_unusual), allowed in zip(CHANGES, judged, model.allowances.tolist(), strict=True):
        alarms = int((scores / model.highest_allowance(is_unusual) > limit).sum())
        divided = f"; the score of an image with unusual {change.unusual} is divided by {allowed:.2f}"
        print(f"false alarms on {change.copies}: {alarms} of {COPIES}{divided if allowed >= 1.005 else ''}")


def scores_of_copies(model: Detector, files: Sequence[Path], kind: int) -> tuple[Tensor, Tensor]:
    """The scores (m,) of COPIES copies of these images, for one of the CHANGES, and what is unusual in them, (m, 2)
    bool. The allowances do not count."""
    scores, unusual = [], []
    for number in range(COPIES):
        rng = np.random.default_rng([model.settings.seed, number, 1 + kind])  # training copies have other draws
        image = read_image(files[number % len(files)], model.shape)
        copy = to_tensor(CHANGES[kind].make(image, rng)[None])
        scores.append(model.scores(model.energies_in_windows(copy))[0])
        unusual.append(are_unusual(model.measures(copy), model.camera))
    return torch.cat(scores), torch.cat(unusual)
