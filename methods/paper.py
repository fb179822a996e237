"""CL-Flow in the paper's own form (Wang, Li, Luo, Bi, arXiv 2311.06794), from the image to the loss. Only the abstract
was available, so this is a reconstruction. clflow.py is our own form, which detects more.

    a frozen backbone's maps at three scales -> a 2D flow for each -> energies E; at each scale C times the sum
    of E over all positions is the exact NLL, up to a constant
    pairs x+ and x- = synthesize(x+) -> L = L_nll + lambda_cls L_cls + lambda_con L_con, trained in one stage

Shapes: images (B, 3, H, W) in [0, 1]; at each scale features x and latents z (B, C, h, w), log-determinants and
energies (B, h, w). A training step sees B images x+, and A images x- that were made from the first A of them."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clflow import classification_loss, energy, info_nce, tamed
from flows import Flow2D
from kit import data
from kit.backbone import BACKBONES
from kit.calibration import calibrate_on
from kit.detector import Detector
from kit.good import GoodImages, Painter
from kit.rows import touches
from kit.settings import PaperSettings, Shape
from kit.training import Descent, Epoch, train_epochs
from kit.windows import PIXELS
from methods.pairs import PairLoader
from synth import synthesize

STRIDES = (4, 8, 16)  # pixels: the three scales
FITTED = 100  # good images at most, to fit the standardisation
BORDER = 3.0  # the class changes at this many standard deviations above the mean energy of normal positions
POSITIONS = 64  # drawn from each x-, so that small and large defects have equal weight
IMAGES_PER_EPOCH = 200
WEIGHT_DECAY = 1e-5


# ---------------------------------------------------------------- image -> features -> latents -> energies


class Standardisation(nn.Module):
    """x -> (x - mean) / deviation, channel by channel. Fitted once and never trained: a trained norm would lower the
    NLL for free, since no log-determinant accounts for it."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("deviation", torch.ones(channels, 1, 1))

    def fit(self, means: Tensor, variances: Tensor) -> None:
        """From the mean and the variance of x within each of n good images, (n, C) both. The variance over all of
        them is that within images and that between them."""
        variance = variances.mean(dim=0) + means.var(dim=0, correction=0)
        floor = 1e-3 * variance.mean() + 1e-12  # keeps channels that hardly vary, which are noise, small
        self.mean.copy_(means.mean(dim=0)[:, None, None])
        self.deviation.copy_((variance + floor).sqrt()[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation


class Paper(Detector):
    """The detector: three flows, each an expert. `Detector` brings their energies to a common scale, with the held-out
    good images, and turns them into a map, a score and a verdict. At test time only the likelihood counts."""

    SETTINGS = PaperSettings
    MOST_PIXELS = PIXELS  # the flows process the whole image at once

    def __init__(self, settings: PaperSettings):
        backbone = BACKBONES[settings.backbone](strides=STRIDES)
        super().__init__(settings, backbone, [1 / len(STRIDES)] * len(STRIDES))
        self.norms = nn.ModuleList(Standardisation(channels) for channels in backbone.widths)
        self.flows = nn.ModuleList(
            Flow2D(channels, settings.steps, kernel_sizes=(3,), hidden_ratio=1.0) for channels in backbone.widths
        )
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def scales(self, images: Tensor) -> list[Tensor]:
        """The frozen features of each scale, averaged 3x3: [(B, C, h, w)]."""
        with self.autocast():
            return self.backbone.scales(images.to(self.device))

    def latents(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Latents z (B, C, h, w) and log-determinants (B, h, w) of each scale."""
        found = []
        for x, norm, flow in zip(self.scales(images), self.norms, self.flows, strict=True):
            with self.autocast():
                found.append(flow(norm(x)))
        return found

    @torch.no_grad()
    def energies(self, images: Tensor, excluded: Tensor | None = None) -> list[Tensor]:
        """The tamed energies of each scale, all enlarged to the finest one: [(B, h, w)]."""
        found = [tamed(energy(z, log_det)) for z, log_det in self.latents(images)]
        finest = found[0].shape[1:]
        return [F.interpolate(e[:, None], finest, mode="bilinear")[:, 0] for e in found]

    @torch.no_grad()
    def fit(self, good: GoodImages) -> None:
        """Fit the standardisation of each scale on at most FITTED good images."""
        means = [[] for _ in STRIDES]
        variances = [[] for _ in STRIDES]
        for images in data.batches(good.trained_on[:FITTED], self.shape):
            for scale, x in enumerate(self.scales(images)):
                inside = x[:, :, self.inside(x.shape[2:])]  # (B, C, n)
                means[scale].append(inside.mean(dim=2))
                variances[scale].append(inside.var(dim=2, correction=0))
        for scale, norm in enumerate(self.norms):
            norm.fit(torch.cat(means[scale]), torch.cat(variances[scale]))


# ---------------------------------------------------------------- which positions a loss sees


def positions_in_boxes(boxes: Tensor, image_shape: Shape, map_shape: Shape) -> Tensor:
    """The positions of maps of `map_shape` (h, w) that boxes (A, 4) touch, as (A, h, w) bool. The boxes are (y0, x0,
    y1, x1), half-open, in pixels of images of `image_shape` (H, W)."""
    y0, x0, y1, x1 = boxes.T[:, :, None]  # (A, 1) each
    row = torch.arange(map_shape[0], device=boxes.device)
    column = torch.arange(map_shape[1], device=boxes.device)
    pixels_down, pixels_across = image_shape[0] / map_shape[0], image_shape[1] / map_shape[1]  # of one position
    rows = (row * pixels_down < y1) & ((row + 1) * pixels_down > y0)  # (A, h)
    columns = (column * pixels_across < x1) & ((column + 1) * pixels_across > x0)  # (A, w)
    return rows[:, :, None] & columns[:, None, :]


def drawn_places(where: Tensor) -> Tensor:
    """POSITIONS random places of each map, from those that `where` (A, h, w) bool marks, with replacement: (A, n)."""
    return torch.multinomial(where.flatten(1).float(), POSITIONS, replacement=True)


def rows_at(maps: Tensor, places: Tensor) -> Tensor:
    """Maps (A, C, h, w) at places (A, n) -> rows (A n, C)."""
    index = places[:, None].expand(-1, maps.shape[1], -1)  # (A, C, n)
    return maps.flatten(2).gather(2, index).transpose(1, 2).flatten(0, 1)


# ---------------------------------------------------------------- the losses


def log_odds(e: Tensor, normal: Tensor) -> Tensor:
    """Log-odds of being anomalous, from energies e: how many standard deviations of normal energies they lie above the
    border m between the classes,

        p(normal) = sigmoid((m - e) / sigma);   m = mean + BORDER sigma

    The mean and sigma of `normal` energies get no gradient here, since they only define the border. At the mean the
    log-odds are -3, close to the smoothed label of 0.05: there the classification has hardly any gradient, and the
    likelihood alone decides."""
    normal = normal.detach()
    sigma = normal.std() + 1e-6
    return (e - normal.mean()) / sigma - BORDER


def contrast_cosine(box: Tensor, negative_box: Tensor, normal: Tensor, temperature: float) -> Tensor:
    """L_con on the cosine, as in the abstract; all arguments (n, C). Box_s are latents of x+ inside the box of the
    defect, Neg_Box_s those of x- at the same places. Box_s is pulled towards x+ at random places, and pushed away from
    Neg_Box_s:

        -log( e^(cos(Box, Z) / T) / (e^(cos(Box, Z) / T) + sum_k e^(cos(Box, Neg_Box_k) / T)) )
    """
    box, negative_box, normal = F.normalize(box, dim=1), F.normalize(negative_box, dim=1), F.normalize(normal, dim=1)
    return info_nce((box * normal).sum(dim=1), box @ negative_box.T, temperature)


class Losses(nn.Module):
    """L = L_nll + lambda_cls L_cls + lambda_con L_con, each the mean over the scales. This is a module because
    DistributedDataParallel wraps modules.

    `forward(images, mask, boxes)`: B images x+, then A images x- that were made from the first A of them, (B + A, 3, H,
    W); the masks (A, 1, H, W) of the defects, and the boxes (A, 4) around them. Returns the losses of the batch by
    name; training minimises "loss"."""

    def __init__(self, model: Paper):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, mask: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        settings = self.model.settings
        if not settings.classification_weight and not settings.contrast_weight:
            energies = [energy(z, log_det) for z, log_det in self.model.latents(images[: -len(mask)])]
            nll = torch.stack([e[:, self.model.inside(e.shape[1:])].mean() for e in energies]).mean()
            return {"loss": nll, "nll": nll}  # x- are not used
        scales = [self.of_scale(z, log_det, mask, boxes) for z, log_det in self.model.latents(images)]
        losses = {name: torch.stack([scale[name] for scale in scales]).mean() for name in scales[0]}
        loss = losses["nll"]
        if settings.classification_weight:
            loss = loss + settings.classification_weight * losses["classification"]
        if settings.contrast_weight:
            loss = loss + settings.contrast_weight * losses["contrast"]
        return {"loss": loss, **losses}

    def of_scale(self, z: Tensor, log_det: Tensor, mask: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """The losses of one scale whose weight is not 0. Energies of x- are unbounded, so L_cls and the
        contrast of energies use tamed ones: otherwise a few outliers would dominate the clipped gradients."""
        settings = self.model.settings
        pairs = len(mask)
        e = energy(z, log_det)
        normal = e[:-pairs][:, self.model.inside(z.shape[2:])].flatten()  # of x+ in the region of interest, (N,)
        losses = {"nll": normal.mean()}
        touched = drawn_places(touches(mask, z.shape[2:]))
        tamed_normal = tamed(normal)
        anomalous = tamed(rows_at(e[-pairs:, None], touched))[:, 0]  # of x- where its defect is, (A n,)
        if settings.classification_weight:
            both = log_odds(tamed_normal, tamed_normal), log_odds(anomalous, tamed_normal)
            losses["classification"] = classification_loss(*both, settings.smoothing)
        if settings.contrast_weight and settings.contrast == "energy":
            losses["contrast"] = info_nce(anomalous, tamed_normal, settings.temperature)
        if settings.contrast_weight and settings.contrast == "cosine":
            losses["contrast"] = self.contrast_of_boxes(z, mask, boxes)
        return losses

    def contrast_of_boxes(self, z: Tensor, mask: Tensor, boxes: Tensor) -> Tensor:
        """`contrast_cosine` of latents (B + A, C, h, w) of one scale, at places drawn from the boxes."""
        pairs = len(boxes)
        is_in_box = positions_in_boxes(boxes, mask.shape[2:], z.shape[2:]) & self.model.inside(z.shape[2:])
        inside = drawn_places(is_in_box)  # there are some, since the mask lies in the region of interest
        box = rows_at(z[:pairs], inside)
        negative_box = rows_at(z[-pairs:], inside)
        everywhere = z[:-pairs].permute(0, 2, 3, 1)[:, self.model.inside(z.shape[2:])].flatten(0, 1)
        normal = everywhere[torch.randint(len(everywhere), (len(box),))]
        return contrast_cosine(box, negative_box, normal, self.model.settings.temperature)


# ---------------------------------------------------------------- the training


def train(model: Paper, good: GoodImages, progress: dict | None = None) -> Iterator[Epoch]:
    """Train a model with ImageNet weights on good images, in one stage. A generator: it yields after each epoch, and
    once before the first step; the model is then calibrated on the held-out images and ready to judge. The number of
    epochs is fixed, and the last one counts.

    With the `progress` of an earlier call's epoch, and its model, training continues from there."""
    painter = Painter(good, synthesize, model)
    pairs = PairLoader(painter, IMAGES_PER_EPOCH, model.settings.batch, model.device)
    if progress is None:
        model.fit(good)
    descent = Descent(Losses(model), len(pairs), WEIGHT_DECAY, good.processes)
    for epoch in train_epochs(descent, pairs.epoch, progress):
        # To judge the other good images as if they were new, the flows would have to be trained three more times.
        calibrate_on(model, good.held_out)
        yield epoch
