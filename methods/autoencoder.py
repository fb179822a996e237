"""The projecting autoencoder (Bauer, Nakajima, Müller, arXiv 2206.11723): it learns to undo partial corruptions, and so
to project an image onto the manifold of good images. Anomalies are found where the projection changes the features of
a frozen backbone differently from the way it changes those of good images.

Shapes: images (B, 3, H, W) in [0, 1]. To see projections: python benchmarks/projection.py RUN"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms.functional import gaussian_blur

from bank import Prototypes
from kit import data
from kit.backbone import BACKBONES
from kit.calibration import calibrate_on
from kit.detector import Detector
from kit.good import GoodImages, Painter
from kit.rows import origins, spread
from kit.search import prototype_count
from kit.settings import AutoencoderSettings
from kit.training import Descent, Epoch, train_epochs
from kit.windows import PIXELS
from methods.nearest import scaled_distances
from methods.pairs import PairLoader
from synth import synthesize

WIDTHS = (32, 64, 128)  # channels of the encoder's blocks
BRANCH = 64  # channels of one dilated convolution
DILATIONS = (1, 2, 4, 8)
CONTEXT = BRANCH * len(DILATIONS)
FOLDED = 12  # channels of an image folded 2x2
ENLARGED = 1.5  # factor by which images are enlarged for the backbone
FITTED = 200  # good images at most, from which the bank is chosen
BANK_CANDIDATES = 50_000  # positions of these images, from which the bank is chosen
LAMBDA = 0.9  # of the loss, inferred: the corrupted region is small, and its error large
IMAGES_PER_EPOCH = 1000
WEIGHT_DECAY = 0


# ---------------------------------------------------------------- the network


def double_conv(before: int, channels: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch norm and ReLU."""
    return nn.Sequential(Conv2dNormActivation(before, channels), Conv2dNormActivation(channels, channels))


class StackedDilated(nn.ModuleList):
    """Parallel 3x3 convolutions with increasing dilation, concatenated: near and far context in one layer."""

    def __init__(self, width: int):
        super().__init__(Conv2dNormActivation(width, BRANCH, dilation=d) for d in DILATIONS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], dim=1)


class Projection(nn.Module):
    """The network f: images (B, 3, H, W) -> images, H and W divisible by 8. Blocks of 2x2 pixels are folded into the
    channels to save time. No skip connection bypasses the dilated layers: with one, and weight decay, their weights
    went to zero unnoticed."""

    def __init__(self):
        super().__init__()
        fine, middle, coarse = WIDTHS
        self.down = nn.ModuleList([double_conv(FOLDED, fine), double_conv(fine, middle), double_conv(middle, coarse)])
        self.context = nn.Sequential(StackedDilated(coarse), *(StackedDilated(CONTEXT) for _ in range(3)))
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(middle, fine, 2, stride=2), nn.ConvTranspose2d(CONTEXT, middle, 2, stride=2)]
        )
        self.gates = nn.ModuleList([nn.Conv2d(2 * fine, 1, 1), nn.Conv2d(2 * middle, 1, 1)])
        self.mirror = nn.ModuleList([double_conv(fine, fine), double_conv(middle, middle)])
        self.out = nn.Conv2d(fine, FOLDED, 1)

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean(dim=(2, 3), keepdim=True)  # added back at the end: a change of brightness is no defect
        x = self.down[0](F.pixel_unshuffle(images - mean, 2))
        encoded = []
        for block in self.down[1:]:
            encoded.append(x)
            x = block(F.max_pool2d(x, 2))
        x = self.context(x)
        for level in reversed(range(len(encoded))):
            x = self.combined(level, encoded[level], self.up[level](x))
        return F.pixel_shuffle(self.out(x), 2) + mean

    def combined(self, level: int, skip: Tensor, x: Tensor) -> Tensor:
        """The convex combination C skip + (1 - C) x, then a double convolution. Where the image is corrupted, the
        decoder's x should count."""
        gate = self.gates[level](torch.cat((skip, x), dim=1)).sigmoid()
        return self.mirror[level](torch.lerp(x, skip, gate))


