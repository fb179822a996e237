"""What are a few real defects worth? CL-Flow learns from 0, 1, 3 and 10 of them, with and without masks.

python benchmarks/defects.py mvtec/screw more/tire --weights FILE --out defects
python benchmarks/defects.py --out defects --table

Categories are folders in MVTec AD's layout. The defects are drawn from the test images, three times. The other test
images are measured; they are the same for all rows of a draw. For UNKNOWN categories there is a second task: ten
defects of all kinds except one, measured on that kind. All trainings of a category use the same bank and whitening, and
all trainings of a draw the same random numbers. The threshold has the rate .02 and comes from the held-out good images
alone (train.py also uses the other good images, which takes three more trainings).

OUT/<category>.model.pt and .rows.pt have the parts that all trainings of a category share. OUT/<category>.jsonl has the
results, one line each, as soon as they are known. The same call continues after a stop. --table prints the results of
all complete draws."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import clflow  # noqa: E402
from clflow import CLFlow  # noqa: E402
from kit import data, folders, metrics  # noqa: E402
from kit.detector import read_checkpoint  # noqa: E402
from kit.good import Defect, GoodImages, Painter, held_out_count, split, with_camera_copies  # noqa: E402
from kit.processes import ALONE  # noqa: E402
from kit.rows import Feed, candidates, defect_rows, good_rows, painted_rows  # noqa: E402
from kit.settings import CLFlowSettings  # noqa: E402
from kit.shapes import input_size  # noqa: E402
from synth import synthesize  # noqa: E402

UNKNOWN = ("screw", "tire", "magnetic_tile")  # categories in which each kind of defect is left out in turn
COUNTS = (1, 3, 10)
DRAWS = 3


@dataclass(frozen=True)
class Shared:
    """The parts that all trainings of a category share: the model with its bank and whitening, the rows of good images
    and of painted defects, and the maps w (B, K, h, w) of held-out and of test images."""

    model: CLFlow
    feed: Feed
    held_out: list[Tensor]
    test_maps: list[Tensor]
    tests: list[folders.LabelledImage]


@dataclass(frozen=True)
class Task:
    """A row of the table: the test images that are drawn, and those that are measured, by number."""

    draw: int
    left_out: str | None  # the kind that is not drawn from
    given: list[int]
    masks: bool
    measured: list[int]

    @property
    def facts(self) -> dict:
        return {"draw": self.draw, "left_out": self.left_out, "defects": len(self.given), "masks": self.masks}


# ---------------------------------------------------------------- once a category


def shared(category: Path, args: argparse.Namespace) -> Shared:
    """The shared parts, computed now or in an earlier call."""
    name = category.resolve().name
    model_file, rows_file = args.out / f"{name}.model.pt", args.out / f"{name}.rows.pt"
    tests = folders.labelled_images(category)
    if not rows_file.exists():
        model, *rows = prepared(category, tests, args)
        model.save(model_file)
        torch.save(rows, rows_file)
    model = CLFlow.restore(read_checkpoint(model_file), args.device)
    torch.serialization.add_safe_globals([Feed])
    return Shared(model, *torch.load(rows_file, weights_only=True), tests)


@torch.no_grad()
def prepared(category: Path, tests: list[folders.LabelledImage], args: argparse.Namespace) -> tuple:
    """The model, the feed, and the maps of held-out and test images, made in the same way as by clflow.train."""
    files = folders.list_images(folders.good_folder(category))
    size = input_size(CLFlowSettings.size, files)
    settings = CLFlowSettings(images=len(files), held_out=held_out_count(len(files)), size=size)
    torch.manual_seed(settings.seed)
    model = CLFlow(settings).eval()
    model.backbone.load_imagenet(args.weights)
    model.to(args.device)
    good = GoodImages(*split(files, settings.seed))
    paint = with_camera_copies(partial(synthesize, defects=clflow.DEFECTS_PER_IMAGE))
    painter = Painter(good, paint, model)
    normal = good_rows(model, painter)
    model.fit(*candidates(model, normal, good), int(normal.inside.sum()))
    feed = Feed(model, normal, painted_rows(model, painter, clflow.PAINTED // clflow.DEFECTS_PER_IMAGE))

    def maps(paths: list[Path]) -> list[Tensor]:
        return [model.encode(images).half() for images in data.batches(paths, model.shape)]

    return model, feed, maps(good.held_out), maps([test.path for test in tests])


# ---------------------------------------------------------------- the rows of the table


def tasks(tests: list[folders.LabelledImage], unknown: bool) -> Iterator[Task]:
    """All tasks of a category; in each draw, those without defects come first. With `unknown`, each kind is left out in
    turn."""
    good = [number for number, test in enumerate(tests) if not test.anomalous]
    defects = [number for number, test in enumerate(tests) if test.anomalous]
    with_masks = [False, True] if all(tests[number].mask for number in defects) else [False]
    kinds = sorted({tests[number].defect_type for number in defects}) if unknown else [None]
    for draw in range(DRAWS):
        for kind in kinds:
            known = [number for number in defects if tests[number].defect_type != kind]
            drawn = np.random.default_rng(draw).permutation(known)[: max(COUNTS)].tolist()
            rest = defects if kind is None else [number for number in defects if tests[number].defect_type == kind]
            measured = good + [number for number in rest if number not in drawn]
            yield Task(draw, kind, [], False, measured)
            for count in (max(COUNTS),) if unknown else COUNTS:
                for masks in with_masks:
                    yield Task(draw, kind, drawn[:count], masks, measured)


class Trainings:
    """The trainings of a category. Each draw has one training without real defects, which is kept."""

    def __init__(self, common: Shared):
        self.common = common
        self.settings = common.model.settings
        self.plain: dict[int, tuple] = {}  # by draw: flow and classifier

    def learn(self, draw: int, feed: Feed) -> None:
        model = self.common.model
        model.settings = replace(self.settings, seed=draw)
        torch.manual_seed(draw)
        model.renew_experts()
        for _ in clflow.epochs(model, feed, ALONE):
            pass
        self.calibrate()

    def calibrate(self) -> None:
        model = self.common.model
        model.calibrate(model.expert_energies(w.float()) for w in self.common.held_out)

    def without_defects(self, draw: int) -> None:
        model = self.common.model
        if draw not in self.plain:
            self.learn(draw, self.common.feed)
            self.plain[draw] = model.flow, model.classifier
        model.flow, model.classifier = self.plain[draw]
        self.calibrate()

    def run(self, task: Task) -> dict[str, float]:
        """The metrics of a row."""
        self.without_defects(task.draw)  # this detector locates defects without masks
        if task.given:
            tests = [self.common.tests[number] for number in task.given]
            defects = [Defect(test.path, test.mask if task.masks else None) for test in tests]
            rows = defect_rows(self.common.model, defects)
            self.learn(task.draw, self.common.feed.with_real_defects(rows))
        return self.figures(task.measured)

    @torch.no_grad()
    def figures(self, measured: list[int]) -> dict[str, float]:
        model = self.common.model
        scores = [model.score(model.maps(model.expert_energies(w.float()))) for w in self.common.test_maps]
        scores = torch.cat(scores).cpu().numpy()[measured]
        labels = np.array([self.common.tests[number].anomalous for number in measured])
        shares = metrics.shares_at(model.thresholds().score, labels, scores)
        figures = {"image_auroc": metrics.image_metrics(labels, scores)["image_auroc"]} | shares
        return {name: round(figures[name], 5) for name in ("image_auroc", "recall", "false_alarms")}


def run_category(category: Path, args: argparse.Namespace, unknown: bool) -> None:
    """Compute the missing results of a category."""
    name = category.resolve().name
    file = args.out / f"{name}.jsonl"
    done = [{key: row[key] for key in ("draw", "left_out", "defects", "masks")} for row in read_results(file)]
    missing = [task for task in tasks(folders.labelled_images(category), unknown) if task.facts not in done]
    if not missing:
        return
    trainings = Trainings(shared(category, args))
    for task in missing:
        started = time.perf_counter()
        row = {"category": name, **task.facts, **trainings.run(task)}
        with open(file, "a") as results:
            results.write(json.dumps(row) + "\n")
        print(f"{json.dumps(row)} {time.perf_counter() - started:.0f} s", flush=True)


def read_results(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# ---------------------------------------------------------------- the table


def table(rows: list[dict]) -> str:
    """A Markdown table: means of image AUROC / recall over the complete draws."""
    columns = [(0, False), *((count, masks) for masks in (False, True) for count in COUNTS)]
    names = ["none", *(f"{count}, {'masks' if masks else 'no masks'}" for count, masks in columns[1:])]
    lines = []
    for unknown in (False, True):
        lines += [["kinds that were not given" if unknown else "category", "draws", *names], ["---"] * (2 + len(names))]
        there = [row for row in rows if (row["left_out"] is not None) == unknown]
        for category in dict.fromkeys(row["category"] for row in there):
            draws = complete_draws([row for row in there if row["category"] == category])
            lines.append([category, str(len(draws)), *(cell(draws, column) for column in columns)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def complete_draws(rows: list[dict]) -> list[dict]:
    """The rows of each complete draw (and left-out kind) of a category, by number of defects and presence of masks. A
    draw is complete if no other draw has more rows."""
    draws: dict[tuple, dict] = {}
    for row in rows:
        draws.setdefault((row["draw"], row["left_out"]), {})[row["defects"], row["masks"]] = row
    most = max(map(len, draws.values()))
    return [draw for draw in draws.values() if len(draw) == most]


def cell(draws: list[dict], column: tuple[int, bool]) -> str:
    found = [draw[column] for draw in draws if column in draw]
    if not found:
        return ""
    auroc, recall = (np.mean([row[name] for row in found]) for name in ("image_auroc", "recall"))
    return f"{auroc:.4f} / {recall:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("categories", type=Path, nargs="*")
    add("--out", type=Path, required=True, help="folder for cached features and results")
    add("--weights", help="file with the backbone's ImageNet weights")
    add("--device", default="cpu")
    add("--table", action="store_true", help="print the table of the results so far; nothing is trained")
    args = parser.parse_args()
    if args.table:
        print(table([row for file in sorted(args.out.glob("*.jsonl")) for row in read_results(file)]))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for category in args.categories:
        run_category(category, args, unknown=False)
    for category in args.categories:
        if category.resolve().name in UNKNOWN:
            run_category(category, args, unknown=True)


if __name__ == "__main__":
    main()
