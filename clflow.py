"""CL-Flow (arXiv 2311.06794), in the order in which the data flow: frozen features -> the local scale -> a flow, whose
energy is an exact negative log-likelihood, and a classifier -> the losses -> the training loop.

Shapes: images (B, 3, H, W) in [0, 1]; features (B, C, h, w) of the backbone. The feature of one position is a row: rows
y (N, C); r (N, C), relative to the nearest prototype; w (N, K), whitened; codes (N, K + 1), w with the distance |r|;
latents z (N, K); log-determinants and energies (N,). Training uses rows that are drawn from all images."""

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bank import Prototypes
from flows import Flow2D
from kit import InputError
from kit.backbone import BACKBONES, as_rows
from kit.detector import Detector
from kit.search import NOTHING_ELSE, in_parts, prototype_count, search_parts
from kit.settings import CLFlowSettings
from kit.windows import in_strips

if TYPE_CHECKING:  # what only training needs is imported in `train` and `epochs`
    from kit.good import GoodImages
    from kit.processes import Processes
    from kit.rows import Feed
    from kit.training import Epoch

HIDDEN = 1024  # units of the classifier
PAINTED = 600  # synthetic defects in total, for any number of good images
DEFECTS_PER_IMAGE = 2  # of these per image: one pass through the backbone, the slowest step, then serves two
STEPS_PER_EPOCH = 100
WEIGHT_DECAY = 1e-5
NOISE = 2.0  # standard deviation of the noise on whitened rows


# ---------------------------------------------------------------- features -> rows -> energies


class Whitening(nn.Linear):
    """PCA whitening to the K strongest components: rows r (N, C) -> w (N, K). Fitted once on normal rows and never
    trained: training would lower the NLL for free, since no log-determinant accounts for it. Because of the whitening,
    the untrained flow's energy is half the squared Mahalanobis distance / K."""

    def __init__(self, channels: int, components: int):
        super().__init__(channels, components)
        self.requires_grad_(False)

    def fit(self, rows: Tensor) -> None:
        """rows: (N, C). Directions with less than 1/1000 of the mean variance are noise, and stay small."""
        covariance = torch.cov(rows.T).to("cpu", torch.float64)  # not every device supports float64
        variance, axes = torch.linalg.eigh(covariance)  # in ascending order
        variance, axes = variance.flip(0), axes.flip(1)
        matrix = (axes / (variance + 1e-3 * variance.mean() + 1e-12).sqrt()).T[: self.out_features]
        self.weight.copy_(matrix)
        self.bias.copy_(-self.weight @ rows.mean(dim=0))


def energy(z: Tensor, log_det: Tensor) -> Tensor:
    """E = 1/2 mean_c z^2 - log|det| / K: one position's term of the exact NLL per dimension, without the constant 1/2
    log 2 pi. Latents (N, K, ...) and log-determinants (N, ...) -> (N, ...)."""
    return 0.5 * z.square().mean(dim=1) - log_det / z.shape[1]


def tamed(e: Tensor) -> Tensor:
    """E up to 1, 1 + log E above: E is unbounded on anomalies, and one position must not outweigh a thousand others."""
    return torch.where(e <= 1, e, 1 + e.clamp(min=1).log())


