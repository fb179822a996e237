"""A convolutional backbone in 8-bit integers (int8). Processors with VNNI compute it about four times as fast as in
float32.

Static quantization after training (arXiv 1806.08342): each output channel of a convolution has a scale for its weights,
and each activation has a scale and a zero point, which come from a few good images. So the features of an image depend
on this image alone. A checkpoint keeps the weights in float32, and these scales. Where int8 is not fast, float32
arithmetic on the same rounded numbers gives the same features up to rare roundings.

All of this uses torch.ao.quantization, which PyTorch has announced as deprecated. Without it, backbones compute in
float32."""

import copy
import warnings
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, fx, nn

try:
    from torch.ao.quantization import FixedQParamsObserver, ObserverBase, get_default_qconfig_mapping, quantize_fx

    IS_AVAILABLE = "onednn" in torch.backends.quantized.supported_engines
except ImportError:
    IS_AVAILABLE = False

ENGINE = "onednn"  # activations of 8 bits; those of the engine x86 have 7, and nearest neighbours suffer
CALIBRATION_IMAGES = 8


def is_fast(device: torch.device) -> bool:
    """Whether convolutions in int8 are faster than in float32 on this device: on CPUs that have VNNI."""
    if not IS_AVAILABLE or device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))


def scales_of(net: fx.GraphModule, inputs: Iterable[Tensor]) -> Tensor:
    """Scale and zero point of each activation of a network with folded batch norms: (A, 2). They cover the activations
    of some `inputs`, batch by batch."""
    observed = with_observers(net)
    for batch in inputs:
        observed(batch)
    scales = [observed.get_submodule(name).calculate_qparams() for name in observers(observed)]
    return torch.tensor([[float(scale), float(zero)] for scale, zero in scales])


def correct_biases(net: fx.GraphModule, scales: Tensor, batch: Tensor) -> None:
    """Change the biases of a network so that, on this batch of inputs, each output channel of a convolution has the
    same mean with rounded numbers as without (arXiv 1906.04721)."""
    means: dict[nn.Module, Tensor] = {}
    hooks = [conv.register_forward_hook(partial(keep_mean, means)) for conv in convolutions_of(net)]
    net(batch)
    for hook in hooks:
        hook.remove()

    rounded = as_rounded(net, scales)
    for own, conv in zip(convolutions_of(net), convolutions_of(rounded), strict=True):
        conv.register_forward_hook(partial(correct, means[own], own.bias))
    rounded(batch)


def convolutions_of(net: nn.Module) -> list[nn.Conv2d]:
    """In the same order for a network and its copies."""
    return [module for module in net.modules() if isinstance(module, nn.Conv2d)]


def keep_mean(means: dict[nn.Module, Tensor], conv: nn.Module, inputs: tuple, output: Tensor) -> None:
    """A forward hook: store the mean of each channel."""
    means[conv] = output.mean(dim=(0, 2, 3))


def correct(wanted: Tensor, bias: Tensor, conv: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """A forward hook: shift the output and the bias, so that each channel has the wanted mean."""
    shift = wanted - output.mean(dim=(0, 2, 3))
    bias += shift
    return output + shift[:, None, None]


def as_int8(net: fx.GraphModule, scales: Tensor) -> nn.Module:
    """The network in int8, with these scales (A, 2): float32 in, float32 out. For the CPU."""
    observed = with_scales(net, scales, FixedQParamsObserver)
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = ENGINE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the announced deprecation, and advice on the choice of scales
            return quantize_fx.convert_fx(observed)
    finally:
        torch.backends.quantized.engine = engine


def as_rounded(net: fx.GraphModule, scales: Tensor) -> nn.Module:
    """The network with the same rounded numbers in float32 arithmetic: for other devices, and for exports."""
    rounded = with_scales(net, scales, Rounding)
    for conv in convolutions_of(rounded):
        observer = get_default_qconfig_mapping(ENGINE).global_qconfig.weight()
        observer(conv.weight)
        scale, zero = observer.calculate_qparams()
        rounded_weight = torch.fake_quantize_per_channel_affine(conv.weight, scale, zero.int(), 0, -128, 127)
        conv.weight = nn.Parameter(rounded_weight, requires_grad=False)
    return rounded


class Rounding(nn.Module):
    """Round an activation to 8 bits, in float32. In plain arithmetic, which every export supports."""

    def __init__(self, scale: float, zero_point: int):
        super().__init__()
        self.scale, self.zero_point = scale, zero_point

    def forward(self, x: Tensor) -> Tensor:
        whole = (x * (1 / self.scale)).round() + self.zero_point
        return (whole.clamp(0, 255) - self.zero_point) * self.scale


def with_observers(net: fx.GraphModule) -> fx.GraphModule:
    """A copy of the network with an observer at each activation that is rounded."""
    net = copy.deepcopy(net).cpu()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_fx.prepare_fx(net, get_default_qconfig_mapping(ENGINE), (torch.zeros(1, 3, 64, 64),))


def observers(observed: fx.GraphModule) -> list[str]:
    """The names of the observers, in the order of the data."""
    calls = [node.target for node in observed.graph.nodes if node.op == "call_module"]
    return [name for name in calls if isinstance(observed.get_submodule(name), ObserverBase)]


def with_scales(net: fx.GraphModule, scales: Tensor, make: Callable[[float, int], nn.Module]) -> fx.GraphModule:
    """A copy of the network, with `make(scale, zero point)` in the place of each observer."""
    observed = with_observers(net)
    for name, (scale, zero) in zip(observers(observed), scales.tolist(), strict=True):
        setattr(observed, name, make(scale, int(zero)))
    return observed
