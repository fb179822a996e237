"""The scores of normal images, from which thresholds come, and the odd ones among them."""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kit import data, draw
from kit.camera import camera_copy, usual_of
from kit.detector import Detector
from kit.errors import InputError
from kit.files import OwnFiles
from kit.good import GoodImages, to_tensor
from kit.images import load_image, photograph, read_image
from kit.processes import counted
from kit.real_defects import fingerprint
from kit.rows import Feed
from kit.settings import LEAST_IMAGES
from kit.verdict import drift, odd_ones

FOLDS = 3  # in which the good images are divided for the calibration
ALIKE = 2.5  # times as alike as others, from which on images that follow each other are a series
FEW = 20  # images, among which a series cannot be told
LIMIT = 1000  # images at most that a threshold comes from, beside the held-out ones
COPIES = 30  # of held-out images, on which the threshold is tested
SHOWN = 12  # suspects at most
SUSPECTS = "suspects.png"
TENTHS = 10
ASKED = 40  # images, whether those that follow each other are alike


class AsNew:
    """The good images that a detector was trained on, each to be judged as if it were new: so all of them calibrate the
    threshold, and not the held-out ones alone. This is cross-validation. It resembles CV+ (Barber, Candes, Ramdas,
    Tibshirani, arXiv 1905.02928), but CV+'s guarantee does not apply: see `kit.verdict.threshold`.

    `numbers` are those that are judged, at most LIMIT, drawn at random. `fold` (n,) divides all n into FOLDS blocks, in
    the order of their names: what is trained is trained without the image's block. The bank leaves out the image's own
    prototypes; but where images that follow each other are alike (`alike` times as alike as others), as the frames of a
    camera are, those of its whole fifth (a third would leave too poor a bank: scores would be too high). Such images
    count for fewer: `different` of them."""

    def __init__(self, good: GoodImages, seed: int, alike: float):
        self.good = good
        count = len(good.trained_on)
        self.numbers = sorted(np.random.default_rng(seed).permutation(count)[:LIMIT].tolist())
        self.fold = blocks(good.trained_on, FOLDS)
        self.fifth = blocks(good.trained_on, 5)
        self.is_series = alike >= ALIKE and count >= FEW
        self.different = max(1, round(count / alike)) if self.is_series else count
        if self.is_series and self.different < LEAST_IMAGES:
            raise InputError(
                f"--data: a series: its images that follow each other by name are alike, and these {count} show about "
                f"{self.different} different ones; training takes {LEAST_IMAGES}. Give good images from other days"
            )

    def check_processes(self) -> None:
        """Raises InputError if one of the processes that share the images has no images of two thirds: it could not
        teach what judges the other one."""
        count = self.good.processes.count
        for rank in range(count):
            if len(set(self.fold[rank::count].tolist())) < 2:
                raise InputError(f"{count} processes, and {len(self.fold)} images to train on: start fewer")

    def left_out(self, number: int) -> Tensor:
        """The numbers of the images whose prototypes do not count when this one is judged."""
        if self.is_series:
            return torch.nonzero(self.fifth == self.fifth[number])[:, 0]
        return torch.tensor([number])

    def all_scores(
        self,
        model: Detector,
        fit_without: Callable[[int], None] = lambda fold: None,
        known: Callable[[int], list[Tensor] | None] = lambda number: None,
    ) -> dict[int, Tensor]:
        """The `scores` of all blocks, one after the other. `fit_without` trains the model without the images of a
        block; what is not trained needs none."""
        scores = {}
        for fold in range(FOLDS):
            fit_without(fold)
            scores |= self.scores(model, fold, known)
        return scores

    @torch.no_grad()
    def scores(
        self, model: Detector, fold: int, known: Callable[[int], list[Tensor] | None] = lambda number: None
    ) -> dict[int, Tensor]:
        """Score and map's maximum (2,) of the images of a block that are judged, by number; each process judges
        its part. `known` may tell the energies of an image, which is not read then."""
        processes = self.good.processes
        numbers = [number for number in self.numbers if self.fold[number] == fold]
        parts = [[n for n in numbers if n % processes.count == rank] for rank in range(processes.count)]
        mine = parts[processes.rank]
        columns = [torch.empty(2, 0, device=model.device)]
        for number in counted(mine, "judging good images", len(mine)):
            energies = known(number)
            if energies is None:
                images = data.read_batch([self.good.trained_on[number]], model.shape)
                energies = model.judge(images, self.left_out(number))
            columns.append(model.scores(energies))
        together = processes.concatenated(torch.cat(columns, dim=1).T)
        return dict(zip(itertools.chain(*parts), together, strict=True))

    def settle(self, model: Detector, scores: dict[int, Tensor]) -> None:
        """Let these scores, by number, calibrate the threshold, beside those of the held-out images; but in a series
        these have neighbours among the others, and do not count. Says so if it is one."""
        columns = torch.stack([scores[number] for number in self.numbers], dim=1)
        judged = [(self.good.trained_on[number], self.left_out(number)) for number in self.numbers]
        different = min(self.different, columns.shape[1])
        if not self.is_series:
            columns = torch.cat((model.normal, columns), dim=1)
            judged = model.calibrated_on + judged
            different = columns.shape[1]
        model.normal = columns
        model.different = torch.tensor(different, device=model.device)
        model.calibrated_on = judged
        if self.is_series:
            print(
                f"a series: images that follow each other by name are alike, and these {len(self.fold)} show about "
                f"{different} different ones. Each was judged without its neighbours, and the threshold is no surer "
                f"than {different} images make it; good images from other days would help"
            )


