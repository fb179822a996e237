"""CL-Flow (arXiv 2311.06794), from top to bottom as the data flow: frozen features -> the local scale -> a flow, whose
energy is the exact likelihood, and a classifier beside it -> three losses, trained in one stage.

Shapes: images (B, 3, size, size) in [0, 1]; features (B, C, h, w) at stride 8. A row is one position's feature: rows
x (N, K), latents z (N, K), log-determinants and energies (N,). Training sees rows, drawn from all images at once."""

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flows import Flow2D
from kit.backbone import Backbone, as_rows, joined
from kit.detector import Detector
from kit.pairs import Pairs
from nearest import CANDIDATES, CHUNK, Prototypes, origins, prototype_count, search_parts, spread

HIDDEN = 1024  # units of the classifier
ROWS = 1_000_000  # of good images that training draws from: 1.2 GB with ResNet18. Of more, each image keeps a part
PAINTED = 600  # synthetic anomalies in all, however many good images there are
STEPS_PER_EPOCH = 50
NOISE = 2.0  # standard deviations
UPPER = 0.05  # the share of normal rows that the classifier takes for the most anomalous


# ---------------------------------------------------------------- features -> rows -> energies


class Whitening(nn.Linear):
    """PCA whitening to the K strongest components: rows (N, C) -> (N, K). Fitted once on normal rows, never trained:
    that would lower the NLL for free, as no log-determinant accounts for it. With it, the flow starts as a Mahalanobis
    distance."""

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
    """E = 1/2 mean_c z^2 - log|det| / K: one position's term of the exact NLL per dimension, less 1/2 log 2 pi."""
    return 0.5 * z.square().mean(dim=1) - log_det / z.shape[1]


def tamed(e: Tensor) -> Tensor:
    """E up to 1, 1 + log E above: E knows no bounds on anomalies, and one position must not count like a thousand."""
    return torch.where(e <= 1, e, 1 + e.clamp(min=1).log())


def classifier(components: int) -> nn.Sequential:
    """Rows (N, K) -> (N, 1), the log-odds of being anomalous."""
    return nn.Sequential(nn.Linear(components, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))