class Autoencoder(Detector):
    """The detector: how the projection f changes the features phi of a frozen backbone, compared with the changes on
    good images,

        d = phi(f(x)) - phi(x);   E = |d - p| / spacing of p

    where p is the nearest of a bank of such differences from good images. Since f is not perfect, it changes good
    images, too, but in similar ways, which the bank contains."""

    SETTINGS = AutoencoderSettings
    MOST_PIXELS = PIXELS  # it processes the whole image at once

    def __init__(self, settings: AutoencoderSettings):
        projection = Projection()  # first, so that its weights do not depend on the backbone's
        backbone = BACKBONES[settings.backbone]()
        super().__init__(settings, backbone, [1.0])
        self.projection = projection
        self.enlarged = tuple(round(ENLARGED * side) for side in self.shape)
        self.prototypes = Prototypes(backbone.channels)
        self.to(memory_format=torch.channels_last)

    def project(self, images: Tensor) -> Tensor:
        """f(x) for images (B, 3, H, W)."""
        with self.autocast():
            return self.projection(images.contiguous(memory_format=torch.channels_last)).float()

    @torch.no_grad()
    def phi(self, images: Tensor) -> Tensor:
        """The backbone's features (B, C, h, w) of the enlarged images."""
        large = F.interpolate(images, self.enlarged, mode="bilinear", antialias=True)
        return self.features(large.clamp(0, 1))

    @torch.no_grad()
    def moved(self, images: Tensor) -> Tensor:
        """d (B, C, h, w) for images (B, 3, H, W)."""
        images = images.to(self.device)
        return self.phi(self.project(images)) - self.phi(images)

    @torch.no_grad()
    def energies(self, images: Tensor, excluded: Tensor | None = None) -> list[Tensor]:
        return [scaled_distances(self.prototypes, self.moved(images), True, self.dtype, excluded)]

    @torch.no_grad()
    def fit(self, good: GoodImages) -> None:
        """Choose the bank from the changes d of the present f on good images, at most FITTED of them."""
        files = good.trained_on[:FITTED]
        generator = torch.Generator().manual_seed(self.settings.seed)
        per_image = math.ceil(BANK_CANDIDATES / len(files))
        maps = map(self.moved, data.batches(files, self.shape))
        rows, is_inside = spread(maps, len(files), self, per_image, generator)
        count = prototype_count(self.settings, int(is_inside.sum()))
        self.prototypes.fit(rows, origins(rows, range(len(files))), count, generator)


# ---------------------------------------------------------------- corruptions and losses


def bend(images: Tensor, mask: Tensor, roi: Tensor) -> tuple[Tensor, Tensor]:
    """Elastic deformation of each image with probability 1/2: a shift, rotation and stretch in a disc with contrast,
    which fades towards the edge of the disc. Takes and returns images (A, 3, H, W) and masks (A, 1, H, W), to which the
    discs are added. Nothing outside the region of interest (H, W) is deformed."""
    contrast = (images - gaussian_blur(images, 9, 2)).square().mean(dim=1).add(1e-9).mul(roi).flatten(1)
    grid = F.affine_grid(torch.eye(2, 3)[None], images[:1].shape, align_corners=False).to(images)
    centre = grid.flatten(0, 2)[torch.multinomial(contrast, 1)][:, None]
    away = grid - centre
    radius = images.new_empty(len(images), 1, 1, 1).uniform_(0.06, 0.3)  # of half the side
    shift = images.new_empty(len(images), 1, 1, 2).normal_(0, 0.3)
    turn = images.new_empty(len(images), 1, 2, 2).normal_(0, 0.3)
    is_bent = torch.rand_like(radius) < 0.5
    weight = roi[None, ..., None] * is_bent * (1 - (away / radius).square().sum(dim=3, keepdim=True)).clamp(min=0) ** 2
    moved = grid + weight * (radius * shift + away @ turn)
    bent = F.grid_sample(images, moved, mode="bilinear", padding_mode="reflection", align_corners=False)
    return bent, torch.maximum(mask, (weight > 0.02).permute(0, 3, 1, 2).float())


class Losses(nn.Module):
    """L = LAMBDA |(1 - M)(f(x-) - x+)|^2 / |1 - M| + (1 - LAMBDA) |M (f(x-) - x+)|^2 / |M|, where M marks what is
    painted (`synthesize`) or bent in x-; 1 - M is the rest of the region of interest. The x+ without an x-, half of a
    batch, are not used.

    `forward(images, mask)`: B images x+, then A <= B images x- that were made from the first A of them; mask (A, 1, H,
    W). The boxes around the defects are not used. Returns the losses of the batch by name; training minimises
    "loss"."""

    def __init__(self, model: Autoencoder):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, mask: Tensor, boxes: Tensor | None = None) -> dict[str, Tensor]:
        clean, painted = images[: len(mask)], images[-len(mask) :]
        corrupted, mask = bend(painted, mask, self.model.roi)
        self.model.train()  # batch norms use the batch's statistics here, and the running ones elsewhere
        error = (self.model.project(corrupted) - clean).square().mean(dim=1, keepdim=True)
        self.model.eval()
        outside = region_error(error, (1 - mask) * self.model.roi)
        inside = region_error(error, mask)
        return {"loss": LAMBDA * outside + (1 - LAMBDA) * inside, "outside": outside, "inside": inside}


def region_error(error: Tensor, region: Tensor) -> Tensor:
    """Mean of `error` (A, 1, H, W) within `region` (same shape), then over the images, which have equal weight."""
    return ((error * region).sum(dim=(1, 2, 3)) / region.sum(dim=(1, 2, 3)).clamp(min=1)).mean()


# ---------------------------------------------------------------- the training


def train(model: Autoencoder, good: GoodImages, progress: dict | None = None) -> Iterator[Epoch]:
    """Train a model with ImageNet weights to undo what is painted on good images. A generator: it yields after each
    epoch, and once before the first step; bank and calibration then belong to the present f. With the `progress` of an
    earlier call's epoch, and its model, training continues from there."""
    painter = Painter(good, synthesize, model)
    pairs = PairLoader(painter, IMAGES_PER_EPOCH, model.settings.batch, model.device)
    descent = Descent(Losses(model), len(pairs), WEIGHT_DECAY, good.processes)
    for epoch in train_epochs(descent, pairs.epoch, progress):
        model.fit(good)
        calibrate_on(model, good.held_out)
        yield epoch
