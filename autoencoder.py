"""The projecting autoencoder (Bauer, Nakajima, Müller, arXiv 2206.11723): it learns to undo partial corruptions, and so
to project an image onto the manifold of normal ones. An anomaly is what the projection moves. No pretrained weights.
Shapes: images (B, 3, H, W) in [0, 1]. Draw what it does: python autoencoder.py RUN"""
import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms.functional import gaussian_blur

import evaluate
from clflow import Detector, resize
from synth import InputError, good_images, read_image, synthesize

WIDTHS, BRANCH, DILATIONS = (32, 64, 128), 64, (1, 2, 4, 8)


def double_conv(before: int, channels: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch norm and ReLU."""
    return nn.Sequential(Conv2dNormActivation(before, channels), Conv2dNormActivation(channels, channels))


class StackedDilated(nn.ModuleList):
    """Parallel 3x3 convolutions of growing dilation, concatenated: near and far context in one layer."""

    def __init__(self, width: int):
        super().__init__(Conv2dNormActivation(width, BRANCH, dilation=d) for d in DILATIONS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], dim=1)


class Projection(nn.Module):
    """The network f: images (B, 3, H, W) -> images, H and W divisible by 8. Blocks of 2x2 pixels are folded into the
    channels, to save time. No skip leads past the dilated layers: with one, and weight decay, they die unnoticed."""

    def __init__(self):
        super().__init__()
        context, skipped = len(DILATIONS) * BRANCH, WIDTHS[:-1]
        self.down = nn.ModuleList(map(double_conv, (12, *WIDTHS), WIDTHS))
        self.context = nn.Sequential(*map(StackedDilated, (WIDTHS[-1], context, context, context)))
        self.up = nn.ModuleList(nn.ConvTranspose2d(c, w, 2, stride=2)
                                for c, w in zip((*skipped[1:], context), skipped, strict=True))
        self.gates = nn.ModuleList(nn.Conv2d(2 * w, 1, kernel_size=1) for w in skipped)
        self.mirror = nn.ModuleList(map(double_conv, skipped, skipped))
        self.out = nn.Conv2d(WIDTHS[0], 12, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean(dim=(2, 3), keepdim=True)  # put back: a shift of the light is no defect
        x, encoded = self.down[0](F.pixel_unshuffle(images - mean, 2)), []
        for block in self.down[1:]:
            encoded.append(x)
            x = block(F.max_pool2d(x, 2))
        x = self.context(x)
        for i in reversed(range(len(encoded))):  # convex combinations: what is corrupted is to be the decoder's
            skip, x = encoded[i], self.up[i](x)
            x = self.mirror[i](torch.lerp(x, skip, self.gates[i](torch.cat((skip, x), dim=1)).sigmoid()))
        return F.pixel_shuffle(self.out(x), 2) + mean


class Autoencoder(Detector):
    """The detector: E = G8 * |G2 * (f(x) - x)|^2 / 2 SIGMA^2, averaged over the channels, a Gaussian's energy around
    the projection. Gk filters with a standard deviation of k pixels (at size 256): what is moved to and fro, like
    edges, cancels in G2, and G8 gathers what a defect has left."""
    SIGMA = 0.05  # of the images' range 0..1: where the bounded map saturates

    def __init__(self, settings: dict):
        if settings["backbone"]:
            raise InputError(f"--backbone {settings['backbone']}: the autoencoder has none, leave it out")
        if settings["size"] % 8:
            raise InputError(f"--size {settings['size']}: the autoencoder takes multiples of 8")
        super().__init__(settings, scales=1)
        self.projection = Projection().to(memory_format=torch.channels_last)

    def project(self, images: Tensor) -> Tensor:
        """f(x), of images (B, 3, size, size)."""
        with self.autocast():
            return self.projection(images.contiguous(memory_format=torch.channels_last)).float()

    @torch.no_grad()
    def energies(self, images: Tensor) -> list[Tensor]:
        """[E], E (B, size / 4, size / 4), of images (B, 3, H, W)."""
        x = resize(images.to(self.levels.device), (self.size, self.size))
        kernel = [2 * round(3 * self.size / 128) + 1] * 2, [self.size / 128] * 2
        moved = gaussian_blur(self.project(x) - x, *kernel).square().mean(dim=1, keepdim=True)
        return [gaussian_blur(F.avg_pool2d(moved, 4), *kernel)[:, 0] / (2 * self.SIGMA ** 2)]


def bend(images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Elastic deformation of every other image, at random: in a disc where there is contrast, a shift, turn and stretch
    that fades towards the rim. Takes and returns images (A, 3, S, S) and masks (A, 1, S, S); these gain the discs."""
    contrast = (images - gaussian_blur(images, 9, 2)).square().mean(dim=1).flatten(1) + 1e-9
    grid = F.affine_grid(torch.eye(2, 3)[None], images[:1].shape, align_corners=False).to(images)
    centre = grid.flatten(0, 2)[torch.multinomial(contrast, 1)][:, None]
    away, radius = grid - centre, images.new_empty(len(images), 1, 1, 1).uniform_(0.06, 0.3)  # of half the side
    shift, turn = (images.new_empty(len(images), 1, rows, 2).normal_(0, 0.3) for rows in (1, 2))
    weight = (torch.rand_like(radius) < 0.5) * (1 - (away / radius).square().sum(dim=3, keepdim=True)).clamp(min=0) ** 2
    bent = F.grid_sample(images, grid + weight * (radius * shift + away @ turn), "bilinear", "reflection", False)
    return bent, torch.maximum(mask, (weight > 0.02).permute(0, 3, 1, 2).float())


class Losses(nn.Module):
    """L = LAMBDA |(1 - M)(f(x-) - x+)|^2 / |1 - M| + (1 - LAMBDA) |M (f(x-) - x+)|^2 / |M|, M where x- is painted
    (`synthesize`) or bent. The x+ that have no x-, half of a batch, teach nothing here."""
    LAMBDA = 0.9  # inferred; the corrupted region is small, and its error large
    DEFAULTS, EPOCH, DECAY = {"backbone": None, "size": 256, "epochs": 50}, 1000, 0  # EPOCH: images; DECAY: of weights
    DEMO = {**DEFAULTS, "size": 128, "epochs": 15, "lr": 5e-3}

    def __init__(self, model: Autoencoder, args: argparse.Namespace):
        super().__init__()
        self.model = model

    def prepare(self, files: list[Path]) -> None:
        """Nothing: no weights to load, no norms to fit."""

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """images: B ones x+, then A <= B ones x- that were made from the first of them; mask (A, 1, size, size)."""
        corrupted, mask = bend(images[-len(mask):], mask)
        self.model.train()  # the norms take the batch's statistics here, and the running ones elsewhere
        error = (self.model.project(corrupted) - images[:len(mask)]).square().mean(dim=1, keepdim=True)
        self.model.eval()
        outside, inside = (((error * m).sum(dim=(1, 2, 3)) / m.sum(dim=(1, 2, 3))).mean() for m in (1 - mask, mask))
        return {"loss": self.LAMBDA * outside + (1 - self.LAMBDA) * inside, "outside": outside, "inside": inside}


@torch.no_grad()
def main() -> None:
    parser = evaluate.Parser(description="Draw RUN/projection.png: a good image, corrupted, projected; anomaly map.")
    parser.add_argument("run", type=Path, help="run folder of train.py --method autoencoder")
    run = parser.parse_args().run
    model, rows = Detector.load(run / "model.pt"), []
    if model.settings["method"] != "autoencoder":
        raise InputError(f"{run}: is not of the autoencoder; train one with --method autoencoder")
    data, limit = Path(model.settings["data"]), evaluate.thresholds(model.normal, 0.02)[1]
    files = ([path for path, bad, _ in evaluate.labelled_images(data) if not bad] or good_images(data))[:4]
    for i, image in enumerate(read_image(path, model.size) for path in files):
        x = torch.from_numpy(synthesize(image, np.random.default_rng(i))[0]).permute(2, 0, 1)[None]
        shown = [image, *(y[0].permute(1, 2, 0).clamp(0, 1).numpy() for y in (x, model.project(x)))]
        heat = evaluate.colours(model(x)[0][0].numpy(), limit)
        rows.append(Image.fromarray(np.hstack([*(np.uint8(255 * y) for y in shown), heat])))
    evaluate.save_pictures(run / "projection.png", *rows)
    print(f"wrote {run / 'projection.png'}")


if __name__ == "__main__":
    evaluate.run(main)