class CLFlow(Detector):
    """The detector: two experts on the rows of a frozen backbone's features, the flow's energies and the classifier's
    log-odds. What it inherits makes map, score and verdict of them, and knows the device; `settings` are the options,
    by name."""

    CAN_LEAVE_OUT = True

    def __init__(self, settings: dict):
        backbone = Backbone(settings["backbone"])
        channels = sum(backbone.channels()[1:])
        components = channels // 2  # the strongest half of the directions: the others are noise
        self.classifies: bool = settings["classification_weight"] > 0
        super().__init__(settings, experts=2 if self.classifies else 1)
        self.backbone = backbone
        self.prototypes = Prototypes(prototype_count(settings, self.size) if settings["local"] else 0, channels)
        self.whitening = Whitening(channels, components)
        self.flow = Flow2D(components, settings["steps"], kernel_sizes=(1,), hidden_ratio=2.0)
        self.classifier = classifier(components) if self.classifies else None
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, C, h, w): strides 8 and 16, joined at stride 8."""
        with self.autocast():
            return joined(self.backbone(images.to(self.device)))

    @torch.no_grad()
    def relative(self, rows: Tensor, parts: int = 1, without: int | None = None) -> Tensor:
        """Rows (N, C) seen from where they are: (x - p) / spacing of p, the nearest prototype; found in equal parts.
        Density on these is local by construction. With --no-local the rows as they are. The prototypes that came from
        training image number `without` do not count."""
        if not self.settings["local"]:
            return rows
        index = self.prototypes.nearest(rows, parts, self.dtype, without)
        return self.prototypes.away(rows, index) / self.prototypes.spacing[index][:, None]

    @torch.no_grad()
    def encode(self, images: Tensor, without: int | None = None) -> Tensor:
        """All that training never changes: images -> maps of whitened rows (B, K, h, w)."""
        return self.whitened_map(self.features(images), without)

    def whitened_map(self, x: Tensor, without: int | None = None) -> Tensor:
        """Features (B, C, h, w) -> (B, K, h, w)."""
        relative = self.relative(as_rows(x), search_parts(x.shape[2]), without)
        return self.whitening(relative).view(-1, *x.shape[2:], self.whitening.out_features).permute(0, 3, 1, 2)

    def latents(self, rows: Tensor, width: int = 1) -> tuple[Tensor, Tensor]:
        """Latents z (N, K) and log-determinants (N,), of whitened rows (N, K). The flow sees them as one map of this
        width, which must divide N; any gives the same, but a line of N positions takes a fifth longer."""
        as_map = rows.view(1, -1, width, rows.shape[1]).permute(0, 3, 1, 2)
        with self.autocast():
            z, log_det = self.flow(as_map)
        return as_rows(z), log_det.flatten()

    def log_odds(self, rows: Tensor) -> Tensor:
        """The classifier's opinion of whitened rows: (N, K) -> (N,)."""
        with self.autocast():
            return self.classifier(rows)[:, 0].float()

    @torch.no_grad()
    def judge(self, code: Tensor) -> list[Tensor]:
        """Maps (B, K, h, w) -> energies (B, h, w) of each expert."""
        batch, _, height, width = code.shape
        rows = as_rows(code)
        found = [tamed(energy(*self.latents(rows, width)))]
        if self.classifies:
            found.append(self.log_odds(rows))
        return [e.view(batch, height, width) for e in found]

    @torch.no_grad()
    def stages(self, images: Tensor) -> list[tuple[str, Tensor]]:
        """For a figure: one image (1, 3, size, size) on its way to the energies, equation by equation of
        docs/method.md, as (what it is, map (h, w))."""
        x = self.features(images)
        relative = self.relative(as_rows(x), search_parts(x.shape[2]))
        code = self.whitened_map(x)
        z, log_det = self.latents(as_rows(code), code.shape[3])
        e = energy(z, log_det)
        found = [
            ("|x|, features", x[0].norm(dim=0)),
            ("|r|, seen from the nearest prototype", relative.norm(dim=1)),
            ("|w|, whitened", code[0].norm(dim=0)),
            ("1/2 mean z^2, latents", 0.5 * z.square().mean(dim=1)),
            ("log|det| / K", log_det / z.shape[1]),
            ("tamed E, the flow's energy", tamed(e)),
        ]
        if self.classifies:
            found.append(("log-odds of the classifier", self.log_odds(as_rows(code))))
        return [(name, values.view(code.shape[2:])) for name, values in found]

    def prepare(self, images: Iterable[Tensor], weights: str | None) -> None:
        """Load the backbone's ImageNet weights. What is fitted to the images is fitted to their rows, by `fit`."""
        self.backbone.load_imagenet(weights)

    @torch.no_grad()
    def fit(self, candidates: Tensor, origin: Tensor) -> None:
        """Fit what is never trained on rows (N, C) of the normal images with these numbers (N,): prototypes and
        whitening."""
        if self.settings["local"]:
            generator = torch.Generator().manual_seed(self.settings["seed"])
            self.prototypes.fit(candidates, origin, generator)
        self.whitening.fit(torch.cat(list(self.without_prototypes(candidates))))

    @torch.no_grad()
    def without_prototypes(self, rows: Tensor) -> Iterator[Tensor]:
        """`relative` rows (n, C) of many normal ones (N, C), a part at a time; less the prototypes themselves, which
        nothing is nearer to."""
        for part in rows.split(CHUNK):
            found = self.relative(part.float())
            yield found[found.any(dim=1)]


# ---------------------------------------------------------------- the losses


def classification_loss(normal: Tensor, anomalous: Tensor, smoothing: float) -> Tensor:
    """L_cls, smooth classification: cross-entropy of log-odds (B,) and (A,) with smoothed labels. Half of what normal
    rows count comes from the worst 5 % of them; anomalous ones count twice. A smoothed label is met at finite odds:
    what is certain pulls no more."""
    wrong = F.binary_cross_entropy_with_logits(normal, torch.full_like(normal, smoothing / 2), reduction="none")
    missed = F.binary_cross_entropy_with_logits(anomalous, torch.full_like(anomalous, 1 - smoothing / 2))
    worst = wrong.topk(math.ceil(UPPER * len(wrong))).values
    return (wrong.mean() + worst.mean()) / 2 + 2 * missed


