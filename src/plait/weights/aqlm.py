"""Layer calibration of vector codes: codes and codebooks in turns, so that a matrix keeps its outputs.

Egiazarian et al. 2024, arXiv:2401.06118, section 3: the loss of a matrix W that is stored as V is tr((V - W) H (V - W)^T), with
H the damped second moments of its inputs. Given the codes, codebooks and row scales are a least-squares problem;
given those, each run's codes are searched with a beam, while the others stay. AQLM takes steps of Adam for the former; here
conjugate gradients solve it. No step is kept that raises the loss.

Shapes: O output rows, I input columns, W columns of a run, J = I / W runs of a row, M codebooks of K entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from plait.weights.codebooks import beam_search, summed
from plait.weights.coded import half
from plait.weights.decoupleq import output_errors

__all__ = ["VectorCodes", "best_books", "best_codes", "best_scales", "calibrated"]

# Steps of the solver: its error falls by two orders within them.
_STEPS = 12
# A round that lowers the loss by less than this share is the last.
_SETTLED = 0.01


class VectorCodes(NamedTuple):
    """A matrix of vector codes in parts: codes int64 (O J, M), books fp32 (M, K, W) and scales fp32 (O,)."""

    codes: Tensor
    books: Tensor
    scales: Tensor

    def unscaled(self) -> Tensor:
        """The matrix but for the scales of its rows, (O, I)."""
        return summed(self.books, self.codes).view(len(self.scales), -1)

    def dense(self) -> Tensor:
        """The matrix, (O, I)."""
        return self.unscaled() * self.scales[:, None]

    def loss(self, weight: Tensor, hessian: Tensor) -> float:
        """tr((V - W) H (V - W)^T) for a weight (O, I) and H (I, I) fp64."""
        return float(output_errors(self.dense() - weight, hessian).sum())


def calibrated(weight: Tensor, hessian: Tensor, start: VectorCodes, rounds: int) -> VectorCodes:
    """Codes, codebooks and scales that keep the outputs better than those of `start`, by at most `rounds` turns.

    Costs for each turn about 2 (_STEPS + 1) products with H, and for each run a search of 256 (1 + 5 (M - 1)) entries.

    Args:
        weight: (O, I) fp32, finite.
        hessian: damped second moments, (I, I) fp64.

    Returns:
        Books and scales that fp16 holds.
    """
    best, loss = start, start.loss(weight, hessian)
    for _ in range(rounds):
        before = loss
        for step in (best_books, best_scales, best_codes):
            found = step(weight, hessian, best)
            now = found.loss(weight, hessian)
            if now < loss:
                best, loss = found, now
        if loss >= (1 - _SETTLED) * before:
            break
    return best


def best_books(weight: Tensor, hessian: Tensor, given: VectorCodes) -> VectorCodes:
    """The codebooks that least squares give for codes and scales as they are, by conjugate gradients; in fp16 steps."""
    moments, scale = hessian.float(), given.scales[:, None]
    size, width = given.books.shape[1:]

    def slopes(change: Tensor) -> Tensor:
        """What a change V - W (O, I) says about each entry, half the gradient: (M, K, W)."""
        return _gathered((change @ moments) * scale, given.codes, size, width)

    # The system's diagonal, by which steps are scaled; entries that nothing uses stay.
    spread = (scale.square() * moments.diagonal()).expand(len(scale), -1)
    diagonal = _gathered(spread, given.codes, size, width)
    inverse = torch.where(diagonal > 0, 1 / diagonal.clamp(min=1e-30), 0.0)
    books = given.books.clone()
    left = -slopes(given.dense() - weight)
    scaled = inverse * left
    direction, size_of = scaled.clone(), (left * scaled).sum()
    for _ in range(_STEPS):
        along = slopes(given._replace(books=direction).dense())
        curvature = (direction * along).sum()
        if not curvature > 0:
            break
        step = size_of / curvature
        books += step * direction
        left -= step * along
        scaled = inverse * left
        size_now = (left * scaled).sum()
        direction = scaled + (size_now / size_of) * direction
        size_of = size_now
    return given._replace(books=half(books, "Codebooks").float())


def best_scales(weight: Tensor, hessian: Tensor, given: VectorCodes) -> VectorCodes:
    """The scale of each row with the least loss, in closed form; in fp16 steps."""
    rows = given.unscaled().double()
    seen = rows @ hessian
    square = (seen * rows).sum(dim=1)
    found = (seen * weight.double()).sum(dim=1) / square.clamp(min=1e-30)
    scales = torch.where(square > 0, found.float(), given.scales)
    return given._replace(scales=half(scales, "Scales").float())


def best_codes(weight: Tensor, hessian: Tensor, given: VectorCodes) -> VectorCodes:
    """Codes of one run after the other, searched with a beam while those of all others stay.

    With g = (V - W) H and the square S = L L^T of H on the run, the best that a row could have there is its present value less
    g S^-1, and the loss of another value is its squared distance from that, seen through L.
    """
    moments = hessian.float()
    count, width = len(given.scales), given.books.shape[2]
    codes = given.codes.view(count, -1, given.codes.shape[1]).clone()
    present = given.dense()
    slope = (present - weight) @ moments
    safe = torch.where(given.scales == 0, 1.0, given.scales)[:, None]
    for run in range(codes.shape[1]):
        columns = slice(run * width, (run + 1) * width)
        lower = torch.linalg.cholesky(hessian[columns, columns])
        back = torch.cholesky_inverse(lower).float()
        seen = lower.float()
        value = present[:, columns]
        wanted = ((value - slope[:, columns] @ back) / safe) @ seen
        books = given.books @ seen
        found = beam_search(wanted, books).long()
        old = codes[:, run]
        errors = [(summed(books, some) - wanted).square().sum(dim=1) for some in (found, old)]
        chosen = torch.where((errors[0] < errors[1])[:, None], found, old)
        codes[:, run] = chosen
        moved = summed(given.books, chosen) * given.scales[:, None] - value
        present[:, columns] += moved
        slope += moved @ moments[columns]
    return given._replace(codes=codes.flatten(0, 1))


def _gathered(rows: Tensor, codes: Tensor, size: int, width: int) -> Tensor:
    """Sums over the runs of rows (O, I) that use each entry: codes (O J, M) -> (M, K, W)."""
    runs = rows.reshape(-1, width)
    total = rows.new_zeros(codes.shape[1], size, width)
    for number, chosen in enumerate(codes.unbind(dim=1)):
        total[number].index_add_(0, chosen, runs)
    return total
