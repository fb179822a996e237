"""CL-Flow (arXiv 2311.06794), from top to bottom as the data flow: frozen features -> the local scale -> a flow, whose
energy is the exact likelihood of what it sees, and a classifier beside it -> the losses -> one way through training.

Shapes: images (B, 3, H, W) in [0, 1]; features (B, C, h, w) of the backbone. One position's feature is a row:
rows y (N, C); r (N, C), seen from the nearest prototype; w (N, K), whitened; latents z (N, K); log-determinants and
energies (N,). Training sees rows, drawn from all images at once."""

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defaults import CLFlowSettings
from flows import Flow2D
from kit import data
from kit.backbone import BACKBONES, as_rows
from kit.calibration import FOLDS, AsNew
from kit.defects import COPIES, Defect, copies
from kit.detector import Detector, side_of
from kit.errors import InputError
from kit.good import GoodImages, Painter, to_tensor
from kit.images import read_image, read_mask
from kit.processes import Processes
from kit.progress import counted
from kit.training import Descent, Epoch, seed_epoch, shared
from nearest import (
    CANDIDATES,
    CHUNK,
    Prototypes,
    alike_in_order,
    origins,
    prototype_count,
    search_parts,
    spread,
)
from synth import synthesize

HIDDEN = 1024  # units of the classifier
ROWS = 1_000_000  # of good images that training draws from: 1.2 GB with ResNet18. Of more, each image keeps a part
POSITIONS = 2**15  # of an image, that flow and classifier see at once
SEEN = 2**14  # rows of a training that are seen from the bank at once, where it is searched in cells
PAINTED = 600  # synthetic anomalies in all, however many good images there are
TOGETHER = 2  # of these on one image: the backbone, which takes the time, sees them together
STEPS_PER_EPOCH = 100
WEIGHT_DECAY = 1e-5
NOISE = 2.0  # standard deviations


# ---------------------------------------------------------------- features -> rows -> energies


class Whitening(nn.Linear):
    """PCA whitening to the K strongest components: rows r (N, C) -> w (N, K). Fitted once on normal rows, never
    trained: that would lower the NLL for free, as no log-determinant accounts for it. With it, the flow starts as a
    Mahalanobis distance."""

    def __init__(self, channels: int, components: int):
        super().__init__(channels, components)
        self.requires_grad_(False)

    def fit(self, rows: Tensor) -> None:
        """rows: (N, C). Directions with less than 1/1000 of the mean variance are noise, and stay small."""
        rows = rows.to("cpu", torch.float64)  # not every device has it
        variance, axes = torch.linalg.eigh(torch.cov(rows.T))  # in ascending order
        variance, axes = variance.flip(0), axes.flip(1)
        matrix = (axes / (variance + 1e-3 * variance.mean() + 1e-12).sqrt()).T[: self.out_features]
        self.weight.copy_(matrix)
        self.bias.copy_(-matrix @ rows.mean(dim=0))


def energy(z: Tensor, log_det: Tensor) -> Tensor:
    """E = 1/2 mean_c z^2 - log|det| / K: one position's term of the exact NLL per dimension, less 1/2 log 2 pi. Latents
    (N, K, ...) and log-determinants (N, ...) -> (N, ...)."""
    return 0.5 * z.square().mean(dim=1) - log_det / z.shape[1]


def tamed(e: Tensor) -> Tensor:
    """E up to 1, 1 + log E above: E knows no bounds on anomalies, and one position must not count like a thousand."""
    return torch.where(e <= 1, e, 1 + e.clamp(min=1).log())


def classifier(components: int) -> nn.Sequential:
    """Rows (N, K) -> (N, 1), the log-odds of being anomalous."""
    return nn.Sequential(nn.Linear(components, HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, 1))