def info_nce(anchors: Tensor, others: Tensor, temperature: float) -> Tensor:
    """InfoNCE (arXiv 1807.03748): mean over anchors of -log( e^(p/T) / (e^(p/T) + sum_k e^(n_k/T)) ); the similarity p
    (A,) is to stand out from the others n (A, K), or (K,) for all."""
    rivals = (others / temperature).logsumexp(dim=-1)
    return (torch.logaddexp(anchors / temperature, rivals) - anchors / temperature).mean()


def contrast_energy(normal: Tensor, anomalous: Tensor, temperature: float) -> Tensor:
    """L_con on energies: each anomalous one (A,) is to stand out from all normal ones (B,)."""
    return info_nce(tamed(anomalous), tamed(normal), temperature)


def contrast_cosine(box: Tensor, negative_box: Tensor, normal: Tensor, temperature: float) -> Tensor:
    """L_con on the cosine, closest to the paper's words; all (A, K). Neg_Box_s are latents of x- where its defect is,
    Box_s those of x+ at the same places. Box_s is pulled towards x+ anywhere, and pushed away from Neg_Box_s."""
    box, negative_box, normal = F.normalize(box, dim=1), F.normalize(negative_box, dim=1), F.normalize(normal, dim=1)
    return info_nce((box * normal).sum(dim=1), box @ negative_box.T, temperature)


def map_width(rows: int) -> int:
    """A width of about 64 for a map of so many rows, which it must divide: see `CLFlow.latents`."""
    return math.gcd(rows, 64)


class Losses(nn.Module):
    """L = L_nll + a L_cls + b L_con, L_nll being the mean energy of normal rows. A module, since that is what
    DistributedDataParallel wraps.

    `forward(normal, anomalous, untouched)`: whitened rows of good images (B, K), of synthetic defects (A, K), and of
    x+ at the same places as those, (A, K), where the contrast asks for them, else (0, K). Returns the losses of the
    batch by name; "loss" is the one to descend."""

    IMAGES_PER_EPOCH = 100
    WEIGHT_DECAY = 1e-5

    def __init__(self, model: CLFlow):
        super().__init__()
        self.model = model

    def forward(self, normal: Tensor, anomalous: Tensor, untouched: Tensor) -> dict[str, Tensor]:
        settings = self.model.settings
        z, log_det = self.model.latents(normal, map_width(len(normal)))
        e = energy(z, log_det)
        nll = e.mean()
        found = {"loss": nll, "nll": nll}
        if settings["classification_weight"]:
            noised = normal[: len(anomalous)] + NOISE * torch.randn_like(anomalous)
            odds = self.model.log_odds(torch.cat((normal, anomalous, noised)))
            loss = classification_loss(odds[: len(normal)], odds[len(normal) :], settings["smoothing"])
            found["classification"] = loss
            found["loss"] = found["loss"] + settings["classification_weight"] * loss
        if settings["contrast_weight"]:
            found["contrast"] = self.contrast(z, e, anomalous, untouched)
            found["loss"] = found["loss"] + settings["contrast_weight"] * found["contrast"]
        return found

    def contrast(self, z: Tensor, e: Tensor, anomalous: Tensor, untouched: Tensor) -> Tensor:
        """L_con of normal latents (B, K) and energies (B,) against rows of defects (A, K)."""
        temperature = self.model.settings["temperature"]
        width = map_width(len(anomalous))
        negative_box, log_det = self.model.latents(anomalous, width)
        if self.model.settings["contrast"] == "energy":
            return contrast_energy(e, energy(negative_box, log_det), temperature)
        box, _ = self.model.latents(untouched, width)
        return contrast_cosine(box, negative_box, z[: len(box)], temperature)

    def feed(self, pairs: Pairs, batch: int, fresh: bool) -> "RowFeed":
        """What training draws from: all rows, computed once. A `fresh` model is fitted to them first. Each process
        keeps the rows of its own part of the images."""
        normal = normal_rows(self.model, pairs)
        if fresh:
            generator = torch.Generator().manual_seed(self.model.settings["seed"])
            chosen = torch.randperm(len(normal), generator=generator)[: math.ceil(CANDIDATES / pairs.processes.count)]
            mine = torch.tensor(pairs.processes.part(range(len(pairs.files))))
            origin = mine[origins(normal, len(mine))]
            together = pairs.processes.concatenated
            self.model.fit(together(normal[chosen]), together(origin[chosen]))
        print(f"{len(normal)} rows of good images; painting {PAINTED} synthetic defects", flush=True)
        torch.manual_seed(self.model.settings["seed"])  # which images are painted, and in which order
        return self.feed_of(normal, *painted_rows(self.model, pairs), math.ceil(batch / pairs.processes.count))

    @torch.no_grad()
    def feed_of(self, normal: Tensor, anomalous: Tensor, untouched: Tensor, batch: int) -> "RowFeed":
        """Batches of these rows (N, C), whitened; kept with half the bits."""
        whiten = self.model.whitening
        kept = [whiten(part).half() for part in self.model.without_prototypes(normal)]
        defects = []
        for rows in (anomalous, untouched):
            parts = [whiten(self.model.relative(part.float())).half() for part in rows.split(CHUNK)]
            defects.append(torch.cat(parts))
        return RowFeed(torch.cat(kept), *defects, batch)


