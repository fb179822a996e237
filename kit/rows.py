"""The rows that training draws from: the features of all positions of all images. Rows y (N, C) of the backbone's
features, in float16; w (N, K), whitened by the model, which is a `clflow.CLFlow` here."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kit import InputError, data
from kit.backbone import as_rows
from kit.detector import Detector
from kit.good import Defect, GoodImages, Painter
from kit.images import read_image, to_tensor
from kit.processes import counted
from kit.search import CANDIDATES, NOTHING_ELSE
from kit.training import Epoch, seed_epoch
from kit.windows import return_freed_memory, side_of

ROWS = 1_000_000  # of good images, at most: 1.2 GB with ResNet18, without camera copies
COPIED = 4  # one row of a camera copy for every four rows of its original
ROWS_PER_CHANNEL = 3  # at least, to fit the whitening. With fewer, these rows look more normal than new ones do
HELD_OUT_BYTES = 1e9  # kept maps of held-out images: 1,100 images of 384 x 384, or 13 of 13 megapixels
PRELIMINARY = 3  # the random seed of a preliminary training; the thirds of the calibration have 0 to 2
DEFECT_COPIES = 8  # of each defect, including the original
MOST_DEFECT_IMAGES = 600  # defects and their copies; if there are more defects, there are no copies
SHIFT = 12  # pixels at most: one and a half positions of the backbone's maps
LIGHT = 0.1  # largest relative change of brightness


# ---------------------------------------------------------------- rows y, of features


@dataclass(frozen=True)
class Rows:
    """Rows y (N, C) in float16, and the indices (N,) of the good images that they come from."""

    y: Tensor
    image_indices: Tensor


@dataclass(frozen=True)
class GoodRows(Rows):
    """The first `originals` rows come from the images themselves. Rows of camera copies follow, with the indices of
    their originals. `inside` (h, w) bool marks the positions in the region of interest; all rows come from these."""

    originals: int
    inside: Tensor


def good_rows(model: Detector, painter: Painter) -> GoodRows:
    """Rows of this process's good images, and of its camera copies.

    All processes together keep at most ROWS rows of the images themselves, spread over all images."""
    mine = painter.processes.part(range(len(painter.files)))
    per_image = max(1, ROWS // len(painter.files))
    generator = torch.Generator().manual_seed(model.settings.seed)
    maps = (model.features(images).half() for images in painter.normal())
    rows, is_inside = spread(maps, len(mine), model, per_image, generator)
    if per_image < is_inside.sum():
        print(f"keeping {per_image} feature vectors of each image, chosen at random (limit: {ROWS} in total)")
    every = math.ceil(COPIED * int(is_inside.sum()) * len(mine) / len(rows))
    copied, copied_indices = copied_rows(model, painter, is_inside, every)
    image_indices = torch.cat((origins(rows, mine), copied_indices))
    return GoodRows(torch.cat((rows, copied)), image_indices, len(rows), is_inside)


def copied_rows(model: Detector, painter: Painter, is_inside: Tensor, every: int) -> tuple[Tensor, Tensor]:
    """Rows y (N, C) of this process's camera copies, and the indices (N,) of the images that these show.

    Of the positions in `is_inside` (h, w), one in `every` becomes a row. The choice depends only on the copy's number,
    so several processes choose as one does."""
    mine = painter.copy_numbers()
    counts = [len(range(number % every, int(is_inside.sum()), every)) for number in mine]
    # Allocated once: many small tensors between large temporary ones take three times the memory.
    rows = torch.empty(sum(counts), model.backbone.channels, dtype=torch.half, device=model.device)
    maps = itertools.chain.from_iterable(map(model.features, painter.copies()))
    for features, number, part in zip(maps, mine, rows.split(counts), strict=True):
        inside = as_rows(features[None])[is_inside.flatten()]
        part.copy_(inside[number % every :: every])
    images = torch.tensor([painter.image_index(number) for number in mine])
    return rows, images.repeat_interleave(torch.tensor(counts))


def spread(
    maps: Iterable[Tensor], images: int, model: Detector, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Rows (N, C) of this many `images`, from their maps (B, C, h, w), batch by batch, in the maps' dtype. Each image
    gives `count` random positions in the region of interest, in their order, or all of them. Also returns that region,
    (h, w) bool."""
    kept, filled = torch.empty(0), 0
    for x in maps:
        is_inside = model.inside(x.shape[2:])
        inside = is_inside.flatten().nonzero()[:, 0]
        if not filled:  # allocated once: concatenation at the end would need twice the memory
            kept = x.new_empty(images * min(count, len(inside)), x.shape[1])
        for features in x:
            chosen = torch.randperm(len(inside), generator=generator)[:count].sort().values
            kept[filled : filled + len(chosen)] = as_rows(features[None])[inside[chosen.to(inside.device)]]
            filled += len(chosen)
    return kept, is_inside


