"""Flow2D against FastFlow's flow as public code builds it (FrEIA): pip install FrEIA && python benchmarks/freia.py

ResNet18's shapes at 256x256, 8 steps, batch 16; ours in bfloat16 and channels_last, theirs in float32 as published."""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from flows import Flow2D  # noqa: E402

try:
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import AllInOneBlock
except ImportError:
    sys.exit("error: pip install FrEIA first")

SHAPES = [(64, 64), (128, 32), (256, 16)]  # channels, side
STEPS, BATCH = 8, 16


def subnet(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, inputs, 3, padding=1), nn.ReLU(), nn.Conv2d(inputs, outputs, 3, padding=1))


def freia_flow(channels: int, side: int) -> nn.Module:
    flow = SequenceINN(channels, side, side)
    for _ in range(STEPS):
        flow.append(AllInOneBlock, subnet_constructor=subnet, affine_clamping=2.0)
    return flow


def milliseconds(flows: nn.ModuleList, features: list[torch.Tensor], train: bool, bfloat16: bool) -> float:
    """Median of five batches, after two to warm up."""
    optimizer = torch.optim.Adam(flows.parameters())
    times = []
    for _ in range(7):
        started = time.perf_counter()
        with torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            latents = [flow(x) for flow, x in zip(flows, features, strict=True)]
        if train:
            loss = sum(z.square().mean() / 2 - log_det.sum() / z.numel() for z, log_det in latents)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        times.append(1000 * (time.perf_counter() - started))
    return float(np.median(times[2:]))


def main() -> None:
    ours = nn.ModuleList(Flow2D(channels, STEPS) for channels, _ in SHAPES).to(memory_format=torch.channels_last)
    theirs = nn.ModuleList(freia_flow(channels, side) for channels, side in SHAPES)
    features = [torch.randn(BATCH, channels, side, side) for channels, side in SHAPES]
    rows = [x.contiguous(memory_format=torch.channels_last) for x in features]
    for name, train in (("training step", True), ("inference", False)):
        mine = milliseconds(ours, rows, train, bfloat16=True)
        other = milliseconds(theirs, features, train, bfloat16=False)
        print(f"{name}: FrEIA {other:.0f} ms, Flow2D {mine:.0f} ms, {other / mine:.2f} times as fast")


if __name__ == "__main__":
    main()