# ---------------------------------------------------------------- the rows that training draws from


def normal_rows(model: CLFlow, pairs: Pairs) -> Tensor:
    """Rows (N, C) of this process's good images, with half the bits; at most ROWS, spread over all images, of all
    processes together."""
    per_image = math.ceil(ROWS / len(pairs.files))
    if per_image < math.ceil(model.size / 8) ** 2:
        print(f"keeping {per_image} positions of each image, drawn at random: {ROWS} rows in all are the limit")
    generator = torch.Generator().manual_seed(model.settings["seed"])
    parts = [spread(model.features(images), per_image, generator).half() for images in pairs.normal()]
    return torch.cat(parts)


def painted_rows(model: CLFlow, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Rows (N, C) of synthetic defects, and of x+ at the same places if the contrast needs them, else (0, C); with half
    the bits."""
    needs_both = model.settings["contrast_weight"] > 0 and model.settings["contrast"] == "cosine"
    anomalous, untouched = [], []
    for before, after, mask in pairs.painted(PAINTED):
        mask = mask.to(model.device)
        anomalous.append(touched_rows(model.features(after), mask).half())
        untouched.append(touched_rows(model.features(before), mask).half() if needs_both else anomalous[-1][:0])
    return torch.cat(anomalous), torch.cat(untouched)


def touched_rows(x: Tensor, mask: Tensor) -> Tensor:
    """Of maps (A, C, h, w) the rows (N, C) that a mask (A, 1, size, size) touches, be it by a thin scratch's one
    pixel."""
    touched = F.adaptive_max_pool2d(mask, x.shape[2:])[:, 0] > 0
    return x.permute(0, 2, 3, 1)[touched]


class RowFeed:
    """Random batches for `Losses.forward`: of B normal rows and a quarter as many anomalous ones. Drawn with
    replacement, so that few defects will do; which, depends on torch's seed."""

    def __init__(self, normal: Tensor, anomalous: Tensor, untouched: Tensor, batch: int):
        self.normal = normal
        self.anomalous = anomalous
        self.untouched = untouched
        self.batch = batch

    def __len__(self) -> int:
        return STEPS_PER_EPOCH

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for _ in range(STEPS_PER_EPOCH):
            normal = self.normal[torch.randint(len(self.normal), (self.batch,))]
            which = torch.randint(len(self.anomalous), (math.ceil(self.batch / 4),))
            untouched = self.untouched[which] if len(self.untouched) else self.untouched
            yield normal.float(), self.anomalous[which].float(), untouched.float()
