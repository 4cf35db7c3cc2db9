"""NF4: sixteen levels that lie where normal weights are, and scales that are kept in eight bits themselves.

Paper: Dettmers, Pagnoni, Holtzman, Zettlemoyer 2023, "QLoRA: Efficient Finetuning of Quantized LLMs",
arXiv:2305.14314, section 3 and appendix E.

Shapes: O output rows, I input columns, N groups of a row, W columns of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plait.errors import ConfigError
from plait.weights.coded import GRIDS, Coded, from_groups, grouped, stepped
from plait.weights.format import WeightFormat, check_matrix
from plait.weights.stats import Stats
from plait.weights.uniform import Group, coded_bits

__all__ = ["NF4"]

# Groups that are packed at once: temporaries of 2^20 weights stay in a few megabytes.
_WEIGHTS_AT_ONCE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class NF4(WeightFormat, name="nf4"):
    """4-bit codes into levels that are equally likely for normal weights, with scales of 8 bits; needs no data.

    A level is one of sixteen published numbers from -1 to 1, 0 among them, times the largest magnitude of the group.
    The numbers are kept in steps of 1/2112, so that they are off by at most 0.00018 of that magnitude, less than fp16
    would cost. Scales are quantised a second time, to 8-bit steps of one fp32 number for each row, and the weights are
    rounded with them: 4 bits a weight, 8 for each group and 32 for each row. The paper does that over 256 groups
    instead of a row, with the mean taken off; files of the `bitsandbytes` package are not read.

    Args:
        group: columns that share a scale; 0 for the whole row. The last group of a row may be shorter.

    Raises:
        ConfigError: from `pack`, a weight that is not a matrix, or not finite.
    """

    group: Group = 64

    packs_embeddings = False

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        return coded_bits(shape, 4, self.group, per_group=8, per_row=32)

    def pack(self, weight: Tensor, stats: Stats | None = None) -> Coded:
        check_matrix(self.name, weight)
        weight = weight.detach().float()
        if not torch.isfinite(weight).all():
            raise ConfigError(f"{self.name} packs finite weights. The weight has NaN or infinite values.")
        rows = max(1, _WEIGHTS_AT_ONCE // max(1, weight.shape[1]))
        chunks = [_encode(chunk, self.group) for chunk in weight.split(rows)]
        codes, scales, steps = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        return from_groups(GRIDS[self.name], self.group, codes, scales, row_scales=steps)


def _encode(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 (O, I), 8-bit scales (O, N) and steps fp32 (O,) of some rows."""
    levels = torch.tensor(GRIDS["nf4"].values, dtype=torch.float32)
    between, zero = (levels[1:] + levels[:-1]) / 2, int((levels == 0).nonzero())
    parts = grouped(weight, group)
    scales, steps = stepped(torch.cat([part.abs().amax(dim=2) for part in parts], dim=1) / levels[-1])
    codes, start = [], 0
    for part in parts:
        scale = (scales[:, start : start + part.shape[1]] * steps[:, None])[..., None]
        found = torch.bucketize((part / torch.where(scale > 0, scale, 1.0)).contiguous(), between)
        codes.append(torch.where(scale > 0, found, zero).to(torch.uint8).flatten(1))
        start += part.shape[1]
    return torch.cat(codes, dim=1), scales.to(torch.uint8), steps
