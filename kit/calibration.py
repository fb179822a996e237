"""The scores of normal images, from which thresholds come, and the odd ones among them."""

from pathlib import Path

import numpy as np
import torch

from kit import data, draw
from kit.detector import Detector
from kit.good import GoodImages
from kit.images import load_image, photograph
from kit.owned import OwnFiles
from kit.progress import counted
from kit.verdict import odd_ones

LIMIT = 1000  # images at most that a threshold comes from, beside the held-out ones
SHOWN = 12  # suspects at most
SUSPECTS = "suspects.png"


@torch.no_grad()
def add_training_images(model: Detector, good: GoodImages) -> list[int]:
    """Add to `model.normal` the scores of the images that `model` was trained on, each judged as if it were new, so
    that the threshold comes from all good images and not from the held-out ones alone. Returns their numbers, in order;
    of more than LIMIT it draws some at random.

    This is the jackknife (Barber, Candes, Ramdas, Tibshirani, arXiv 1905.02928) for what holds on to single images,
    the prototypes. What is trained beside them, on rows of all images, gives no image a score that is too low: see
    docs/results.md."""
    files, processes = good.trained_on, good.processes
    if not model.CAN_LEAVE_OUT or len(files) < 2:
        return []
    order = np.random.default_rng(model.settings.seed).permutation(len(files))[:LIMIT]
    numbers = [order[rank :: processes.count].tolist() for rank in range(processes.count)]
    scores = [torch.empty(2, 0, device=model.device)]
    mine = numbers[processes.rank]
    for number in counted(mine, "judging good images", len(mine)):
        images = data.read_batch([files[number]], model.size)
        scores.append(model.scores(model.energies(images, without=number)))
    together = processes.concatenated(torch.cat(scores, dim=1).T).T
    model.normal = torch.cat((model.normal, together), dim=1)
    return [number for part in numbers for number in part]


def recalibrate(model: Detector, files: list[Path]) -> list[Path]:
    """Give `model` the scale and the thresholds that these new good images ask for, of which there are at least two;
    returns those that it took, at most LIMIT of them, drawn at random."""
    order = np.random.default_rng(0).permutation(len(files))[:LIMIT]
    taken = [files[i] for i in order]
    with torch.no_grad():
        model.calibrate(model.energies(images) for images in data.batches(taken, model.size))
    return taken


@torch.no_grad()
def show_suspects(model: Detector, good: GoodImages, numbers: list[int], own: OwnFiles) -> None:
    """A line and suspects.png, if there are odd ones among the images that calibrated the model: those that were held
    out, and those that were trained on with these numbers. They may be defective ones that got among the good."""
    scores = model.normal[0].cpu().numpy()
    suspects = odd_ones(scores)
    if not len(suspects):
        return
    limits = model.thresholds()
    names, pictures = [], []
    for index in suspects[:SHOWN]:
        number = numbers[index - len(good.held_out)] if index >= len(good.held_out) else None
        path = good.held_out[index] if number is None else good.trained_on[number]
        images = data.read_batch([path], model.size)
        heat = model.maps(model.energies(images, without=number))[0].cpu().numpy()
        photo = photograph(load_image(path), draw.LARGE)
        verdict = model.verdict(float(scores[index]), heat, (photo.height, photo.width), limits)
        names.append(path.name)
        pictures.append(draw.verdict_picture(photo, path.name, verdict, limits))
    draw.save_picture(own.claim(SUSPECTS), draw.below_each_other(pictures))
    others = f" and {len(suspects) - len(names)} more" if len(suspects) > len(names) else ""
    print(
        f"{len(suspects)} of the good images look unlike the others: {', '.join(names)}{others}; see "
        f"{own.folder / SUSPECTS}. If they are defective, remove them and train again"
    )