def calibrate_as_new(
    model: Detector,
    feed: Feed,
    as_new: AsNew,
    learn_anew: Callable[[Feed, int, str], None],
    calibrate: Callable[[], None],
) -> None:
    """The calibration on all good images, a third of them after the other; each third is judged by a flow and a
    classifier that the others have taught. `learn_anew(feed, number, what)` is another training and the calibration on
    the held-out images after it; `calibrate()` is that calibration alone."""
    trained = model.flow, model.classifier

    def known(number: int) -> list[Tensor] | None:
        """The energies of a good image, if its rows tell: these, too, are seen without its own prototypes."""
        code = None if as_new.is_series else feed.code(number)
        return None if code is None else model.experts(code)

    def fit_without(fold: int) -> None:
        learn_anew(feed.only(as_new.fold != fold), fold, f"third {fold + 1}, epoch")

    scores = as_new.all_scores(model, fit_without, known)
    model.flow, model.classifier = trained
    calibrate()
    as_new.settle(model, scores)


@torch.no_grad()
def alike_in_order(
    prototypes: nn.Module, dtype: torch.dtype, files: Sequence[Path], rows: Tensor, images: Tensor
) -> float:
    """How much more alike good images are that follow each other by name: how many times as often as by chance the
    prototypes that are nearest to an image, its own left out, come from its own tenth of the `files`. 1 where the names
    tell nothing. Some of the images are asked, by those of the rows y (N, C) that have their numbers (N,). The
    `prototypes` are a `bank.Prototypes`."""
    tenth = blocks(files, TENTHS)
    origin = prototypes.origin.cpu()
    found, expected = 0.0, 0.0
    for number in range(0, len(tenth), math.ceil(len(tenth) / ASKED)):
        mine = rows[(images == number).to(rows.device)].float()
        if not len(mine):  # of very many images
            continue
        index = prototypes.nearest(mine, 1, dtype, torch.tensor([number])).cpu()
        is_near = tenth[origin] == tenth[number]
        others = origin != number
        found += float(is_near[index].float().mean())
        expected += float((is_near & others).sum() / others.sum().clamp(min=1))
    return found / max(expected, 1e-6)


def blocks(files: list[Path], count: int) -> Tensor:
    """(n,) the number of the block of each of n files: as many blocks, each contiguous in the natural order of names,
    2 before 10."""
    order = sorted(range(len(files)), key=lambda number: natural(files[number]))
    block = torch.empty(len(files), dtype=torch.long)
    block[torch.tensor(order)] = torch.arange(len(files)) * count // len(files)
    return block


