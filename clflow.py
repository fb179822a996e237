"""CL-Flow (arXiv 2311.06794), from top to bottom as the data flow: frozen features -> whitening -> one 2D flow a scale
-> energies, the exact likelihood, position by position -> three losses, trained in one stage.

Shapes: images (B, 3, size, size) in [0, 1]; features x and latents z (B, C, h, w), log-determinants and energies
(B, h, w), at each of three scales, strides 4, 8 and 16. In the losses the N = h w positions lie in one axis: (B, N)."""

import itertools
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flows import Flow2D
from kit.backbone import Backbone, as_rows, averaged
from kit.detector import Detector

WHITENING_BATCHES = 8  # of eight images each, at most: what the whitening is fitted on
POSITIONS = 128  # drawn from each image and kind, for the proxy tasks
BOX_POSITIONS = 512  # in all, for the contrast by the cosine


# ---------------------------------------------------------------- features -> z -> energy


class Whitening(nn.Conv2d):
    """The norm before a flow: PCA whitening, fitted once on normal features. Never trained: that would lower the NLL
    for free, as no log-determinant accounts for it. With it, the flow starts as a Mahalanobis distance."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, kernel_size=1)
        self.requires_grad_(False)

    def fit(self, x: Tensor) -> None:
        """x: (N, C). Directions with less than 1/1000 of the mean variance are noise, and stay small."""
        x = x.to("cpu", torch.float64)  # not every device has it
        variance, axes = torch.linalg.eigh(torch.cov(x.T))
        matrix = (axes / (variance + 1e-3 * variance.mean() + 1e-12).sqrt()).T
        self.weight.copy_(matrix[:, :, None, None])
        self.bias.copy_(-matrix @ x.mean(dim=0))


def energy(z: Tensor, log_det: Tensor) -> Tensor:
    """E = 1/2 mean_c z^2 - log|det| / C: one position's term of the exact NLL per dimension, less 1/2 log 2 pi."""
    return 0.5 * z.square().mean(dim=1) - log_det / z.shape[1]


def tamed(e: Tensor) -> Tensor:
    """E up to 1, 1 + log E above: on x- E knows no bounds, and few outliers would be all that clipped gradients see."""
    return torch.where(e <= 1, e, 1 + e.clamp(min=1).log())


