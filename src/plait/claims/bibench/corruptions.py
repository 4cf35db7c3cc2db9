"""Images as worse cameras would have taken them: nine kinds of corruption, each in five strengths.

After Hendrycks and Dietterich 2019, arXiv:1903.12261, for images of 8 by 8 pixels. None is used in training.
Shapes: images (N, 1, H, W) in [-1, 1]; so are the results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

__all__ = ["CORRUPTIONS", "STRENGTHS", "corrupted"]

STRENGTHS = 5
Corruption = Callable[[Tensor, float, Generator], Tensor]


class _Kind(NamedTuple):
    """What is done, and how much of it in each strength."""

    apply: Corruption
    amounts: tuple[float, ...]


def gaussian_noise(x: Tensor, amount: float, generator: Generator) -> Tensor:
    """Normal noise of this deviation."""
    return x + amount * torch.randn(x.shape, generator=generator)


def shot_noise(x: Tensor, amount: float, generator: Generator) -> Tensor:
    """Counts of particles, `amount` for the brightest pixel."""
    return torch.poisson((x + 1) / 2 * amount, generator=generator) / amount * 2 - 1


def impulse_noise(x: Tensor, amount: float, generator: Generator) -> Tensor:
    """A share of pixels that are black or white."""
    is_hit = torch.rand(x.shape, generator=generator) < amount
    return torch.where(is_hit, torch.rand(x.shape, generator=generator).round() * 2 - 1, x)


def blur(x: Tensor, amount: float, generator: Generator) -> Tensor:
    """A Gaussian lens of this deviation, in pixels."""
    at = torch.arange(-2, 3)
    one = torch.exp(-(at**2) / (2 * amount**2))
    kernel = torch.outer(one, one) / one.sum() ** 2
    return F.conv2d(F.pad(x, (2, 2, 2, 2), value=-1.0), kernel[None, None])


def contrast(x: Tensor, amount: float, generator: Generator) -> Tensor:
    """Differences from the mean of an image, times this."""
    mean = x.mean(dim=(2, 3), keepdim=True)
    return (x - mean) * amount + mean


def brightness(x: Tensor, amount: float, generator: Generator) -> Tensor:
    """All pixels brighter by this."""
    return x + amount


def pixelate(x: Tensor, amount: float, generator: Generator) -> Tensor:
    """Pixels of twice the size, mixed in by this share."""
    coarse = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="nearest")
    return x + amount * (coarse - x)


def shift(x: Tensor, amount: float, generator: Generator) -> Tensor:
    """Moved by this many pixels in a direction drawn for each image; what comes in is black."""
    angle = torch.rand(len(x), generator=generator) * 2 * math.pi
    step = 2 * amount * torch.stack([angle.cos() / x.shape[3], angle.sin() / x.shape[2]], dim=1)
    turn = torch.eye(2).expand(len(x), 2, 2)
    grid = F.affine_grid(torch.cat([turn, step[:, :, None]], dim=2), list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


def occlusion(x: Tensor, amount: float, generator: Generator) -> Tensor:
    """A square of this side, at a place drawn for each image, is black."""
    side = int(amount)
    rows, columns = torch.arange(x.shape[2]), torch.arange(x.shape[3])
    top = torch.randint(0, x.shape[2] - side + 1, (len(x), 1), generator=generator)
    left = torch.randint(0, x.shape[3] - side + 1, (len(x), 1), generator=generator)
    in_rows = (rows >= top) & (rows < top + side)
    in_columns = (columns >= left) & (columns < left + side)
    return x.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], -1.0)


CORRUPTIONS = {
    "gaussian noise": _Kind(gaussian_noise, (0.1, 0.2, 0.35, 0.5, 0.7)),
    "shot noise": _Kind(shot_noise, (32.0, 16.0, 8.0, 4.0, 2.0)),
    "impulse noise": _Kind(impulse_noise, (0.02, 0.05, 0.1, 0.15, 0.25)),
    "blur": _Kind(blur, (0.4, 0.6, 0.8, 1.0, 1.3)),
    "contrast": _Kind(contrast, (0.75, 0.6, 0.45, 0.3, 0.2)),
    "brightness": _Kind(brightness, (0.1, 0.2, 0.35, 0.5, 0.7)),
    "pixelate": _Kind(pixelate, (0.2, 0.4, 0.6, 0.8, 1.0)),
    "shift": _Kind(shift, (0.4, 0.8, 1.2, 1.6, 2.0)),
    "occlusion": _Kind(occlusion, (1.0, 2.0, 3.0, 4.0, 5.0)),
}


def corrupted(images: Tensor, seed: int) -> Iterator[tuple[str, int, Tensor]]:
    """Every kind in every strength, from 1 to 5: its name, the strength, and the images, within [-1, 1]."""
    for number, (name, kind) in enumerate(CORRUPTIONS.items()):
        for strength, amount in enumerate(kind.amounts, start=1):
            # The same noise for every network.
            generator = torch.Generator().manual_seed(1000 * seed + 10 * number + strength)
            yield name, strength, kind.apply(images, amount, generator).clamp(-1, 1)
