"""A 2D normalizing flow: affine couplings with convolutional subnets (RealNVP, arXiv 1605.08803; FastFlow, 2111.07677).

A flow is an invertible map x -> z with a Jacobian whose determinant is cheap. It turns a density that is unknown
(of feature maps) into one that is known (a standard normal):  log p(x) = log N(z; 0, I) + log|det dz/dx|.
"""
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Coupling(nn.Module):
    """One flow step: half of the channels scales and shifts the other half, then all are scaled and permuted.

        x = [a, b];   [r, t] = 0.1 subnet(a);   b' = b exp(s) + t,  s = clamp tanh(r)
        z = permute([a, b'] exp(scale) + offset),   log|det| per position = sum(s) + sum(scale)

    The subnet need not be invertible, because `a` passes unchanged and is there to recompute s and t from. The soft
    clamp (as in the FrEIA library) bounds a step's log-scale, so that no single feature can blow the likelihood up.
    """

    def __init__(self, channels: int, kernel_size: int, hidden_ratio: float, clamp: float = 2.0):
        super().__init__()
        self.active = channels // 2
        self.passive = channels - self.active
        self.clamp = clamp
        hidden = max(1, int(self.passive * hidden_ratio))
        self.subnet = nn.Sequential(
            nn.Conv2d(self.passive, hidden, kernel_size, padding="same"),
            nn.ReLU(),
            nn.Conv2d(hidden, 2 * self.active, kernel_size, padding="same"),
        )
        nn.init.zeros_(self.subnet[-1].weight)  # start as the identity: the first loss is then that of a plain Gaussian
        nn.init.zeros_(self.subnet[-1].bias)
        self.scale = nn.Parameter(torch.zeros(channels))
        self.offset = nn.Parameter(torch.zeros(channels))
        permutation = torch.randperm(channels)
        self.register_buffer("permutation", permutation)
        self.register_buffer("unpermute", permutation.argsort())

    def scale_and_shift(self, a: Tensor) -> tuple[Tensor, Tensor]:
        r, t = (0.1 * self.subnet(a)).split(self.active, dim=1)
        return self.clamp * torch.tanh(r.to(a.dtype)), t

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.split((self.passive, self.active), dim=1)
        s, t = self.scale_and_shift(a)
        z = torch.cat((a, b * s.exp() + t), dim=1)
        z = z * self.scale.exp()[:, None, None] + self.offset[:, None, None]
        return z.index_select(1, self.permutation), s.sum(dim=1) + self.scale.sum()  # (B, C, H, W), (B, H, W)

    def inverse(self, z: Tensor) -> Tensor:
        z = (z.index_select(1, self.unpermute) - self.offset[:, None, None]) * (-self.scale).exp()[:, None, None]
        a, b = z.split((self.passive, self.active), dim=1)
        s, t = self.scale_and_shift(a)
        return torch.cat((a, (b - t) * (-s).exp()), dim=1)


class Flow2D(nn.Module):
    """`steps` couplings in a row, on (B, C, H, W) feature maps with `channels` >= 2; `kernel_sizes` alternate over the steps.

    `forward(x) -> (z, log_det)`, shapes (B, C, H, W) and (B, H, W). Only the sum of log_det over the positions is the
    log-determinant of the whole map; its terms per position are what the anomaly map is made of.
    `inverse(z) -> x` undoes it, up to rounding.
    """

    def __init__(self, channels: int, steps: int = 8, kernel_sizes: Sequence[int] = (3,), hidden_ratio: float = 1.0):
        super().__init__()
        self.steps = nn.ModuleList(
            Coupling(channels, kernel_sizes[i % len(kernel_sizes)], hidden_ratio) for i in range(steps))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(())
        for step in self.steps:
            x, step_log_det = step(x)
            log_det = log_det + step_log_det
        return x, log_det

    def inverse(self, z: Tensor) -> Tensor:
        for step in reversed(self.steps):
            z = step.inverse(z)
        return z