class CLFlow(Detector):
    """The detector: the flows' energies of a frozen backbone's features. What it inherits makes map, score and verdict
    of them, and knows the device; `settings` are the options, by name."""

    def __init__(self, settings: dict):
        backbone = Backbone(settings["backbone"])
        channels = backbone.channels()
        super().__init__(settings, scales=len(channels))
        self.backbone = backbone
        self.norms = nn.ModuleList(Whitening(c) for c in channels)
        self.flows = nn.ModuleList(Flow2D(c, settings["steps"], settings["kernels"]) for c in channels)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def features(self, images: Tensor) -> list[Tensor]:
        """(B, C, h, w) a scale, each feature averaged with its neighbours."""
        with self.autocast():
            maps = self.backbone(images.to(self.device))
        return [averaged(x) for x in maps]

    def latents(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Latents z and log-determinants, a pair for each scale."""
        whitened = [norm(x) for norm, x in zip(self.norms, self.features(images), strict=True)]
        with self.autocast():
            return [flow(x) for flow, x in zip(self.flows, whitened, strict=True)]

    @torch.no_grad()
    def energies(self, images: Tensor) -> list[Tensor]:
        """Energies of each scale; with --score fastflow without the log-determinant, as FastFlow judges."""
        found = []
        for z, log_det in self.latents(images):
            if self.settings["score"] == "fastflow":
                log_det = torch.zeros_like(log_det)
            found.append(energy(z, log_det))
        return found

    @torch.no_grad()
    def prepare(self, images: Iterable[Tensor], weights: str | None) -> None:
        """Load the backbone's ImageNet weights; fit the whitening on batches of normal images."""
        self.backbone.load_imagenet(weights)
        batches = [self.features(batch) for batch in itertools.islice(images, WHITENING_BATCHES)]
        for scale, norm in enumerate(self.norms):
            norm.fit(torch.cat([as_rows(features[scale]) for features in batches]))


# ---------------------------------------------------------------- which positions a loss sees


def touched_positions(mask: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Masks (A, 1, size, size) at a scale of `shape` (h, w), as two (A, h, w) bool: the positions that the defect
    touches, be it by a thin scratch's one pixel, and those that it does not even come near."""
    coverage = F.adaptive_max_pool2d(mask, shape)
    near = F.max_pool2d(coverage, 3, stride=1, padding=1)
    return coverage[:, 0] > 0, near[:, 0] == 0


def bounding_boxes(where: Tensor) -> Tensor:
    """The box around all that `where` (A, h, w) bool marks, as (A, h, w) bool: one box an image, like the paper's."""
    rows = first_to_last(where.any(dim=2))
    columns = first_to_last(where.any(dim=1))
    return rows[:, :, None] & columns[:, None, :]


def first_to_last(line: Tensor) -> Tensor:
    """(A, n) bool -> the same, with all between the first and the last marked one marked too."""
    from_first = line.cumsum(dim=1) > 0
    to_last = line.flip(1).cumsum(dim=1).flip(1) > 0
    return from_first & to_last


def sample(where: Tensor, count: int) -> Tensor:
    """(A, count) places, with replacement, of those that `where` (A, N) marks: small defects count like large ones."""
    return torch.multinomial(where.float(), count, replacement=True)


def sample_normal(e: Tensor) -> Tensor:
    """Energies of x+ (A, N) -> (A, 2 POSITIONS) of them, half from the whole image, half from its worst positions,
    since an image's score is that of its worst positions."""
    worst = e.topk(math.ceil(e.shape[1] / 20), dim=1).values  # the highest 5 %
    anywhere = e.gather(1, sample(torch.ones_like(e), POSITIONS))
    hard = worst.gather(1, sample(torch.ones_like(worst), POSITIONS))
    return torch.cat((anywhere, hard), dim=1)


def rows_at(z: Tensor, places: Tensor) -> Tensor:
    """Latents (A, C, h, w) at places (A, n) -> (A n, C)."""
    index = places[:, None].expand(-1, z.shape[1], -1)
    return z.flatten(2).gather(2, index).mT.flatten(0, 1)


# ---------------------------------------------------------------- the three losses


def nll_loss(normal: Tensor, anomalous: Tensor, beside: Tensor) -> Tensor:
    """L_nll: mean of E over all of x+ (B, N), and of tamed E over what of x- (A, N) lies `beside` its defect. There,
    too, features should be likely: the map then does not spill over."""
    return torch.cat((normal.flatten(), tamed(anomalous[beside]))).mean()


def middle_energy(e: Tensor) -> Tensor:
    """m, (A, 1), of the tamed energies of x+ (A, N): the energy at which a position is as likely anomalous as normal,
    four standard deviations above the mean. No gradient: it is where the border lies, not what is to move."""
    return (e.mean(dim=1, keepdim=True) + 4 * e.std(dim=1, keepdim=True)).detach()


def classification_loss(
    normal: Tensor, anomalous: Tensor, middle: Tensor, smoothing: float, temperature: float
) -> Tensor:
    """L_cls, smooth classification: cross-entropy of normal and anomalous energies (A, any), with p(anomalous) =
    sigmoid((E - middle) / temperature). A smoothed label is met at a finite energy: a far anomaly pulls no more."""

    def cross_entropy(e: Tensor, label: float) -> Tensor:
        return F.binary_cross_entropy_with_logits((e - middle) / temperature, torch.full_like(e, label))

    return cross_entropy(normal, smoothing / 2) / 2 + cross_entropy(anomalous, 1 - smoothing / 2) / 2


def info_nce(anchors: Tensor, others: Tensor, temperature: float) -> Tensor:
    """InfoNCE (arXiv 1807.03748): mean over anchors of -log( e^(p/T) / (e^(p/T) + sum_k e^(n_k/T)) ); the similarity p
    (A,) is to stand out from the others n (A, K), or (K,) for all."""
    logits = torch.cat((anchors[:, None], others.expand(len(anchors), -1)), dim=1) / temperature
    return (logits.logsumexp(dim=1) - logits[:, 0]).mean()


def contrast_energy(normal: Tensor, anomalous: Tensor, temperature: float) -> Tensor:
    """L_con on energies: each anomalous one (A, n) is to stand out from the normal ones of its own x+ (A, K)."""
    return info_nce(anomalous.flatten(), normal.repeat_interleave(anomalous.shape[1], dim=0), temperature)


def contrast_cosine(box: Tensor, negative_box: Tensor, normal: Tensor, temperature: float) -> Tensor:
    """L_con on the cosine, closest to the paper's words; all (n, C). Box_s are latents of x+ inside the box of the
    defect, Neg_Box_s those of x- at the same places. Box_s is pulled towards x+ anywhere, and pushed away from
    Neg_Box_s."""
    box, negative_box, normal = F.normalize(box, dim=1), F.normalize(negative_box, dim=1), F.normalize(normal, dim=1)
    return info_nce((box * normal).sum(dim=1), box @ negative_box.T, temperature)


def contrast_boxes(z: Tensor, negative_z: Tensor, touched: Tensor, temperature: float) -> Tensor:
    """`contrast_cosine` of latents of x+ and x- (A, C, h, w) at places drawn from the defects' boxes."""
    boxes = bounding_boxes(touched).flatten(1)
    count = math.ceil(BOX_POSITIONS / len(boxes))
    inside = sample(boxes, count)
    anywhere = sample(torch.ones_like(boxes), count)
    return contrast_cosine(rows_at(z, inside), rows_at(negative_z, inside), rows_at(z, anywhere), temperature)


class Losses(nn.Module):
    """L = L_nll + a L_cls + b L_con, means over the scales. A module, since that is what DistributedDataParallel wraps.

    `forward(images, mask)`: B ones x+, then A <= B ones x- that were made from the first of them; mask (A, 1, size,
    size). Returns the losses of the batch by name; "loss" is the one to descend."""

    IMAGES_PER_EPOCH = 100
    WEIGHT_DECAY = 1e-5

    def __init__(self, model: CLFlow):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        settings = self.model.settings
        scales = [self.scale_losses(z, log_det, mask) for z, log_det in self.model.latents(images)]
        nll, classification, contrast = torch.stack(scales).mean(dim=0)
        loss = nll + settings["classification_weight"] * classification + settings["contrast_weight"] * contrast
        return {"loss": loss, "nll": nll, "classification": classification, "contrast": contrast}

    def scale_losses(self, z: Tensor, log_det: Tensor, mask: Tensor) -> Tensor:
        """The three losses (3,) of one scale."""
        settings = self.model.settings
        temperature = settings["temperature"]
        pairs = len(mask)
        e = energy(z, log_det).flatten(1)
        normal, anomalous = e[:-pairs], e[-pairs:]  # of x+ and x-: (B, N), (A, N)
        touched, beside = touched_positions(mask, z.shape[2:])
        nll = nll_loss(normal, anomalous, beside.flatten(1))

        # The proxy tasks see tamed energies, of some positions of each x- and of the x+ that it was made from.
        tame_normal, tame_anomalous = tamed(normal[:pairs]), tamed(anomalous)  # (A, N) both
        inside = tame_anomalous.gather(1, sample(touched.flatten(1), POSITIONS))  # (A, POSITIONS)
        outside = sample_normal(tame_normal)  # (A, 2 POSITIONS)
        middle = middle_energy(tame_normal)
        classification = classification_loss(outside, inside, middle, settings["smoothing"], temperature)
        if settings["contrast"] == "energy":
            contrast = contrast_energy(outside, inside, temperature)
        else:
            contrast = contrast_boxes(z[:pairs], z[-pairs:], touched, temperature)
        return torch.stack((nll, classification, contrast))