class CLFlow(Detector):
    """The detector: three experts on the rows of a frozen backbone's features.

    The flow's energy and the distance to the nearest prototype tell how normal a row is. They share one half of the
    map; the other half is the classifier's log-odds. `Detector` turns these energies into map, score and verdict."""

    SETTINGS = CLFlowSettings
    LEARNS_CAMERA_COPIES = True

    def __init__(self, settings: CLFlowSettings):
        backbone = BACKBONES[settings.backbone]()
        shares = [1 / 2, 1 / 2] if settings.local else [1.0]  # of the flow, and of the distance
        if settings.has_classifier:
            shares = [share / 2 for share in shares] + [1 / 2]
        super().__init__(settings, backbone, shares)
        channels = backbone.channels
        components = channels // 2  # the strongest half of the directions: the others are noise
        self.prototypes = Prototypes(channels)
        self.whitening = Whitening(channels, components)
        self.renew_experts()
        self.to(memory_format=torch.channels_last)

    def renew_experts(self) -> None:
        """Replace the flow by a new one, and the classifier too if a loss trains it: rows (N, K) -> log-odds (N, 1)."""
        components = self.whitening.out_features
        flow = Flow2D(components, self.settings.steps, kernel_sizes=(1,), hidden_ratio=2.0)
        self.flow = flow.to(self.device, memory_format=torch.channels_last)
        self.classifier = None
        if self.settings.has_classifier:
            layers = nn.Linear(components, HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, 1)
            self.classifier = nn.Sequential(*layers).to(self.device)

    @torch.no_grad()
    def residual(self, rows: Tensor, parts: int = 1, excluded: Tensor | None = None) -> Tensor:
        """r (N, C), rows y relative to their nearest prototype: see `Prototypes.residual`. With --no-local, rows y
        unchanged."""
        if not self.settings.local:
            return rows
        return self.prototypes.residual(rows, parts, self.dtype, excluded)

    def training_residuals(self, rows: Tensor, image_indices: Tensor) -> Iterator[Tensor]:
        """Residuals r (n, C), some at a time, of rows y (N, C) from the training images with these indices (N,). The
        prototypes of its own image do not count for a row, since a new image has none in the bank."""
        for part, own in in_parts(rows, image_indices):
            yield self.residual(part.float(), excluded=own[:, None])

    @torch.no_grad()
    def encode(self, images: Tensor, excluded: Tensor | None = None) -> Tensor:
        """The part that training never changes: images -> codes (B, K + 1, h, w)."""
        return self.code_map(self.features(images), excluded)

    def code_map(self, x: Tensor, excluded: Tensor | None = None) -> Tensor:
        """Features (B, C, h, w) -> codes (B, K + 1, h, w). The prototypes of the training images with the indices
        `excluded` (n,) do not count."""
        rows = as_rows(x)
        of_rows = None if excluded is None else excluded.expand(len(rows), -1)
        code = self.code_of(self.residual(rows, search_parts(*x.shape[2:]), of_rows))
        return code.view(-1, *x.shape[2:], code.shape[1]).permute(0, 3, 1, 2)

    def code_of(self, r: Tensor) -> Tensor:
        """Residuals r (N, C) -> (N, K + 1): whitened rows w, and the distance |r| to the nearest prototype."""
        return torch.cat((self.whitening(r), r.norm(dim=1, keepdim=True)), dim=1)

    def latents(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Whitened rows (N, K) -> latents z (N, K) and log-determinants (N,); maps of them likewise."""
        with self.autocast():
            return self.flow(w)

    def log_odds(self, w: Tensor) -> Tensor:
        """The classifier's log-odds that whitened rows are anomalous: (N, K) -> (N,)."""
        with self.autocast():
            return self.classifier(w)[:, 0].float()

    def energies(self, images: Tensor, excluded: Tensor | None = None) -> list[Tensor]:
        return self.expert_energies(self.encode(images, excluded))

    @torch.no_grad()
    def expert_energies(self, code: Tensor) -> list[Tensor]:
        """Codes (B, K + 1, h, w) -> energies (B, h, w) of flow, distance and classifier."""
        return in_strips(self.strip_energies, code)

    def strip_energies(self, code: Tensor) -> list[Tensor]:
        """`expert_energies` of a strip of a map."""
        w, distance = code[:, :-1], code[:, -1]
        energies = [tamed(energy(*self.latents(w)))]
        if self.settings.local:  # else there are no prototypes
            energies.append(distance)
        if self.classifier is not None:
            energies.append(self.log_odds(as_rows(w)).view(distance.shape))
        return energies

    @torch.no_grad()
    def fit(self, rows: Tensor, image_indices: Tensor, positions: int) -> None:
        """Fit prototypes and whitening, which are never trained, on rows y (N, C) from the good images with these
        indices (N,). An image has this many `positions`. Raises InputError if most images are copies of others."""
        if self.settings.local:
            generator = torch.Generator().manual_seed(self.settings.seed)
            self.prototypes.fit(rows, image_indices, prototype_count(self.settings, positions), generator)
        r = torch.cat(list(self.training_residuals(rows, image_indices)))
        if not r.norm(dim=1).median() > 0:
            raise InputError(NOTHING_ELSE)
        self.whitening.fit(r)


# ---------------------------------------------------------------- the losses


def classification_loss(normal: Tensor, anomalous: Tensor, smoothing: float) -> Tensor:
    """L_cls, smooth classification: cross-entropy of log-odds (N,) and (A,) with smoothed labels; both kinds have equal
    weight. A smoothed label is reached at finite log-odds, so rows that reach it are not pushed any further."""
    wrong = F.binary_cross_entropy_with_logits(normal, torch.full_like(normal, smoothing / 2))
    missed = F.binary_cross_entropy_with_logits(anomalous, torch.full_like(anomalous, 1 - smoothing / 2))
    return wrong + missed


def info_nce(positive: Tensor, negatives: Tensor, temperature: float, times: float = 1.0) -> Tensor:
    """InfoNCE (arXiv 1807.03748), the cross-entropy of picking the positive from itself and the negatives:

        mean of -log( e^(f / T) / (e^(f / T) + sum_k e^(f_k / T)) )

    f (A,) are the values of positives, f_k those of negatives: (A, n), or (n,) for all positives. Each negative counts
    `times` times. The gradient with respect to f_k is proportional to e^(f_k / T): the highest negatives count most."""
    rest = (negatives / temperature).logsumexp(dim=-1) + math.log(times)
    return F.softplus(rest - positive / temperature).mean()


def contrast_log_odds(normal: Tensor, anomalous: Tensor, temperature: float, batch: int) -> Tensor:
    """L_con on the classifier's log-odds: each anomalous row (A,) is a positive, all normal rows of the batch are its
    negatives. Of these `batch` rows this process may have only a part (N,)."""
    return info_nce(anomalous, normal, temperature, times=batch / len(normal))


class Losses(nn.Module):
    """L = L_nll + lambda_cls L_cls + lambda_con L_con. L_nll is the mean energy of the first A normal rows (a quarter
    of them if A is 0): a density needs fewer than a classifier. In L_cls and L_con, A normal rows with added noise also
    count as anomalous. This is a module because DistributedDataParallel wraps modules.

    `forward(normal, anomalous)`: whitened rows of good images (N, K), and of synthetic or real defects (A, K); A is 0
    if no loss learns from them. Returns the losses of a batch by name; training minimises "loss", the weighted sum."""

    def __init__(self, model: CLFlow):
        super().__init__()
        self.model = model

    def forward(self, normal: Tensor, anomalous: Tensor) -> dict[str, Tensor]:
        settings = self.model.settings
        count = len(anomalous) or math.ceil(len(normal) / 4)  # the same number if no defects are painted
        z, log_det = self.model.latents(normal[:count])
        losses = {"nll": energy(z, log_det).mean()}
        loss = losses["nll"]
        if settings.has_classifier:
            log_odds = self.log_odds(normal, anomalous)
        if settings.classification_weight:
            losses["classification"] = classification_loss(*log_odds, settings.smoothing)
            loss = loss + settings.classification_weight * losses["classification"]
        if settings.contrast_weight:
            losses["contrast"] = contrast_log_odds(*log_odds, settings.temperature, settings.batch)
            loss = loss + settings.contrast_weight * losses["contrast"]
        return {"loss": loss, **losses}

    def log_odds(self, normal: Tensor, anomalous: Tensor) -> tuple[Tensor, Tensor]:
        """The classifier's log-odds of normal rows (N, K): (N,); and of defect rows (A, K) together with A normal rows
        with noise: (2 A,)."""
        noised = normal[: len(anomalous)] + NOISE * torch.randn_like(anomalous)
        log_odds = self.model.log_odds(torch.cat((normal, anomalous, noised)))
        return log_odds[: len(normal)], log_odds[len(normal) :]


# ---------------------------------------------------------------- the training


def train(model: CLFlow, good: "GoodImages", progress: dict | None = None) -> "Iterator[Epoch]":
    """Train a model with ImageNet weights in one stage. The number of epochs is fixed, and the last one counts.

    A generator. It yields before the first step and after each epoch; each time the model is calibrated on the held-out
    images and ready to judge. After the last epoch it sets the threshold from all good images, so exhaust it. To
    continue a stopped training, pass its model and the `progress` of its last `Epoch`."""
    from kit.calibration import calibrate_by_cross_validation, plan_cross_validation
    from kit.good import Painter, with_camera_copies
    from kit.rows import Feed, HeldOut, candidates, good_rows, painted_rows, real_rows
    from synth import synthesize

    painter = Painter(good, with_camera_copies(partial(synthesize, defects=DEFECTS_PER_IMAGE)), model)

    # Rows: the features of good images and of their camera copies. Bank and whitening are fitted once, on some of them.
    normal = good_rows(model, painter)
    rows, image_indices = candidates(model, normal, good)
    if progress is None:
        model.fit(rows, image_indices, int(normal.inside.sum()))
    validation = plan_cross_validation(model, good, rows, image_indices)

    # Rows of painted defects, from which only the classifier learns. For all rows, the prototypes of their own image do
    # not count; then they are whitened.
    painted = painted_rows(model, painter, PAINTED // DEFECTS_PER_IMAGE) if model.settings.has_classifier else None
    del painter, rows, image_indices  # decoded images take as much memory as the feed
    feed = Feed(model, normal, painted)
    del normal, painted  # the feed keeps what it needs
    held_out = HeldOut(model, good.held_out)

    # Rows of real defects, if any are given.
    if good.defects:
        preliminary_training = epochs(model, feed, good.processes, name="preliminary training, epoch")
        feed = feed.with_real_defects(real_rows(held_out, good.defects, preliminary_training))

    # For each step: the losses of a batch, and one gradient step. After each epoch: the calibration on held-out images.
    for epoch in epochs(model, feed, good.processes, progress):
        held_out.calibrate()
        yield epoch

    # Finally the calibration on all good images, each judged by a flow and a classifier that have not seen it.
    calibrate_by_cross_validation(validation, feed, held_out, partial(epochs, model, processes=good.processes))


def epochs(
    model: CLFlow, feed: "Feed", processes: "Processes", progress: dict | None = None, name: str = "epoch"
) -> "Iterator[Epoch]":
    """Train flow and classifier. Yields before the first step and after each epoch; `name` is for the progress line."""
    from kit.training import Descent, train_epochs

    batch = math.ceil(model.settings.batch / processes.count)  # this process's part

    def batches(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(STEPS_PER_EPOCH):
            yield feed.draw(batch)

    # A step (kit.training.Descent.step): the losses of a batch, their gradients, clipped, and one step of Adam.
    descent = Descent(Losses(model), STEPS_PER_EPOCH, WEIGHT_DECAY, processes)
    yield from train_epochs(descent, batches, progress, name)
