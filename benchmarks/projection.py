"""Draw what the autoencoder does into RUN/projection.png: python benchmarks/projection.py RUN"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kit import InputError, draw, folders  # noqa: E402
from kit.command_line import Parser, run_script  # noqa: E402
from kit.detector import read_checkpoint  # noqa: E402
from kit.files import OwnFiles  # noqa: E402
from kit.images import read_image  # noqa: E402
from methods.autoencoder import Autoencoder  # noqa: E402
from synth import synthesize  # noqa: E402


@torch.no_grad()
def draw_projection(model: Autoencoder, files: list[Path], to: Path) -> None:
    """A row for each normal image: the image, corrupted, projected; the anomaly map."""
    rows = []
    for i, path in enumerate(files):
        image = read_image(path, model.shape)
        corrupted, _, _ = synthesize(image, np.random.default_rng(i))
        x = torch.from_numpy(corrupted).permute(2, 0, 1)[None]
        projected = model.project(x)[0].permute(1, 2, 0).clamp(0, 1).numpy()
        maps, _ = model(x)
        panels = [np.uint8(255 * pixels) for pixels in (image, corrupted, projected)]
        panels.append(draw.heat_colours(maps[0].numpy(), model.thresholds().anomaly_map))
        rows.append(draw.beside_each_other(panels))
    draw.save_picture(to, draw.below_each_other(rows))


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description="Draw RUN/projection.png: a good image, corrupted, projected; anomaly map.")
    parser.add_argument("run", type=Path, help="run folder of train.py --method autoencoder")
    run = parser.parse_args(arguments).run
    checkpoint = read_checkpoint(run / "model.pt")
    if checkpoint["settings"]["method"] != "autoencoder":
        raise InputError(f"{run}: not a run of the autoencoder; train one with --method autoencoder")
    category = Path(checkpoint["settings"]["data"])
    good_tests = [path for folder in folders.good_folders(category / "test") for path in folders.list_images(folder)]
    files = good_tests or folders.list_images(folders.good_folder(category))
    draw_projection(Autoencoder.restore(checkpoint), files[:4], OwnFiles(run, "trained").claim("projection.png"))
    print(f"wrote {run / 'projection.png'}")


if __name__ == "__main__":
    run_script(main)
