"""The flow and the contrast in two dimensions, where they can be drawn: python benchmarks/toy.py

The couplings of flows.py learn two moons, given as points with two channels. One flow learns with the likelihood alone,
another one also with the contrast of energies. Density and samples are drawn side by side. It takes some seconds."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import kit  # noqa: F401 (before PyTorch, which reads the setting that `kit` makes only once)

# isort: split
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import make_moons
from torch import Tensor

from clflow import energy, info_nce, tamed
from flows import Flow2D
from kit.draw import save_picture

PANEL = 320  # pixels
REACH = 3.0  # the drawn plane is -REACH..REACH along both axes
BATCH = 512


def moons(count: int) -> Tensor:
    """Normal points (count, 2), about -2..2."""
    points, _ = make_moons(count, noise=0.06, random_state=int(torch.randint(2**31, ())))
    return torch.tensor(points - [0.5, 0.25], dtype=torch.float32) * 1.5


def elsewhere(count: int) -> Tensor:
    """Synthetic anomalies (count, 2): points anywhere except near the moons."""
    points = REACH * (2 * torch.rand(4 * count, 2) - 1)
    return points[torch.cdist(points, moons(400)).min(dim=1).values > 0.4][:count]


def energies(flow: Flow2D, points: Tensor) -> Tensor:
    """E (N,) of points (N, 2)."""
    return energy(*flow(points))


def train(steps: int, contrast_weight: float) -> Flow2D:
    flow = Flow2D(2, steps=12, kernel_sizes=(1,), hidden_ratio=64.0)
    optimizer = torch.optim.Adam(flow.parameters(), 2e-3)
    for _ in range(steps):
        normal = energies(flow, moons(BATCH))
        loss = normal.mean()
        if contrast_weight:
            anomalous = energies(flow, elsewhere(BATCH // 4))
            loss = loss + contrast_weight * info_nce(tamed(anomalous), tamed(normal), 1.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
    return flow


# ---------------------------------------------------------------- the picture


def scatter(points: Tensor, colour: str) -> Image.Image:
    """Points (N, 2) on white."""
    panel = Image.new("RGB", (PANEL, PANEL), "white")
    pen = ImageDraw.Draw(panel)
    for x, y in ((points / REACH + 1) / 2 * PANEL).tolist():
        pen.ellipse((x - 1.5, PANEL - y - 1.5, x + 1.5, PANEL - y + 1.5), fill=colour)
    return panel


def grid() -> Tensor:
    """A point for each pixel of a panel, (PANEL^2, 2), line by line from the top."""
    along = torch.linspace(-REACH, REACH, PANEL)
    y, x = torch.meshgrid(along.flip(0), along, indexing="ij")
    return torch.stack((x.flatten(), y.flatten()), dim=1)


def density(flow: Flow2D) -> Image.Image:
    """A grey picture of p(x) = e^(-2 E) / 2 pi; darker is denser."""
    p = (-2 * energies(flow, grid())).exp().view(PANEL, PANEL)
    shade = 255 - 255 * (p / p.quantile(0.995)).clamp(max=1).sqrt()
    return Image.fromarray(shade.numpy().astype(np.uint8)).convert("RGB")


def energy_map(flow: Flow2D) -> Image.Image:
    """A grey picture of E: white at -1 and below, black at 6 and above."""
    shade = 255 - 255 * ((energies(flow, grid()).view(PANEL, PANEL) + 1) / 7).clamp(0, 1)
    return Image.fromarray(shade.numpy().astype(np.uint8)).convert("RGB")


def samples(flow: Flow2D) -> Image.Image:
    """Samples x = f^-1(z), with z drawn from the Gaussian."""
    return scatter(flow.inverse(torch.randn(1, 2, 1, 1000))[0, :, 0].T, "#2a6fb0")


def column(title: str, panels: dict[str, Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (PANEL + 12, 30 + len(panels) * (PANEL + 28)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((6, 4), title, "black", ImageFont.load_default(18))
    for i, (name, panel) in enumerate(panels.items()):
        top = 30 + i * (PANEL + 28)
        pen.text((6, top), name, "black", ImageFont.load_default(14))
        sheet.paste(panel, (6, top + 20))
        pen.rectangle((6, top + 20, 6 + PANEL, top + 20 + PANEL), outline="#888888")
    return sheet


@torch.no_grad()
def figure(plain: Flow2D, contrasted: Flow2D) -> Image.Image:
    data = {"good points": scatter(moons(1000), "#222222"), "synthetic anomalies": scatter(elsewhere(500), "#c0392b")}
    columns = [column("what it is given", data)]
    for title, flow in (("likelihood alone", plain), ("... and contrast", contrasted)):
        panels = {
            "density: dark is likely": density(flow),
            "energy: dark is anomalous": energy_map(flow),
            "samples through the inverse": samples(flow),
        }
        columns.append(column(title, panels))
    sheet = Image.new("RGB", (sum(c.width for c in columns), max(c.height for c in columns)), "white")
    left = 0
    for found in columns:
        sheet.paste(found, (left, 0))
        left += found.width
    return sheet


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("toy.png"))
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # arrays this small gain nothing from more
    torch.manual_seed(0)
    flows = [train(args.steps, weight) for weight in (0.0, 0.1)]
    save_picture(args.out, figure(*flows))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
