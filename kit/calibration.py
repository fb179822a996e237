"""The scores of good images, which set the thresholds, and the outliers among these images."""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import special
from torch import Tensor, nn

from kit import data, draw
from kit.camera import camera_copy, measured, some_of, usual, usual_of
from kit.detector import Detector
from kit.errors import InputError
from kit.files import OwnFiles
from kit.good import GoodImages
from kit.images import load_image, read_image, to_tensor
from kit.processes import counted
from kit.real_defects import files_of_training, is_among
from kit.rows import Feed, HeldOut, learn_anew
from kit.settings import LEAST_IMAGES
from kit.training import Epoch
from kit.verdict import LEAST_SCORE, drift

FOLDS = 3  # blocks of good images for the calibration
ALIKE = 2.5  # from this result of `alike_in_order` on, images are a series
EQUALS = 2  # held-out images; the weight of the assumption that thirds and held-out images have equal medians
SERIES = 20  # with fewer images, a series cannot be recognised
LIMIT = 1000  # images at most that set a threshold, in addition to the held-out ones
COPIES = 30  # camera copies of held-out images, on which the threshold is tested
SHOWN = 12  # suspects at most
ODD = 4  # standard deviations above the median, of log scores
SUSPECTS = "suspects.png"
ASKED = 40  # images at most that `alike_in_order` examines


def calibrate_on(model: Detector, files: list[Path]) -> None:
    """Calibrate a detector on good images that its training has not seen."""
    model.calibrate((model.energies_in_windows(images) for images in data.batches(files, model.shape)), files)


class AsNew:
    """Judges the good images that a detector was trained on, each as if it were new. So all of them set the threshold,
    not only the held-out ones. This is cross-validation. It resembles CV+ (Barber, Candes, Ramdas, Tibshirani, arXiv
    1905.02928), but CV+'s guarantee does not apply: see `kit.verdict.threshold`.

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

    def left_out(self, index: int) -> Tensor:
        """The indices of the images whose prototypes do not count when this image is judged."""
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
        code = feed.code_map(index) if feed and not self.is_series else None
        if code is not None:
            return model.expert_energies(code)
        images = data.read_batch([self.good.trained_on[index]], model.shape)
        return model.energies_in_windows(images, self.left_out(index))

    def settle(self, model: Detector, scores: dict[int, Tensor]) -> None:
        """Set the threshold from these scores, by index, and those of the held-out images. In a series the held-out
        images have near copies among the others and do not count; then a line is printed."""
        columns = torch.stack([scores[index] for index in self.indices], dim=1)
        judged = [(self.good.trained_on[index], self.left_out(index)) for index in self.indices]
        different = min(self.different, columns.shape[1])
        if not self.is_series:
            columns = torch.cat((model.normal, columns), dim=1)
            judged = model.calibrated_on + judged
            different = columns.shape[1]
        model.normal = columns
        model.different = torch.tensor(different, device=model.device)
        model.calibrated_on = judged
        if self.is_series:
            print_series(len(self.fold), different)


def judge_by_thirds(model: Detector, good: GoodImages, rows: Tensor, image_indices: Tensor) -> AsNew:
    """`AsNew` for a CL-Flow, given some rows y (N, C) of good images and the images' indices (N,). Raises InputError if
    the images are too few, or too few for the number of processes."""
    alike = 1.0
    if model.settings.local:
        alike = alike_in_order(model.prototypes, model.dtype, good.trained_on, rows, image_indices)
    as_new = AsNew(good, model.settings.seed, alike)
    as_new.check_processes()
    return as_new


def calibrate_as_new(as_new: AsNew, feed: Feed, held_out: HeldOut, epochs: Callable[..., Iterator[Epoch]]) -> None:
    """The calibration of a CL-Flow on all good images, third by third. Each third is judged by a flow and a classifier
    that were trained on the other two. `epochs(feed=feed, name=name)` trains the model's flow and classifier."""
    print("calibrating: each third of the good images is judged by a model trained on the other two", flush=True)
    model = held_out.model
    trained = model.flow, model.classifier
    scores = {}
    for fold in range(FOLDS):
        training = epochs(feed=feed.only(as_new.fold != fold), name=f"third {fold + 1}, epoch")
        learn_anew(held_out, training, fold)
        scores |= as_new.scores(model, fold, feed)
    model.flow, model.classifier = trained
    held_out.calibrate()
    if not as_new.is_series:  # its held-out images have near copies among the others
        factor = factor_to_held_out(torch.stack(list(scores.values()), dim=1), model.normal)
        scores = {index: factor * score for index, score in scores.items()}
    as_new.settle(model, scores)


def factor_to_held_out(scores: Tensor, held_out: Tensor) -> Tensor:
    """The factor (2,) that brings scores and maxima (2, m) of thirds to the height of those of held-out images (2, h).

    Scores of thirds tend to be too high: the bank was chosen with these images, so it has gaps where an image's own
    prototypes are left out. With ten images they are half again as high as those of new images. The factor is the ratio
    of the medians to the power h / (h + EQUALS), since the median of few held-out images is uncertain."""
    middle, held_out_middle = (values.quantile(0.5, dim=1).clamp(min=LEAST_SCORE) for values in (scores, held_out))
    count = held_out.shape[1]
    return (held_out_middle / middle) ** (count / (count + EQUALS))


