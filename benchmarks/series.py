"""Does the threshold hold for a series, such as the frames of a camera?

50 good images of each category are drawn and copied five times. Each copy is moved by up to 2 pixels (of 256) and made
up to 2 % brighter or darker; the names keep the copies together. A detector learns from these 250 images. Its false
alarms are counted on all other good images. "Before" is the threshold without the rules for series: the trained
detector judges each training image without its own prototypes.

python benchmarks/series.py mvtec/bottle more/tire --weights FILE --out series"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from kit import folders  # noqa: E402
from kit.calibration import FOLDS, CrossValidation  # noqa: E402
from kit.detector import Detector  # noqa: E402
from kit.good import GoodImages, split  # noqa: E402
from kit.images import read_image  # noqa: E402
from kit.measuring import judge_tests  # noqa: E402
from kit.metrics import image_metrics  # noqa: E402
from kit.processes import ALONE  # noqa: E402
from kit.verdict import threshold  # noqa: E402
from kit.windows import keep_freed_memory  # noqa: E402
from methods import load  # noqa: E402

DRAWN = 50
COPIES = 5
RATE = 0.02


def another_frame(image: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """The image (H, W, 3) a moment later."""
    down, across = rng.uniform(-2, 2, 2) * len(image) / 256
    moved = ndimage.shift(image, (down, across, 0), order=1, mode="nearest")
    return Image.fromarray(np.uint8(255 * (moved * rng.uniform(0.98, 1.02)).clip(0, 1)))


def make_series(category: Path, to: Path) -> None:
    """Draw images and copy them. The other good images are added to the good test images."""
    rng = np.random.default_rng(0)
    files = folders.list_images(folders.good_folder(category))
    drawn = sorted(rng.permutation(len(files))[:DRAWN])
    (to / "train" / "good").mkdir(parents=True)
    shutil.copytree(category / "test", to / "test", copy_function=shutil.copyfile)
    for number, path in enumerate(files):
        if number not in drawn:
            shutil.copyfile(path, to / "test" / "good" / f"other_{path.name}")
            continue
        image = read_image(path)
        for copy in range(COPIES):
            another_frame(image, rng).save(to / "train" / "good" / f"{number}_{copy}.png")


def scores_before(model: Detector, trained_on: list[Path]) -> np.ndarray:
    """The scores of the training images from the trained detector, each without its own prototypes."""
    validation = CrossValidation(GoodImages([], trained_on), model.settings.seed, alike=1.0)
    return np.array([float(score) for fold in range(FOLDS) for score, _ in validation.scores(model, fold).values()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("categories", type=Path, nargs="+")
    add("--out", type=Path, required=True, help="folder for images and runs")
    add("--weights", help="file with the backbone's ImageNet weights")
    args = parser.parse_args()
    for category in args.categories:
        folder, run = args.out / category.name, args.out / "runs" / category.name
        if not folder.exists():
            make_series(category, folder)
        weights = ["--weights", args.weights] if args.weights else []
        train.main(["--data", str(folder), "--out", str(run), *weights])
        model = load(run / "model.pt")
        judged = judge_tests(model, folders.labelled_images(folder), ALONE)
        good, bad = judged.scores[~judged.labels], judged.scores[judged.labels]
        _, trained_on = split(folders.list_images(folders.good_folder(folder)), seed=0)
        limits = {"before": threshold(scores_before(model, trained_on), RATE), "now": model.thresholds(RATE).score}
        auroc = image_metrics(judged.labels, judged.scores)["image_auroc"]
        print(f"{category.name}: image AUROC {auroc:.3f}, {int(model.different)} different images")
        for name, limit in limits.items():
            alarms, recall = (good > limit).mean(), (bad > limit).mean()
            print(f"{category.name}, {name}: false alarms {alarms:.3f} of {len(good)}, recall {recall:.3f}", flush=True)


if __name__ == "__main__":
    keep_freed_memory()
    main()
