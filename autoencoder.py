"""The projecting autoencoder (Bauer, Nakajima, Müller, arXiv 2206.11723): it learns to undo partial corruptions, and so
to project an image onto the manifold of normal ones. An anomaly is what the projection moves. No pretrained weights.
Shapes: images (B, 3, H, W) in [0, 1]. Draw what it does: python autoencoder.py RUN"""
import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

import evaluate
from clflow import Detector, resize
from synth import InputError, good_images, read_image, synthesize

WIDTHS, BRANCH, DILATIONS = (32, 64, 128), 128, (1, 2, 4, 8)


def double_conv(before: int, channels: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch norm and ReLU."""
    return nn.Sequential(nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
                         nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())


class Projection(nn.Module):
    """The network f: images (B, 3, H, W) -> images, H and W divisible by 16. Blocks of 2x2 pixels are folded into the
    channels: at a quarter of the cost, it learns more in the same time."""

    def __init__(self):
        super().__init__()
        wide = len(DILATIONS) * BRANCH
        self.down = nn.ModuleList(map(double_conv, (12, *WIDTHS), WIDTHS))
        self.context = nn.ModuleList(nn.ModuleList(nn.Conv2d(c, BRANCH, 3, padding=d, dilation=d) for d in DILATIONS)
                                     for c in (WIDTHS[-1], wide, wide, wide))
        self.up = nn.ModuleList(map(partial(nn.ConvTranspose2d, kernel_size=2, stride=2), (*WIDTHS[1:], wide), WIDTHS))
        self.gates = nn.ModuleList(nn.Conv2d(2 * width, 1, kernel_size=1) for width in WIDTHS)
        self.mirror = nn.ModuleList(map(double_conv, WIDTHS, WIDTHS))
        self.out = nn.Conv2d(WIDTHS[0], 12, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        x, encoded = F.pixel_unshuffle(images, 2), []
        for block in self.down:
            encoded.append(block(x))
            x = F.max_pool2d(encoded[-1], 2)
        for branches in self.context:  # stacked dilated convolutions: near and far context in one layer
            x = F.relu(torch.cat([branch(x) for branch in branches], dim=1))
        for i in reversed(range(len(WIDTHS))):  # skips by convex combination: what is corrupted is the decoder's
            x = self.up[i](x)
            gate = self.gates[i](torch.cat((encoded[i], x), dim=1)).sigmoid()
            x = self.mirror[i](torch.lerp(x, encoded[i], gate))
        return F.pixel_shuffle(self.out(x), 2)


class Autoencoder(Detector):
    """The detector: E = G4 * |G1 * (f(x) - x)|^2 / (C + G2 * |x - G2 * x|^2), squares averaged over the channels:
    what is moved, relative to the contrast of the place, as in SSIM (Wang et al. 2004), since what has more contrast is
    copied less exactly. Gk filters with a standard deviation of k pixels (at size 256)."""
    C = 0.03 ** 2  # SSIM's constant, for images in 0..1

    def __init__(self, settings: dict):
        if settings["backbone"]:
            raise InputError(f"--backbone {settings['backbone']}: the autoencoder has none, leave it out")
        if settings["size"] % 16:
            raise InputError(f"--size {settings['size']}: the autoencoder takes multiples of 16")
        super().__init__(settings, scales=1)
        self.projection = Projection()
        self.to(memory_format=torch.channels_last)

    def project(self, images: Tensor) -> Tensor:
        """f(x), of images (B, 3, size, size)."""
        with self.autocast():
            return self.projection(images.contiguous(memory_format=torch.channels_last)).float()

    @torch.no_grad()
    def energies(self, images: Tensor) -> list[Tensor]:
        """[E], E (B, size / 2, size / 2), of images (B, 3, H, W)."""
        def smooth(y: Tensor, pixels: float) -> Tensor:
            return gaussian_blur(y, [2 * round(3 * pixels * self.size / 256) + 1] * 2, [pixels * self.size / 256] * 2)

        x = resize(images.to(self.levels.device), (self.size, self.size))
        moved, contrast = (F.avg_pool2d(y.square().mean(dim=1, keepdim=True), 2)  # half the resolution is enough
                           for y in (smooth(self.project(x) - x, 1), x - smooth(x, 2)))
        return [(smooth(moved, 2) / (self.C + smooth(contrast, 1)))[:, 0]]


def bend(images: Tensor) -> tuple[Tensor, Tensor]:
    """Elastic deformation inside a disc of each image (A, 3, S, S), where there is contrast: a random shift, turn and
    stretch that fades towards the rim. Returns the images and the discs, (A, 1, S, S), 0 or 1."""
    contrast = images.mean(dim=1).unfold(1, 8, 8).unfold(2, 8, 8).std(dim=(3, 4)) + 1e-6  # of cells of 8 x 8 pixels
    place, cells = torch.multinomial(contrast.flatten(1), 1), contrast.shape[2]
    centre = (torch.cat((place % cells, place // cells), dim=1) + 0.5)[:, None, None] / cells * 2 - 1
    grid = F.affine_grid(torch.eye(2, 3).expand(len(images), 2, 3), images.shape, align_corners=False).to(images)
    away, radius = grid - centre, images.new_empty(len(images), 1, 1, 1).uniform_(0.06, 0.3)  # of half the side
    shift, turn = (images.new_empty(len(images), 1, rows, 2).normal_(0, 0.3) for rows in (1, 2))
    weight = (1 - (away / radius).square().sum(dim=3, keepdim=True)).clamp(min=0) ** 2
    bent = F.grid_sample(images, grid + weight * (radius * shift + away @ turn), "bilinear", "reflection", False)
    return bent, (weight > 0.02).permute(0, 3, 1, 2).float()


class Losses(nn.Module):
    """L = LAMBDA |(1 - M)(f(x-) - x+)|^2 / |1 - M| + (1 - LAMBDA) |M (f(x-) - x+)|^2 / |M|, M where x- is painted
    (`synthesize`) or bent. The x+ that have no x-, half of a batch, teach nothing here."""
    LAMBDA = 0.9  # inferred; the corrupted region is small, and its error large
    DEFAULTS, EPOCH = {"backbone": None, "size": 256, "epochs": 30}, 1000  # of options; images in an epoch
    DEMO = {**DEFAULTS, "size": 128, "epochs": 12, "lr": 5e-3}

    def __init__(self, model: Autoencoder, args: argparse.Namespace):
        super().__init__()
        self.model = model

    def prepare(self, files: list[Path]) -> None:
        """Nothing: no weights to load, no norms to fit."""

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """images: B ones x+, then A <= B ones x- that were made from the first of them; mask (A, 1, size, size)."""
        images = images.to(mask.device)
        corrupted, discs = bend(images[-len(mask):])
        mask = torch.maximum(mask, discs)
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
    torch.manual_seed(0)
    if model.settings["method"] != "autoencoder":
        raise InputError(f"{run}: is not of the autoencoder; train one with --method autoencoder")
    data = Path(model.settings["data"])
    files = ([path for path, bad, _ in evaluate.labelled_images(data) if not bad] or good_images(data))[:4]
    for i, image in enumerate(read_image(path, model.size) for path in files):
        x = bend(torch.from_numpy(synthesize(image, np.random.default_rng(i))[0]).permute(2, 0, 1)[None])[0]
        shown = [image, *(y[0].permute(1, 2, 0).clamp(0, 1).numpy() for y in (x, model.project(x)))]
        heat = evaluate.colours(model(x)[0][0].numpy(), evaluate.thresholds(model.normal, 0.02)[1])
        rows.append(Image.fromarray(np.hstack([*(np.uint8(255 * y) for y in shown), heat])))
    evaluate.save_pictures(run / "projection.png", *rows)
    print(f"wrote {run / 'projection.png'}")


if __name__ == "__main__":
    evaluate.run(main)