@torch.no_grad()
def alike_in_order(
    prototypes: nn.Module, dtype: torch.dtype, files: Sequence[Path], rows: Tensor, image_indices: Tensor
) -> float:
    """How much more alike good images are if they are neighbours in the order of names.

    The nearest prototypes of an image, without its own, come from some tenth of the `files`. The result says how many
    times as often as by chance this is the image's own tenth; it is about 1 if the order of names means nothing. It is
    measured on some of the images, from their rows y (N, C), which come from the images with these indices
    (N,). `prototypes` is a `bank.Prototypes`."""
    tenth = blocks(files, 10)
    origin = prototypes.origin.cpu()
    found, expected = 0.0, 0.0
    for image in range(0, len(tenth), math.ceil(len(tenth) / ASKED)):
        mine = rows[(image_indices == image).to(rows.device)].float()
        if not len(mine):  # with very many images, some have no rows here
            continue
        index = prototypes.nearest(mine, 1, dtype, torch.full((len(mine), 1), image)).cpu()
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


def unseen(model: Detector, files: list[Path]) -> list[Path]:
    """The files that were not part of the training of `model`, neither as good images (held out or not) nor as defects.
    Copies are recognised by their bytes. Prints a line on how many were left out."""
    known = files_of_training(model.settings)
    new = [path for path in files if not is_among(path, known)]
    if len(new) < len(files):
        print(
            f"left out {len(files) - len(new)} of {len(files)} images: the detector was trained with them, so their "
            "scores are too low"
        )
    return new


@torch.no_grad()
def recalibrate(model: Detector, files: list[Path], alike: float) -> None:
    """Set the scale and the thresholds of `model` from these new good images. `alike` is the result of `alike_in_order`
    for them. Raises InputError if they are too few."""
    different = len(files)
    if is_series(alike, len(files)):
        different = round(len(files) / alike)
        print_series(len(files), different)
    if different < LEAST_IMAGES:
        raise InputError(
            f"--recalibrate: only {different} different new images; give at least {LEAST_IMAGES}, better 50"
        )
    energies = [model.energies_in_windows(images) for images in data.batches(files, model.shape)]
    scores = torch.cat([model.scores(batch)[0] for batch in energies]).cpu().numpy()
    if drift(scores, model.normal[0].cpu().numpy()) == "lower":
        print(
            "warning: these images score clearly lower than the good images that set the earlier threshold. If they "
            "are copies of training images, the new threshold is too low"
        )
    model.calibrate(energies)
    model.different = torch.tensor(different, device=model.device)
    model.camera = torch.from_numpy(usual_of(files, model.shape)).to(model.camera)


def learn_usual(model: Detector, files: Sequence[Path]) -> None:
    """Set what is usual in the training images: `camera` and `brightness` of the model, from some of these files."""
    measures, brightness = [], []
    for path in some_of(files):
        image = read_image(path, model.shape)
        measures.append(measured(image, path))
        brightness.append(model.brightness_of(to_tensor(image[None])))
    model.camera = torch.from_numpy(usual(np.stack(measures))).to(model.camera)
    model.learn_brightness(torch.cat(brightness, dim=1))


@torch.no_grad()
def count_camera_copies(model: Detector, files: Sequence[Path]) -> None:
    """Judge COPIES camera copies of these held-out images. If the method learns camera copies, they raise the
    threshold where this is needed. Prints lines on this, and on how many copies exceed the threshold."""
    columns = []
    for number in range(COPIES):
        rng = np.random.default_rng([model.settings.seed, number])
        copy = camera_copy(read_image(files[number % len(files)], model.shape), rng)
        columns.append(model.scores(model.energies_in_windows(to_tensor(copy[None]))))
    copies = torch.cat(columns, dim=1)
    before = model.thresholds().score
    if model.LEARNS_CAMERA_COPIES:
        model.copies = copies
    limit = model.thresholds().score
    what = "slightly blurred, noisy or compressed copies of held-out good images"
    if limit > before:
        print(f"{what} raise the threshold from {before:.3f} to {limit:.3f}")
    print(f"false alarms on {what}: {int((copies[0] > limit).sum())} of {COPIES}")


@torch.no_grad()
def show_suspects(model: Detector, own: OwnFiles, folder: Path) -> None:
    """Print a line and draw suspects.png if there are outliers among the images that calibrated the model: they may be
    defective. `folder` is the final folder of the picture, which the line names."""
    scores = model.normal[0].cpu().numpy()
    suspects = odd_ones(scores)
    if not len(suspects) or not model.calibrated_on:
        return
    limits = model.thresholds()
    names, pictures = [], []
    for index in suspects[:SHOWN]:
        path, without = model.calibrated_on[index]
        energies = model.energies_in_windows(data.read_batch([path], model.shape), without)
        anomaly_map = model.maps(energies)[0].cpu().numpy()
        photo = draw.photo_of(load_image(path), model.roi)
        verdict = model.verdict(float(scores[index]), anomaly_map, (photo.height, photo.width), limits)
        names.append(path.name)
        pictures.append(draw.verdict_picture(photo, path.name, verdict, limits))
    draw.save_picture(own.claim(SUSPECTS), draw.below_each_other(pictures))
    others = f" and {len(suspects) - len(names)} more" if len(suspects) > len(names) else ""
    print(
        f"{len(suspects)} of the good images look unlike the others: {', '.join(names)}{others}; see "
        f"{folder / SUSPECTS}. If they are defective, remove them and train again"
    )


def odd_ones(values: np.ndarray) -> np.ndarray:
    """The indices, highest value first, of the outliers among values (n,): their logarithms are more than four standard
    deviations above the median. The deviation is estimated from the median distance to the median, which a few outliers
    do not change. Fewer than five values have no outliers."""
    if len(values) < 5:
        return np.array([], dtype=int)
    logs = np.log(np.maximum(values, LEAST_SCORE))
    away = logs - np.median(logs)
    deviation = max(np.median(np.abs(away)) / special.ndtri(0.75), 0.01)  # for copies of one image it would be zero
    odd = np.flatnonzero(away > ODD * deviation)
    return odd[np.argsort(-away[odd], kind="stable")]