def natural(path: Path) -> list:
    """Sorts names as people do: the digits in them count as numbers."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", path.as_posix())]


def unseen(model: Detector, files: list[Path]) -> list[Path]:
    """Those of these files that the training of `model` had no part of: neither good images, be they held out or not,
    nor defects. Copies are known by their bytes. A line says how many others there are."""
    known = set(model.settings.good) | {value for _, value in model.settings.taught}
    new = [path for path in files if fingerprint(path) not in known]
    if len(new) < len(files):
        print(
            f"left out {len(files) - len(new)} of {len(files)} images: the detector was trained with them, and judges "
            "them too kindly"
        )
    return new


@torch.no_grad()
def recalibrate(model: Detector, files: list[Path], alike: float) -> None:
    """Give `model` the scale and the thresholds that these new good images ask for, of which those that follow each
    other are `alike` times as alike as others. Raises InputError if they are too few."""
    different = len(files)
    is_series = alike >= ALIKE and len(files) >= FEW
    if is_series:
        different = round(len(files) / alike)
        print(
            f"a series: images that follow each other by name are alike, and these {len(files)} show about "
            f"{different} different ones; the threshold is no surer than {different} images make it"
        )
    if different < LEAST_IMAGES:
        raise InputError(f"--recalibrate: {different} different new images; it takes {LEAST_IMAGES}, better 50")
    energies = [model.judge(images) for images in data.batches(files, model.shape)]
    scores = torch.cat([model.scores(batch)[0] for batch in energies]).cpu().numpy()
    if drift(scores, model.normal[0].cpu().numpy()) == "lower":
        print(
            "warning: three quarters of these images score lower than three quarters of the good images did that the "
            "threshold comes from. Are they copies of what the detector was trained with? Then it promises too much"
        )
    model.calibrate(energies)
    model.different = torch.tensor(different, device=model.device)
    model.camera = torch.from_numpy(usual_of(files, model.shape)).to(model.camera)


@torch.no_grad()
def print_camera_copies(model: Detector, files: Sequence[Path]) -> None:
    """A line on how many camera copies of these held-out images exceed the threshold; at most COPIES are tried."""
    chosen = files[:COPIES]
    limit = model.thresholds().score
    flagged = 0
    for number, path in enumerate(chosen):
        rng = np.random.default_rng([model.settings.seed, number])
        copy = camera_copy(read_image(path, model.shape), rng)
        _, scores = model(to_tensor(copy[None]))
        flagged += int(scores.item() > limit)
    print(
        f"tested on copies of {len(chosen)} held-out good images with slight blur, noise and JPEG compression: "
        f"{flagged} exceed the threshold"
    )


@torch.no_grad()
def show_suspects(model: Detector, own: OwnFiles, folder: Path) -> None:
    """A line and suspects.png, if there are odd ones among the images that calibrated the model. They may be defective
    ones that got among the good. `folder` is where the picture will lie in the end, which the line says."""
    scores = model.normal[0].cpu().numpy()
    suspects = odd_ones(scores)
    if not len(suspects) or not model.calibrated_on:
        return
    limits = model.thresholds()
    names, pictures = [], []
    for index in suspects[:SHOWN]:
        path, without = model.calibrated_on[index]
        heat = model.maps(model.judge(data.read_batch([path], model.shape), without))[0].cpu().numpy()
        photo = draw.dimmed(photograph(load_image(path), draw.LARGE), model.roi)
        verdict = model.verdict(float(scores[index]), heat, (photo.height, photo.width), limits)
        names.append(path.name)
        pictures.append(draw.verdict_picture(photo, path.name, verdict, limits))
    draw.save_picture(own.claim(SUSPECTS), draw.below_each_other(pictures))
    others = f" and {len(suspects) - len(names)} more" if len(suspects) > len(names) else ""
    print(
        f"{len(suspects)} of the good images look unlike the others: {', '.join(names)}{others}; see "
        f"{folder / SUSPECTS}. If they are defective, remove them and train again"
    )
