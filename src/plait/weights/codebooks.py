"""Codebooks whose entries add up to runs of weights: how they are found, and how codes in them are chosen.

Shapes: R runs of W columns, M codebooks of K entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["beam_search", "k_means", "nearest_entries", "summed"]

_ROUNDS, _BEAM = 12, 5
# Runs whose distances to a codebook are formed at once: 64 MB of fp32.
_RUNS_AT_ONCE = 1 << 16


def k_means(points: Tensor, count: int, *, seed: int, rounds: int = _ROUNDS) -> Tensor:
    """Centres (count, W) of points (R, W), R at least `count`; centres that lose all points are put on far ones."""
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randperm(len(points), generator=generator)[:count]].clone()
    for _ in range(rounds):
        owner = nearest_entries(points, centres)
        sums = torch.zeros_like(centres).index_add_(0, owner, points)
        sizes = torch.bincount(owner, minlength=count)
        empty = (sizes == 0).nonzero()[:, 0]
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], centres)
        if len(empty):
            far = (points - centres[owner]).square().sum(dim=1).topk(len(empty)).indices
            centres[empty] = points[far]
    return centres


def beam_search(target: Tensor, books: Tensor, width: int = _BEAM) -> Tensor:
    """Codes uint8 (n, M) whose entries add up to what is near `target` (n, W); exact for one codebook.

    Partial sums of the first codebooks are kept, the `width` nearest of each. A width of at least the number of entries
    makes it exact for two.

    Args:
        books: fp32 (M, K, W), K up to 256.
    """
    return torch.cat([_beam_search(part, books, width) for part in target.split(_RUNS_AT_ONCE // 16)])


def _beam_search(target: Tensor, books: Tensor, width: int) -> Tensor:
    count, size = target.shape[0], books.shape[1]
    left, codes = target[:, None], torch.zeros(count, 1, 0, dtype=torch.int64)
    for number, book in enumerate(books):
        # |left - entry|^2, without what is the same for all entries of a beam.
        scores = left.square().sum(dim=2, keepdim=True) - 2 * left @ book.T + book.square().sum(dim=1)
        kept = 1 if number == len(books) - 1 else min(width, scores[0].numel() if count else 1)
        best = scores.flatten(1).topk(kept, dim=1, largest=False, sorted=True).indices
        beam, entry = best // size, best % size
        codes = torch.cat([codes.gather(1, beam[..., None].expand(-1, -1, number)), entry[..., None]], dim=2)
        left = left.gather(1, beam[..., None].expand(-1, -1, target.shape[1])) - book[entry]
    return codes[:, 0].to(torch.uint8)


def nearest_entries(points: Tensor, centres: Tensor) -> Tensor:
    """Index of the nearest centre of each point, (R,)."""
    halved = centres.square().sum(dim=1) / 2
    return torch.cat([(halved - part @ centres.T).argmin(dim=1) for part in points.split(_RUNS_AT_ONCE)])


def summed(books: Tensor, codes: Tensor) -> Tensor:
    """Sums of entries: codes (n, M) in books (M, K, W) give (n, W)."""
    total = books[0][codes[:, 0].long()]
    for number in range(1, len(books)):
        total = total + books[number][codes[:, number].long()]
    return total
