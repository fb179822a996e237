"""2D normalizing flow: affine couplings with convolutional subnets (RealNVP, arXiv 1605.08803; FastFlow, 2111.07677).

An invertible map x -> z with a cheap Jacobian determinant:  log p(x) = log N(z; 0, I) + log|det dz/dx|.
Shapes: x and z (B, C, H, W); log-determinants (B, H, W), one term per position; their sum is the log-determinant of the
whole map. With 1x1 kernels each position is independent, so `Flow2D.forward` also takes rows (N, C)."""

import math

import torch
from torch import Tensor, nn


class Coupling(nn.Module):
    """One flow step: half of the channels scales and shifts the other half, then all are scaled, shifted and permuted.

        x = [a, b];   [u, t] = subnet(a);   log-scale s = clamp tanh(0.1 u);   b' = b exp(s) + t
        z = permute([a, b'] exp(log_scale) + offset);   log|det| per position = sum(s) + sum(log_scale)

    The subnet need not be invertible: `a` is unchanged, so the inverse computes s and t from it again. The soft clamp
    limits the effect of a single feature."""

    def __init__(self, channels: int, kernel_size: int, hidden_ratio: float, clamp: float = 2.0):
        super().__init__()
        self.changed = channels // 2
        self.kept = channels - self.changed
        self.clamp = clamp
        hidden = max(1, int(self.kept * hidden_ratio))
        self.subnet = nn.Sequential(
            nn.Conv2d(self.kept, hidden, kernel_size, padding="same"),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, 2 * self.changed, kernel_size, padding="same"),
        )
        # Start with s = t = 0: a new flow only permutes channels, and its first loss is that of a plain Gaussian.
        nn.init.zeros_(self.subnet[-1].weight)
        nn.init.zeros_(self.subnet[-1].bias)
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.offset = nn.Parameter(torch.zeros(channels))
        self.register_buffer("permutation", torch.randperm(channels))

    def s_and_t(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """s and t of the changed half, each (B, changed, H, W), from the kept half (B, kept, H, W)."""
        u, t = self.subnet(a).split(self.changed, dim=1)
        u = u.to(a.dtype)  # under autocast the convolutions are in bfloat16; t is promoted when it is added
        tanh = 2 * torch.sigmoid(0.2 * u) - 1  # tanh(0.1 u); on CPUs tanh itself takes seven times as long
        return self.clamp * tanh, t

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.split((self.kept, self.changed), dim=1)
        s, t = self.s_and_t(a)
        z = torch.cat((a, b * s.exp() + t), dim=1)
        z = z * self.log_scale.exp()[:, None, None] + self.offset[:, None, None]
        return self.permute_channels(z), s.sum(dim=1) + self.log_scale.sum()

    def permute_channels(self, z: Tensor) -> Tensor:
        """Reorder the channels of (B, C, H, W) by the permutation."""
        channels_last = z.permute(0, 2, 3, 1)  # z[:, self.permutation] would take three times as long
        rows = channels_last.flatten(0, 2).index_select(1, self.permutation)
        return rows.view(channels_last.shape).permute(0, 3, 1, 2)

    def inverse(self, z: Tensor) -> Tensor:
        z = z.index_select(1, self.permutation.argsort())
        z = (z - self.offset[:, None, None]) * (-self.log_scale).exp()[:, None, None]
        a, b = z.split((self.kept, self.changed), dim=1)
        s, t = self.s_and_t(a)
        return torch.cat((a, (b - t) * (-s).exp()), dim=1)


class Flow2D(nn.Module):
    """`steps` couplings on maps of `channels` >= 2; `kernel_sizes` (odd) alternate over the steps. A subnet has
    `hidden_ratio` times as many hidden channels as inputs, which are half of the channels.

    `forward(x) -> (z, log_det)`; `inverse(z) -> x` is exact. x are maps (B, C, H, W). With 1x1 kernels, `forward` also
    takes rows (N, C); log_det is then (N,)."""

    def __init__(self, channels: int, steps: int = 8, kernel_sizes: tuple[int, ...] = (3,), hidden_ratio: float = 1.0):
        super().__init__()
        kernels = [kernel_sizes[step % len(kernel_sizes)] for step in range(steps)]
        self.couplings = nn.ModuleList(Coupling(channels, kernel, hidden_ratio) for kernel in kernels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim == 2:
            z, log_det = self(as_map(x))
            return z.permute(0, 2, 3, 1).flatten(0, 2), log_det.flatten()
        log_dets = []
        for coupling in self.couplings:
            x, log_det = coupling(x)
            log_dets.append(log_det)
        return x, sum(log_dets)

    def inverse(self, z: Tensor) -> Tensor:
        for coupling in reversed(self.couplings):
            z = coupling.inverse(z)
        return z


def as_map(rows: Tensor) -> Tensor:
    """Rows (N, C) as one map (1, C, H, W), W up to 64: convolutions on a single line of N positions are slower by a
    fifth."""
    width = math.gcd(len(rows), 64)
    return rows.view(1, -1, width, rows.shape[1]).permute(0, 3, 1, 2)
