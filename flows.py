"""2D normalizing flow: affine couplings with convolutional subnets (RealNVP, arXiv 1605.08803; FastFlow, 2111.07677).

An invertible map x -> z with a cheap Jacobian determinant:  log p(x) = log N(z; 0, I) + log|det dz/dx|."""
import torch
from torch import Tensor, nn


class Coupling(nn.Module):
    """One flow step: half of the channels scales and shifts the other half, then all are scaled, moved and permuted.

        x = [a, b];   [r, t] = subnet(a);   s = clamp tanh(0.1 r) = clamp (2 sigmoid(0.2 r) - 1);   b' = b exp(s) + t
        z = permute([a, b'] exp(scale) + offset);   log|det| per position = sum(s) + sum(scale)

    The subnet need not be invertible: `a` passes unchanged. The soft clamp of s bounds what one feature can do."""

    def __init__(self, channels: int, kernel_size: int, hidden_ratio: float, clamp: float = 2.0):
        super().__init__()
        self.active, self.passive, self.clamp = channels // 2, channels - channels // 2, clamp
        hidden = max(1, int(self.passive * hidden_ratio))
        self.subnet = nn.Sequential(nn.Conv2d(self.passive, hidden, kernel_size, padding="same"), nn.ReLU(),
                                    nn.Conv2d(hidden, 2 * self.active, kernel_size, padding="same"))
        for parameter in self.subnet[-1].parameters():
            nn.init.zeros_(parameter)  # start as the identity: the first loss is that of a plain Gaussian
        self.scale, self.offset = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("permutation", torch.randperm(channels))

    def scale_and_shift(self, a: Tensor) -> tuple[Tensor, Tensor]:
        r, t = self.subnet(a).split(self.active, dim=1)
        # Under autocast only the convolutions are in bfloat16. On CPUs tanh takes seven times as long as sigmoid.
        return self.clamp * (2 * torch.sigmoid(0.2 * r.to(a.dtype)) - 1), t

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.split((self.passive, self.active), dim=1)
        s, t = self.scale_and_shift(a)
        z = torch.cat((a, b * s.exp() + t), dim=1) * self.scale.exp()[:, None, None] + self.offset[:, None, None]
        rows = z.permute(0, 2, 3, 1)  # indexing maps would take three times as long, and unlearn channels_last
        z = rows.flatten(0, 2).index_select(1, self.permutation).view(rows.shape).permute(0, 3, 1, 2)
        return z, s.sum(dim=1) + self.scale.sum()  # (B, C, H, W), (B, H, W)

    def inverse(self, z: Tensor) -> Tensor:
        z = z.index_select(1, self.permutation.argsort()) - self.offset[:, None, None]
        a, b = (z * (-self.scale).exp()[:, None, None]).split((self.passive, self.active), dim=1)
        s, t = self.scale_and_shift(a)
        return torch.cat((a, (b - t) * (-s).exp()), dim=1)


class Flow2D(nn.Module):
    """`steps` couplings on (B, C, H, W) maps of `channels` >= 2; `kernel_sizes` (odd) alternate over the steps.
    `forward(x) -> (z, log_det)`: (B, C, H, W) and (B, H, W), the terms per position of the map's log-determinant.
    `inverse(z) -> x` is exact."""

    def __init__(self, channels: int, steps: int = 8, kernel_sizes: tuple[int, ...] = (3,), hidden_ratio: float = 1.0):
        super().__init__()
        self.steps = nn.ModuleList(
            Coupling(channels, kernel_sizes[i % len(kernel_sizes)], hidden_ratio) for i in range(steps))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_dets = []
        for step in self.steps:
            x, log_det = step(x)
            log_dets.append(log_det)
        return x, sum(log_dets)

    def inverse(self, z: Tensor) -> Tensor:
        for step in reversed(self.steps):
            z = step.inverse(z)
        return z
