"""The steps from an image to its energies, for a figure: evaluate.py --explain draws them."""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from clflow import CLFlow, energy, tamed
from kit import draw
from kit.backbone import as_rows
from kit.detector import Detector
from kit.verdict import Thresholds, Verdict
from methods.autoencoder import Autoencoder
from methods.nearest import scaled_distances
from methods.paper import STRIDES, Paper

Stages = list[tuple[str, Tensor]]  # title, map (h, w)


@torch.no_grad()
def stages_of(model: Detector, images: Tensor) -> Stages:
    """The steps from one image (1, 3, H, W) to its energies. A method without steps of its own here has one for each of
    its experts."""
    images = model.in_usual_brightness(images)
    if isinstance(model, CLFlow):
        return of_clflow(model, images)
    if isinstance(model, Paper):
        return of_paper(model, images)
    if isinstance(model, Autoencoder):
        return of_autoencoder(model, images)
    return [(f"expert {i}", e[0]) for i, e in enumerate(model.energies_in_windows(images), start=1)]


def of_clflow(model: CLFlow, images: Tensor) -> Stages:
    """A step for each equation of docs/method.md."""
    x = model.features(images)
    code = model.code_map(x)
    w, distance = code[:, :-1], code[0, -1]
    z, log_det = model.latents(w)
    e = energy(z, log_det)
    steps = [
        ("|y|, features", x[0].norm(dim=0)),
        ("|r|, relative to the nearest prototype", distance),
        ("|w|, whitened", w[0].norm(dim=0)),
        ("1/2 mean z^2, latents", 0.5 * z[0].square().mean(dim=0)),
        ("log|det| / K", log_det[0] / z.shape[1]),
        ("tamed E, the flow's energy", tamed(e)[0]),
    ]
    if model.classifier is not None:
        steps.append(("log-odds of the classifier", model.log_odds(as_rows(w)).view(distance.shape)))
    return steps


def of_paper(model: Paper, images: Tensor) -> Stages:
    """Two steps for each scale."""
    steps = []
    for stride, x, norm, flow in zip(STRIDES, model.scales(images), model.norms, model.flows, strict=True):
        x = norm(x)
        with model.autocast():
            z, log_det = flow(x)
        steps.append((f"|x|, stride {stride}", x[0].norm(dim=0)))
        steps.append((f"tamed E, stride {stride}", tamed(energy(z, log_det))[0]))
    return steps


def of_autoencoder(model: Autoencoder, images: Tensor) -> Stages:
    images = images.to(model.device)
    projected = model.project(images)
    moved = model.phi(projected) - model.phi(images)
    return [
        ("f(x), brightness", projected[0].mean(dim=0)),
        ("|f(x) - x|, pixels", (projected - images)[0].norm(dim=0)),
        ("|d|, features", moved[0].norm(dim=0)),
        ("E, compared with the bank", scaled_distances(model.prototypes, moved, True, model.dtype)[0]),
    ]


def explanation(
    photo: Image.Image, name: str, stages: list[tuple[str, np.ndarray]], verdict: Verdict, limits: Thresholds
) -> Image.Image:
    """From an image, in the size in which it is judged, to its verdict: the image, each of the `stages` (title, map)
    with its lowest and highest value, and the combined map with the verdict; three panels per row. Black is the lowest
    value, yellow the highest; the combined map has the colours of all verdicts. Panels of wide images are stacked."""
    columns = 1 if draw.is_wide(photo) else 3
    panels = [(name, photo)]
    for title, values in stages:
        low, high = float(values.min()), float(values.max())
        shade = draw.heat_colours(values - low, max(high - low, 1e-9) / 2)
        panels.append((f"{title}\n{low:.2f} to {high:.2f}", Image.fromarray(shade)))
    said = "anomalous" if verdict.anomalous else "normal"
    line = draw.outline(verdict.found)
    joint = np.where(line, np.uint8(255), draw.heat_colours(verdict.anomaly_map, limits.anomaly_map))
    panels.append(
        (f"combined map; score {verdict.score:.2f}: {said}\nthreshold {limits.score:.2f}", Image.fromarray(joint))
    )
    width = draw.WIDTH // columns
    height = max(1, round((width - draw.GAP) * photo.height / photo.width)) + draw.GAP
    rows = math.ceil(len(panels) / columns)
    sheet = Image.new("RGB", (columns * width, rows * (height + 42)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (title, panel) in enumerate(panels):
        left, top = i % columns * width, i // columns * (height + 42)
        pen.multiline_text((left + 4, top + 2), title, "black", ImageFont.load_default(14))
        sheet.paste(panel.resize((width - draw.GAP, height - draw.GAP)), (left, top + 40))
    return sheet