def origins(rows: Tensor, indices: Sequence[int]) -> Tensor:
    """The image indices (N,) of rows (N, C) that come from the images with these indices in this order, the same number
    from each."""
    return torch.as_tensor(indices).repeat_interleave(len(rows) // len(indices))


def check_rows(count: int, model: Detector) -> None:
    """Raises InputError if there are too few rows to fit the whitening."""
    least = ROWS_PER_CHANNEL * model.backbone.channels
    if count < least:
        raise InputError(
            f"--data: the training images give only {count} feature vectors in total, but {model.settings.backbone} "
            f"needs {least}; give more good images, a larger --size, or a larger area in --roi"
        )


def check_different(normal: GoodRows) -> None:
    """Raises InputError if all good images are copies of one: nothing would tell how much good images differ. Their
    camera copies would hide that."""
    images = len(normal.image_indices[: normal.originals].unique())
    first, *others = normal.y[: normal.originals].chunk(images)  # each image has the same number of rows
    if others and all(torch.allclose(rows, first, atol=0.01) for rows in others):
        raise InputError(NOTHING_ELSE)


def candidates(model: Detector, normal: GoodRows, good: GoodImages) -> tuple[Tensor, Tensor]:
    """Random rows y (N, C) of all processes, CANDIDATES in total, with the indices (N,) of their images. Raises
    InputError if bank and whitening cannot be fitted to rows of these images: see `check_rows`, `check_different`."""
    check_rows(len(good.trained_on) * int(normal.inside.sum()), model)
    check_different(normal)
    generator = torch.Generator().manual_seed(model.settings.seed)
    chosen = torch.randperm(len(normal.y), generator=generator)[: math.ceil(CANDIDATES / good.processes.count)]
    return good.processes.concatenated(normal.y[chosen]), good.processes.concatenated(normal.image_indices[chosen])


def painted_rows(model: Detector, painter: Painter, images: int) -> Rows:
    """Rows of synthetic defects, which are painted on this many images."""
    print(f"painting synthetic defects on {images} images", flush=True)
    anomalous, image_indices = [], []
    for after, mask, numbers in painter.painted(images):
        x = model.features(after)
        touched = touches(mask.to(model.device), x.shape[2:])  # painted defects lie in the region of interest
        anomalous.append(x.permute(0, 2, 3, 1)[touched].half())
        painted_on = torch.from_numpy(painter.image_index(numbers))
        image_indices.append(painted_on.repeat_interleave(touched.cpu().flatten(1).sum(dim=1)))
    image_indices = torch.cat(image_indices)
    order = image_indices.argsort(stable=True)
    rows = torch.cat(anomalous)[order.to(model.device)]
    return Rows(rows, image_indices[order])


def touches(mask: Tensor, shape: torch.Size) -> Tensor:
    """Which positions of maps of this shape (h, w) a mask (A, 1, H, W) touches, if only with one pixel of a thin
    scratch: (A, h, w) bool."""
    return F.adaptive_max_pool2d(mask, shape)[:, 0] > 0


# ---------------------------------------------------------------- rows w, whitened, and distances


class HeldOut:
    """Iterates over the codes (B, K + 1, h, w) of the held-out images in float16, batch by batch.

    Training never changes them. The first ones, up to HELD_OUT_BYTES, are kept; the others are computed in each
    iteration."""

    def __init__(self, model: Detector, files: list[Path]):
        self.model = model
        self.files = files
        self.codes: list[Tensor] = []
        kept_bytes = 0
        for code in self.encoded(files):
            kept_bytes += code.numel() * code.element_size()
            if kept_bytes > HELD_OUT_BYTES:
                break
            self.codes.append(code)

    def encoded(self, files: list[Path]) -> Iterator[Tensor]:
        """The codes of these files, batch by batch."""
        model = self.model
        for images in data.batches(files, model.shape):
            images = model.in_usual_brightness(images)
            yield from model.in_windows(lambda part: [model.encode(part).half()], images)

    def calibrate(self) -> None:
        """Calibrate the model, with its present flow and classifier, on these images."""
        self.model.calibrate((self.model.expert_energies(code.float()) for code in self), self.files)

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.codes
        kept_images = sum(len(code) for code in self.codes)
        yield from self.encoded(self.files[kept_images:])


def retrain(held_out: HeldOut, training: Iterator[Epoch], number: int) -> None:
    """Train new experts in place of the model's present ones, in this `training`, then calibrate. `number` chooses
    their random seed. `training` must not have started: its optimizer is made for the new experts."""
    model = held_out.model
    seed_epoch(model.settings.seed, model.settings.epochs + 1 + number)
    model.renew_experts()
    for _ in training:
        pass
    held_out.calibrate()


class Feed:
    """What training draws from: codes of good images and their camera copies (N, K + 1), and of painted defects (A,
    K + 1), in float16. Each code was computed without the prototypes of its own image. Training uses their rows w, and
    not their distances.

    A batch has `batch` normal rows, and a quarter as many rows of defects. They are drawn with replacement, so few
    defects suffice. If real defects are given, half of the defect rows are real."""

    def __init__(self, model: Detector, normal: GoodRows, painted: Rows | None):
        return_freed_memory()  # it lies in pieces that are too small for the codes
        self.device = model.device
        self.normal = codes(model, normal)
        self.normal_images = normal.image_indices
        self.anomalous = self.normal[:0]
        self.anomalous_images = normal.image_indices[:0]
        if painted is not None:
            self.anomalous = codes(model, painted)
            self.anomalous_images = painted.image_indices
        self.real = None
        self.inside = normal.inside
        self.originals = normal.originals
        # The rows that `draw` may choose: all of them.
        self.normal_index = torch.arange(len(self.normal))
        self.anomalous_index = torch.arange(len(self.anomalous))

    def with_real_defects(self, real: Tensor) -> "Feed":
        """The same, with these codes (A', K + 1) of real defects. They belong to no good image: `subset` keeps all."""
        more = copy(self)
        more.real = real
        return more

    def subset(self, allowed: Tensor) -> "Feed":
        """The same with only the rows of those images that are `allowed` (n,) bool."""
        part = copy(self)
        part.normal_index = allowed[self.normal_images].nonzero()[:, 0]
        part.anomalous_index = allowed[self.anomalous_images].nonzero()[:, 0]
        return part

    def stored_code_map(self, index: int) -> Tensor | None:
        """The codes (1, K + 1, h, w) of the good image with this index, zero outside the region of interest.

        None if some of its rows are missing."""
        mine = torch.nonzero(self.normal_images[: self.originals] == index)[:, 0]
        rows = self.normal[mine].float().to(self.device)
        if len(rows) < self.inside.sum():
            return None
        code = rows.new_zeros(*self.inside.shape, rows.shape[1])
        code[self.inside] = rows
        return code.permute(2, 0, 1)[None]

    def draw(self, batch: int) -> tuple[Tensor, Tensor]:
        """A random batch for `Losses.forward`, rows w (N, K) and (A, K); it depends on torch's seed."""
        normal = drawn(self.normal_index, batch)
        count = math.ceil(batch / 4) if len(self.anomalous_index) else 0
        real = count // 2 if self.real is not None else 0
        painted = drawn(self.anomalous_index, count - real)
        anomalous = self.anomalous[painted]
        if real:
            anomalous = torch.cat((anomalous, self.real[drawn(torch.arange(len(self.real)), real)]))
        return self.normal[normal][:, :-1].float().to(self.device), anomalous[:, :-1].float().to(self.device)


def drawn(index: Tensor, count: int) -> Tensor:
    """`count` of `index` (N,), at random, with replacement: (count,)."""
    return index[torch.randint(len(index), (count,))] if count else index[:0]


@torch.no_grad()
def codes(model: Detector, rows: Rows) -> Tensor:
    """Rows y (N, C) -> codes (N, K + 1) in float16."""
    width = model.whitening.out_features + 1
    found, filled = rows.y.new_empty(len(rows.y), width, dtype=torch.half), 0
    for r in model.training_residuals(rows.y, rows.image_indices):
        found[filled : filled + len(r)] = model.code_of(r)
        filled += len(r)
    return found


# ---------------------------------------------------------------- codes of real defects


def real_rows(held_out: HeldOut, defects: list[Defect], preliminary_training: Iterator[Epoch]) -> Tensor:
    """Codes (A, K + 1) of real defects: from the area of the masks, or from the area that stands out after a
    preliminary training."""
    model = held_out.model
    untrained = model.flow, model.classifier
    if not all(defect.mask for defect in defects):
        print("a preliminary training, to find where the defects without masks are", flush=True)
        retrain(held_out, preliminary_training, PRELIMINARY)
    rows = defect_rows(model, defects)
    model.flow, model.classifier = untrained
    return rows


@torch.no_grad()
def defect_rows(model: Detector, defects: list[Defect]) -> Tensor:
    """Codes (A, K + 1) of real defects and of some copies of each, in float16.

    They belong to no good image, so all prototypes count. Raises InputError if no mask marks anything."""
    each = max(1, min(DEFECT_COPIES, MOST_DEFECT_IMAGES // len(defects)))
    rng = np.random.default_rng(model.settings.seed)
    rows, outside = [], []
    for defect in counted(defects, "features of real defects", len(defects)):
        image = read_image(defect.path, model.shape)
        mask = defect_mask_of(model, defect, image)
        if not mask.any():
            outside.append(defect.path.name)
            continue
        for copied, where_it_is in augmented(image, mask, each, rng):
            code = model.encode(to_tensor(copied[None]))
            touched = touches(to_tensor(np.float32(where_it_is)[None, ..., None]).to(model.device), code.shape[2:])
            rows.append(code.permute(0, 2, 3, 1)[touched].half())
    if outside:
        print(
            f"skipped {len(outside)} defects, since their masks mark nothing in the region of interest: "
            f"{', '.join(outside)}"
        )
    if not rows:
        raise InputError("--defects: no mask marks anything in the region of interest; check the masks and --roi")
    return torch.cat(rows)


def defect_mask_of(model: Detector, defect: Defect, image: np.ndarray) -> np.ndarray:
    """Where a defect is in its image (H, W, 3), within the region of interest: (H, W) bool. Its mask says so; without a
    mask, the highest thousandth of the model's map (of 384 x 384 pixels at most). On *screw*, a sixth of these pixels
    lay outside the defect. Of all pixels above the level of good images, half lay outside."""
    roi = model.roi.cpu().numpy()
    if defect.mask:
        return data.read_mask(defect.mask, model.shape) & roi
    maps, _ = model(to_tensor(image[None]))
    anomaly_map = np.where(roi, maps[0].cpu().numpy(), -np.inf)
    count = max(1, round(side_of(model.pixels) ** 2 / 1000))
    return (anomaly_map >= np.sort(anomaly_map, axis=None)[-count]) & roi


def augmented(
    image: np.ndarray, mask: np.ndarray, count: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`count` pairs of image and mask: first the original, then copies that are flipped, shifted by some pixels, and
    brighter or darker. Both image and mask are reflected at the borders."""
    yield image, mask
    height, width = mask.shape
    padded = np.pad(image, ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="reflect")
    padded_mask = np.pad(mask, SHIFT, mode="reflect")
    for _ in range(count - 1):
        top, left = rng.integers(0, 2 * SHIFT + 1, 2)
        part = slice(top, top + height), slice(left, left + width)
        down, across = rng.choice([-1, 1], 2)
        light = rng.uniform(1 - LIGHT, 1 + LIGHT)
        moved = padded[part][::down, ::across] * light
        yield np.ascontiguousarray(moved.clip(0, 1), dtype=np.float32), padded_mask[part][::down, ::across].copy()