class CLFlow(Detector):
    """The detector: two experts on the rows of a frozen backbone's features, the flow's energies and the classifier's
    log-odds. What it inherits makes map, score and verdict of them, and knows the device."""

    SETTINGS = CLFlowSettings

    def __init__(self, settings: CLFlowSettings):
        backbone = BACKBONES[settings.backbone]()
        super().__init__(settings, backbone, experts=2 if settings.has_classifier else 1)
        channels = backbone.channels
        components = channels // 2  # the strongest half of the directions: the others are noise
        self.prototypes = Prototypes(channels)
        self.whitening = Whitening(channels, components)
        self.renew_experts()
        self.to(memory_format=torch.channels_last)

    def renew_experts(self) -> None:
        """Put a new flow, and a new classifier if there is a loss that trains it, in place of the present ones."""
        components = self.whitening.out_features
        flow = Flow2D(components, self.settings.steps, kernel_sizes=(1,), hidden_ratio=2.0)
        self.flow = flow.to(self.device, memory_format=torch.channels_last)
        self.classifier = None
        if self.settings.has_classifier:
            self.classifier = classifier(components).to(self.device)

    @torch.no_grad()
    def relative(self, rows: Tensor, parts: int = 1, without: Tensor | None = None) -> Tensor:
        """r = (y - p) / spacing of p, (N, C): rows y seen from where they are, p being the nearest prototype; found in
        equal parts. Density on these is local by construction. With --no-local the rows as they are. `without`:
        see `Prototypes.nearest`."""
        if not self.settings.local:
            return rows
        index = self.prototypes.nearest(rows, parts, self.dtype, without)
        return self.prototypes.away(rows, index) / self.prototypes.spacing[index][:, None]

    @torch.no_grad()
    def encode(self, images: Tensor, without: Tensor | None = None) -> Tensor:
        """All that training never changes: images -> maps of whitened rows w (B, K, h, w)."""
        return self.whitened_map(self.features(images), without)

    def whitened_map(self, x: Tensor, without: Tensor | None = None) -> Tensor:
        """Features (B, C, h, w) -> (B, K, h, w)."""
        relative = self.relative(as_rows(x), search_parts(*x.shape[2:]), without)
        return self.whitening(relative).view(-1, *x.shape[2:], self.whitening.out_features).permute(0, 3, 1, 2)

    def latents(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Latents z and log-determinants of whitened rows (N, K), or of maps of them (B, K, h, w): (N,), (B, h, w)."""
        with self.autocast():
            return self.flow(w)

    def log_odds(self, w: Tensor) -> Tensor:
        """The classifier's opinion of whitened rows: (N, K) -> (N,)."""
        with self.autocast():
            return self.classifier(w)[:, 0].float()

    def energies(self, images: Tensor, without: Tensor | None = None) -> list[Tensor]:
        return self.experts(self.encode(images, without))

    @torch.no_grad()
    def experts(self, code: Tensor) -> list[Tensor]:
        """Maps w (B, K, h, w) -> energies (B, h, w) of flow and classifier; of large maps some lines at a time."""
        parts = [self.opinions(part) for part in code.split(max(1, POSITIONS // code.shape[3]), dim=2)]
        return [torch.cat(part, dim=1) for part in zip(*parts, strict=True)]

    def opinions(self, code: Tensor) -> list[Tensor]:
        """The same, all at once."""
        opinions = [tamed(energy(*self.latents(code)))]
        if self.classifier is not None:
            batch, _, height, width = code.shape
            opinions.append(self.log_odds(as_rows(code)).view(batch, height, width))
        return opinions

    @torch.no_grad()
    def stages(self, images: Tensor) -> list[tuple[str, Tensor]]:
        """For a figure: one image (1, 3, H, W) on its way to the energies, equation by equation of
        docs/method.md, as (what it is, map (h, w))."""
        x = self.features(images)
        relative = self.relative(as_rows(x), search_parts(*x.shape[2:])).view(*x.shape[2:], -1)
        code = self.whitened_map(x)
        z, log_det = self.latents(code)
        e = energy(z, log_det)
        steps = [
            ("|y|, features", x[0].norm(dim=0)),
            ("|r|, seen from the nearest prototype", relative.norm(dim=2)),
            ("|w|, whitened", code[0].norm(dim=0)),
            ("1/2 mean z^2, latents", 0.5 * z[0].square().mean(dim=0)),
            ("log|det| / K", log_det[0] / z.shape[1]),
            ("tamed E, the flow's energy", tamed(e)[0]),
        ]
        if self.classifier is not None:
            steps.append(("log-odds of the classifier", self.log_odds(as_rows(code)).view(code.shape[2:])))
        return steps

    @torch.no_grad()
    def fit(self, rows: Tensor, images: Tensor, positions: int) -> None:
        """Fit what is never trained, prototypes and whitening, on rows y (N, C) of the good images with these numbers
        (N,), of which each has so many positions. Raises InputError if these are copies of one."""
        if self.settings.local:
            generator = torch.Generator().manual_seed(self.settings.seed)
            self.prototypes.fit(rows, images, prototype_count(self.settings, positions), generator)
        relative = torch.cat(list(self.as_new(rows, images)))
        if not relative.norm(dim=1).median() > 0:
            raise InputError("--data: its good images are copies of one; give different photographs")
        self.whitening.fit(relative)

    @torch.no_grad()
    def as_new(self, rows: Tensor, images: Tensor) -> Iterator[Tensor]:
        """`relative` rows r (n, C), some at a time, of rows y (N, C) of images with these numbers (N,); each seen
        without the prototypes of its own image, as those of a new image will be."""
        count = SEEN if rows.device.type == "cpu" else CHUNK  # there all products with the bank are held at once
        for part, numbers in zip(rows.split(count), images.split(count), strict=True):
            yield self.relative(part.float(), without=numbers[:, None])


# ---------------------------------------------------------------- the losses


def classification_loss(normal: Tensor, anomalous: Tensor, smoothing: float) -> Tensor:
    """L_cls, smooth classification: cross-entropy of log-odds (N,) and (A,) with smoothed labels, both kinds alike. A
    smoothed label is met at finite odds: what is certain pulls no more."""
    wrong = F.binary_cross_entropy_with_logits(normal, torch.full_like(normal, smoothing / 2))
    missed = F.binary_cross_entropy_with_logits(anomalous, torch.full_like(anomalous, 1 - smoothing / 2))
    return wrong + missed


def info_nce(anchors: Tensor, others: Tensor, temperature: float, times: float = 1.0) -> Tensor:
    """InfoNCE (arXiv 1807.03748), the cross-entropy of picking an anchor out of the others by its similarity:

        mean over anchors of -log( e^(f / T) / (e^(f / T) + sum_k e^(f_k / T)) )

    f (A,) of the anchors, f_k (A, n) of the others, or (n,) for all, each of which stands for so many `times` itself.
    The logarithm of the sum is nearly the highest f_k: what looks most like an anchor is what counts."""
    rest = (others / temperature).logsumexp(dim=-1) + math.log(times)
    return F.softplus(rest - anchors / temperature).mean()


def contrast_odds(normal: Tensor, anomalous: Tensor, temperature: float, batch: int) -> Tensor:
    """L_con on the classifier's log-odds: each anomalous row's (A,) are to stand out from those of all normal rows of
    the `batch` (N,), of which this process may have but a part."""
    return info_nce(anomalous, normal, temperature, times=batch / len(normal))


class Losses(nn.Module):
    """L = L_nll + lambda_cls L_cls + lambda_con L_con, L_nll being the mean energy of normal rows: of as many as there
    are anomalous ones, since a density needs fewer than the classifier does. Both proxy tasks take normal rows with
    noise for anomalous ones, too, as many as there are synthetic defects. A module, since that is what
    DistributedDataParallel wraps.

    `forward(normal, anomalous)`: whitened rows of good images (N, K), and of synthetic defects (A, K). Returns the
    losses of the batch by name; "loss" is the one to descend."""

    def __init__(self, model: CLFlow):
        super().__init__()
        self.model = model

    def forward(self, normal: Tensor, anomalous: Tensor) -> dict[str, Tensor]:
        settings = self.model.settings
        z, log_det = self.model.latents(normal[: len(anomalous)])
        losses = {"nll": energy(z, log_det).mean()}
        loss = losses["nll"]
        if settings.has_classifier:
            odds = self.odds(normal, anomalous)
        if settings.classification_weight:
            losses["classification"] = classification_loss(*odds, settings.smoothing)
            loss = loss + settings.classification_weight * losses["classification"]
        if settings.contrast_weight:
            losses["contrast"] = contrast_odds(*odds, settings.temperature, settings.batch)
            loss = loss + settings.contrast_weight * losses["contrast"]
        return {"loss": loss, **losses}

    def odds(self, normal: Tensor, anomalous: Tensor) -> tuple[Tensor, Tensor]:
        """The classifier's log-odds of normal rows (N, K): (N,), and of rows of defects (A, K) and as many normal ones
        with noise: (2 A,)."""
        noised = normal[: len(anomalous)] + NOISE * torch.randn_like(anomalous)
        odds = self.model.log_odds(torch.cat((normal, anomalous, noised)))
        return odds[: len(normal)], odds[len(normal) :]


# ---------------------------------------------------------------- one way through training


def train(model: CLFlow, good: GoodImages, progress: dict | None = None) -> Iterator[Epoch]:
    """Train a model with ImageNet weights on good images, in one stage. A generator: it yields after each epoch, and
    once before the first step; the model is calibrated on the held-out images then, ready to judge. The number of
    epochs is fixed, and the last one counts.

    With the `progress` of an earlier call's epoch, and its model, it goes on from there."""
    settings = model.settings
    painter = Painter(good, paint, model)

    # Features of the good images: each position is a row. On some of them bank and whitening are fitted, once.
    normal = good_rows(model, painter)
    some = candidates(normal, good, settings.seed)
    if progress is None:
        model.fit(*some, int(normal.inside.sum()))
    alike = alike_in_order(model, good.trained_on, *some) if settings.local else 1.0

    # Rows of painted defects. All rows are seen from the bank, and whitened, as those of a new image will be.
    feed = Feed(model, normal, painted_rows(model, painter))
    del normal, some  # the feed has what it needs of them: up to a gigabyte

    # Rows of real defects, if any are given.
    held_out = held_out_codes(model, good)
    if good.defects:
        feed = feed.beside(real_rows(model, feed, held_out, good))

    # For each step: the losses of a batch, and a step down. After each epoch: the calibration on held-out images.
    for epoch in epochs(model, feed, good.processes, progress):
        calibrate(model, held_out, good)
        yield epoch

    # At last the calibration on all good images, each judged by a flow and a classifier that have not seen it.
    print("calibrating: each third of the good images is judged by what the two others teach", flush=True)
    calibrate_as_new(model, feed, held_out, AsNew(good, settings.seed, alike))


def epochs(
    model: CLFlow, feed: "Feed", processes: Processes, progress: dict | None = None, what: str = "epoch"
) -> Iterator[Epoch]:
    """Train flow and classifier; yields before the first step, and after each epoch, which is called `what` on the
    terminal."""
    settings = model.settings
    batch = math.ceil(settings.batch / processes.count)
    losses = shared(Losses(model), processes)
    descent = Descent(losses, settings.lr, settings.epochs * STEPS_PER_EPOCH, WEIGHT_DECAY)
    done = descent.go_on_from(progress)
    yield descent.epoch(done, [], processes)
    for number in range(done + 1, settings.epochs + 1):
        seed_epoch(settings.seed, number, processes.rank)
        steps = []
        for _ in counted(range(STEPS_PER_EPOCH), f"{what} {number}/{settings.epochs}, steps", STEPS_PER_EPOCH):
            steps.append(descent.step(losses(*feed.draw(batch))))
        yield descent.epoch(number, steps, processes)


def learn_anew(model: CLFlow, feed: "Feed", held_out: list[Tensor], good: GoodImages, number: int, what: str) -> None:
    """Another training, which has this number, in place of the present one, and the calibration after it."""
    seed_epoch(model.settings.seed, model.settings.epochs + 1 + number)
    model.renew_experts()
    for _ in epochs(model, feed, good.processes, what=what):
        pass
    calibrate(model, held_out, good)


# ---------------------------------------------------------------- the calibration


def held_out_codes(model: CLFlow, good: GoodImages) -> list[Tensor]:
    """Maps w (B, K, h, w) of the held-out images, with half the bits, batch by batch."""
    codes = []
    for images in data.batches(good.held_out, model.shape):
        codes += model.in_windows(lambda part: [model.encode(part).half()], images)
    return codes


def calibrate(model: CLFlow, held_out: list[Tensor], good: GoodImages) -> None:
    """The calibration on the held-out images, from their maps w."""
    model.calibrate((model.experts(code.float()) for code in held_out), good.held_out)


def calibrate_as_new(model: CLFlow, feed: "Feed", held_out: list[Tensor], as_new: AsNew) -> None:
    """The calibration on all good images, a third of them after the other; each third is judged by a flow and a
    classifier that the others have taught."""
    trained = model.flow, model.classifier

    def known(number: int) -> list[Tensor] | None:
        """The energies of a good image, if its rows tell: these, too, are seen without its own prototypes."""
        code = None if as_new.is_series else feed.code(number)
        return None if code is None else model.experts(code)

    scores = {}
    for fold in range(FOLDS):
        learn_anew(model, feed.only(as_new.fold != fold), held_out, as_new.good, fold, f"third {fold + 1}, epoch")
        scores |= as_new.scores(model, fold, known)
    model.flow, model.classifier = trained
    calibrate(model, held_out, as_new.good)
    as_new.settle(model, scores)


# ---------------------------------------------------------------- the rows that training draws from


@dataclass(frozen=True)
class Rows:
    """Rows y (N, C) in float16, and the numbers (N,) of the good images that they are of, in ascending order. Of good
    images also where on a map they may be from, `inside` (h, w) bool: there they are from everywhere, unless each image
    gave but some."""

    y: Tensor
    images: Tensor
    inside: Tensor | None = None


def good_rows(model: CLFlow, painter: Painter) -> Rows:
    """Rows of this process's good images; at most ROWS, spread over all images, of all processes together."""
    mine = painter.processes.part(range(len(painter.files)))
    per_image = max(1, ROWS // len(painter.files))
    generator = torch.Generator().manual_seed(model.settings.seed)
    maps = map(model.features, painter.normal())
    rows, is_inside = spread(maps, len(mine), model, per_image, generator, torch.half)
    if per_image < is_inside.sum():
        print(f"keeping {per_image} positions of each image, drawn at random: {ROWS} rows in all are the limit")
    return Rows(rows, origins(rows, mine), is_inside)


def candidates(normal: Rows, good: GoodImages, seed: int) -> tuple[Tensor, Tensor]:
    """Some of the rows y (N, C) of all processes, with the numbers (N,) of their images: CANDIDATES in all, at
    random."""
    generator = torch.Generator().manual_seed(seed)
    count = math.ceil(CANDIDATES / good.processes.count)
    chosen = torch.randperm(len(normal.y), generator=generator)[:count]
    return good.processes.concatenated(normal.y[chosen]), good.processes.concatenated(normal.images[chosen])


def paint(
    image: np.ndarray, rng: np.random.Generator, other: np.ndarray, roi: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int, int]]:
    """What training paints on an image: `synthesize`, with TOGETHER defects."""
    return synthesize(image, rng, other, roi, TOGETHER)


def painted_rows(model: CLFlow, painter: Painter) -> Rows:
    """Rows of PAINTED synthetic defects."""
    print(f"painting {PAINTED} synthetic defects", flush=True)
    anomalous, images = [], []
    for after, mask, numbers in painter.painted(PAINTED // TOGETHER):
        x = model.features(after)
        touched = touches(mask.to(model.device), x.shape[2:])  # what is painted lies in the region of interest
        anomalous.append(x.permute(0, 2, 3, 1)[touched].half())
        files = torch.from_numpy(painter.file_number(numbers))
        images.append(files.repeat_interleave(touched.cpu().flatten(1).sum(dim=1)))
    images = torch.cat(images)
    order = images.argsort(stable=True)
    return Rows(torch.cat(anomalous)[order.to(model.device)], images[order])


def real_rows(model: CLFlow, feed: "Feed", held_out: list[Tensor], good: GoodImages) -> Tensor:
    """Rows w (A, K) of real defects: where their masks are, or where they stand out after a first training."""
    untrained = model.flow, model.classifier
    if not all(defect.mask for defect in good.defects):
        print("a first training, to find where the defects without masks are", flush=True)
        learn_anew(model, feed, held_out, good, FOLDS, "first training, epoch")
    rows = defect_rows(model, good.defects)
    model.flow, model.classifier = untrained
    return rows


@torch.no_grad()
def defect_rows(model: CLFlow, defects: list[Defect]) -> Tensor:
    """Rows w (A, K) of real defects and of some copies of each, less of many; with half the bits. They are of no good
    image: so they are seen from all prototypes. Raises InputError if nothing is marked on any of the defects."""
    count = max(1, min(COPIES, PAINTED // len(defects)))
    rng = np.random.default_rng(model.settings.seed)
    rows, outside = [], []
    for defect in counted(defects, "features of real defects", len(defects)):
        image = read_image(defect.path, model.shape)
        mask = whereabouts(model, defect, image)
        if not mask.any():
            outside.append(defect.path.name)
            continue
        for copied, where_it_is in copies(image, mask, count, rng):
            w = model.encode(to_tensor(copied[None]))
            touched = touches(to_tensor(np.float32(where_it_is)[None, ..., None]).to(model.device), w.shape[2:])
            rows.append(w.permute(0, 2, 3, 1)[touched].half())
    if outside:
        print(f"nothing is marked, in the region of interest, on {len(outside)} defects: {', '.join(outside)}")
    if not rows:
        raise InputError("--defects: not one of them has anything marked in the region of interest")
    return torch.cat(rows)


def whereabouts(model: CLFlow, defect: Defect, image: np.ndarray) -> np.ndarray:
    """Where a defect is in its image (H, W, 3), in the region of interest: by its mask; or, if it has none, where the
    model's map stands out most. (H, W) bool. That is its highest thousandth, of 384 x 384 pixels at most: what else is
    above the level of good images is half of it beside the defect (on screws; of the highest thousandth a sixth)."""
    roi = model.roi.cpu().numpy()
    if defect.mask:
        return read_mask(defect.mask, model.shape) & roi
    maps, _ = model(to_tensor(image[None]))
    heat = np.where(roi, maps[0].cpu().numpy(), -np.inf)
    count = max(1, round(side_of(model.pixels) ** 2 / 1000))
    return (heat >= np.sort(heat, axis=None)[-count]) & roi


def touches(mask: Tensor, shape: torch.Size) -> Tensor:
    """Which positions of maps of this shape (h, w) a mask (A, 1, H, W) touches, be it by a thin scratch's one
    pixel: (A, h, w) bool."""
    return F.adaptive_max_pool2d(mask, shape)[:, 0] > 0


class Feed:
    """What training draws from: rows w of good images (N, K), and of painted defects (A, K), seen from the bank without
    the prototypes of their own image, and whitened; with half the bits. A batch has as many normal rows as it is large,
    and a quarter as many anomalous ones; drawn with replacement, so that few defects will do. With rows of real defects
    beside them, half of the anomalous ones are real."""

    def __init__(self, model: CLFlow, normal: Rows, painted: Rows):
        self.device = model.device
        self.normal = whitened(model, normal.y, normal.images)
        self.anomalous = whitened(model, painted.y, painted.images)
        self.real = None
        self.images = normal.images, painted.images
        self.inside = normal.inside
        # The rows that are drawn from: all.
        self.normal_index = torch.arange(len(self.normal))
        self.anomalous_index = torch.arange(len(self.anomalous))

    def beside(self, real: Tensor) -> "Feed":
        """The same, with these rows w (A', K) of real defects, which are of no good image: `only` keeps all of them."""
        more = copy(self)
        more.real = real
        return more

    def only(self, allowed: Tensor) -> "Feed":
        """The same, but of those images that are `allowed` (n,) bool, by number."""
        part = copy(self)
        normal, anomalous = self.images
        part.normal_index = where(allowed[normal])
        part.anomalous_index = where(allowed[anomalous])
        return part

    def code(self, number: int) -> Tensor | None:
        """The map w (1, K, h, w) of the good image with this number, zero outside the region of interest; None if not
        all of its rows are here."""
        rows = self.normal[self.images[0] == number].float().to(self.device)
        if len(rows) < self.inside.sum():
            return None
        code = rows.new_zeros(*self.inside.shape, rows.shape[1])
        code[self.inside] = rows
        return code.permute(2, 0, 1)[None]

    def draw(self, batch: int) -> tuple[Tensor, Tensor]:
        """A batch for `Losses.forward`; which, depends on torch's seed."""
        normal = drawn(self.normal_index, batch)
        count = math.ceil(batch / 4)
        real = count // 2 if self.real is not None else 0
        painted = drawn(self.anomalous_index, count - real)
        anomalous = self.anomalous[painted]
        if real:
            anomalous = torch.cat((anomalous, self.real[drawn(torch.arange(len(self.real)), real)]))
        return self.normal[normal].float().to(self.device), anomalous.float().to(self.device)


def where(is_allowed: Tensor) -> Tensor:
    """The numbers of the rows that are allowed; of all, if none is: of too few images there are no others."""
    return torch.nonzero(is_allowed if is_allowed.any() else torch.ones_like(is_allowed))[:, 0]


def drawn(index: Tensor, count: int) -> Tensor:
    """Some of `index` (N,), at random, with replacement: (count,)."""
    return index[torch.randint(len(index), (count,))]


@torch.no_grad()
def whitened(model: CLFlow, rows: Tensor, images: Tensor) -> Tensor:
    """Rows y (N, C) of images with these numbers (N,) -> w (N, K), with half the bits."""
    found, filled = rows.new_empty(len(rows), model.whitening.out_features, dtype=torch.half), 0
    for part in model.as_new(rows, images):
        found[filled : filled + len(part)] = model.whitening(part)
        filled += len(part)
    return found
