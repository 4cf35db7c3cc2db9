"""decoupleQ: whole-number codes and real-valued levels are optimised in turns, then levels by whole blocks.

Paper: Guo et al. 2024, "decoupleQ: Towards 2-bit Post-Training Uniform Quantization via Decoupling
Parameters into Integer and Floating Points", arXiv:2404.12759, sections 3.2 to 3.4 and Algorithms 1 and 2.

A row b is stored as v = s_j q + z_j in each group j; its loss is (v - b)^T H (v - b), with H the damped second
moments of the inputs. Given the codes q, the best s and z of all groups solve one linear system (equation
6 of the paper); given s and z, GPTQ's feedback finds codes. A step of either kind is kept for the
rows whose loss it lowers, so no row ever gets worse. Then all levels and norms of a block are trained to
give the block's outputs, with the codes frozen.

Shapes: O output rows, I input columns, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from plait.weights.coded import Coded, group_sizes, grouped
from plait.weights.format import BlockRun, Linear, Packed, Stacked, check_matrix
from plait.weights.gptq import Moments, codes_with_feedback, moments
from plait.weights.stats import Stats
from plait.weights.uniform import Group, Levels, UniformFormat

__all__ = ["DecoupleQ", "best_levels", "best_pairs", "output_errors", "row_losses"]

# Bytes of the systems of equations that are solved at once, and of the products they are made of.
_SYSTEM_BYTES = 64 << 20
# A scale is kept at least this large, relative to the row's root mean square: zeros must fit in fp16.
_LEAST_SCALE = 1e-4
_SETTLED = 1e-4
# Columns of a symmetric matrix, or of its factor, that are multiplied together.
_COLUMNS_AT_ONCE = 192
_CLIPPING = tuple(1 - i / 20 for i in range(1, 16))


@dataclass(frozen=True, kw_only=True)
class DecoupleQ(UniformFormat, name="decoupleq"):
    """Evenly spaced levels for very few bits: codes, then scales and real zeros, in turns; needs calibration.

    Kept as `uniform` is. Costs `rounds` times what GPTQ costs and as many solutions of a system of 2 G
    unknowns for each row; the block stage costs `epochs` training passes over the calibration text.
    Rounding by training (the paper's slower second form of the integer step) is not offered.

    Args:
        bits: of a code, 2, 3, 4 or 8.
        group: columns that share a scale; 0 for the whole row. The last group of a row may be shorter.
        damping: share of the mean of the second moments that is added to each, in (0, 1].
        rounds: integer steps for each matrix; 1 is GPTQ, whose levels are then solved for once.
        epochs: passes of the block stage over the calibration text; 0 leaves it out.
        rate: step size of Adam in the block stage.
        train_norms: whether the block stage trains the weights of norms too.

    Raises:
        ConfigError: from `pack`, a weight that is not a matrix of finite numbers, or no `hessian`.
    """

    bits: Literal[2, 3, 4, 8] = 2
    group: Group = 64
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    rounds: Annotated[int, Field(ge=1, le=100)] = 4
    epochs: Annotated[int, Field(ge=0, le=100)] = 4
    rate: Annotated[float, Field(gt=0, le=1)] = 1e-4
    train_norms: bool = True

    symmetric = False
    needs = frozenset({"hessian", "block_io"})

    def pack(self, weight: Tensor, stats: Stats | None = None) -> Coded:
        check_matrix(self.name, weight)
        weight = weight.detach().float()
        inputs = moments(self.name, stats, self.damping)
        hessian = inputs.hessian
        levels = self.levels(weight)
        codes = self._integers(weight, levels, inputs)
        loss = row_losses(weight, codes, levels, hessian, self.group)
        for number in range(1, self.rounds):
            if number == 1:
                start = self._clipped(weight, inputs)
                start_codes = self.nearest(weight, start)
                start = best_levels(weight, start_codes, hessian, self.group)
                found = self._integers(weight, start, inputs)
                codes, levels, loss, _ = self._kept(weight, hessian, (codes, levels, loss), (found, start))
                improved = 1.0
            else:
                found = self._integers(weight, levels, inputs)
                codes, levels, loss, improved = self._kept(
                    weight, hessian, (codes, levels, loss), (found, levels)
                )
            solved = best_levels(weight, codes, hessian, self.group)
            codes, levels, loss, share = self._kept(weight, hessian, (codes, levels, loss), (codes, solved))
            if max(improved, share) < _SETTLED:
                break
        if self.rounds == 1:
            solved = best_levels(weight, codes, hessian, self.group)
            codes, levels, _, _ = self._kept(weight, hessian, (codes, levels, loss), (codes, solved))
        return self.packed(codes, levels)

    def _integers(self, weight: Tensor, levels: Levels, inputs: Moments) -> Tensor:
        return codes_with_feedback(weight, levels, inputs.feedback(), self.bits, self.group)

    def _clipped(self, weight: Tensor, inputs: Moments) -> Levels:
        """Levels between the extremes of each group, shrunk by the factor that is best for the row."""
        full = self.levels(weight)
        best = torch.full((len(weight),), torch.inf)
        scale = full.scale
        for factor in (1.0, *_CLIPPING):
            levels = Levels(full.scale * factor, full.zero)
            change = _change(weight, self.nearest(weight, levels), levels, self.group)
            loss = _rough_losses(change, inputs.lower)
            is_better = loss < best
            best = torch.where(is_better, loss, best)
            scale = torch.where(is_better[:, None], levels.scale, scale)
        return Levels(scale, full.zero)

    def _kept(
        self, weight: Tensor, hessian: Tensor, old: tuple[Tensor, Levels, Tensor], new: tuple[Tensor, Levels]
    ) -> tuple[Tensor, Levels, Tensor, float]:
        """The better of two solutions for each row, its loss, and the share of rows that changed."""
        codes, levels = new
        loss = row_losses(weight, codes, levels, hessian, self.group)
        is_better = loss < old[2]
        chosen = is_better[:, None]
        kept = Levels(
            torch.where(chosen, levels.scale, old[1].scale), torch.where(chosen, levels.zero, old[1].zero)
        )
        share = float(is_better.float().mean()) if len(is_better) else 0.0
        return torch.where(chosen, codes, old[0]), kept, torch.where(is_better, loss, old[2]), share

    def refine(self, block: nn.Module, run: BlockRun) -> None:
        """Train scales, zeros and norms of a block towards its outputs; kept only if its error falls."""
        if self.epochs == 0:
            return
        holders = _holders(block)
        with torch.no_grad():
            before = _error(run)
        old = [(holder, key, holder._modules[key]) for holder, key in holders]
        tunable = [_Tunable(matrix) for _, _, matrix in old if isinstance(matrix, Coded)]
        norms = [
            parameter
            for name, parameter in block.named_parameters()
            if self.train_norms and "norm" in name and parameter.dim() == 1
        ]
        saved = [norm.detach().clone() for norm in norms]
        for (holder, key), matrix in zip(holders, tunable, strict=True):
            holder._modules[key] = matrix
        for norm in norms:
            norm.requires_grad_(True)
        trained = [*(p for matrix in tunable for p in (matrix.scale, matrix.shift)), *norms]
        optimizer = torch.optim.Adam(trained, lr=self.rate, betas=(0.9, 0.99), eps=2e-5, weight_decay=1e-6)
        with torch.enable_grad():
            for _ in range(self.epochs):
                for index in range(len(run)):
                    optimizer.zero_grad()
                    (run.output(index) - run.target(index)).square().mean().backward()
                    optimizer.step()
        for norm in norms:
            norm.requires_grad_(False)
        with torch.no_grad():
            for (holder, key), matrix in zip(holders, tunable, strict=True):
                holder._modules[key] = self.packed(matrix.codes, matrix.levels())
            if not _error(run) <= before:
                for holder, key, before_it in old:
                    holder._modules[key] = before_it
                for norm, values in zip(norms, saved, strict=True):
                    norm.copy_(values)


def row_losses(weight: Tensor, codes: Tensor, levels: Levels, hessian: Tensor, group: int) -> Tensor:
    """(v - b)^T H (v - b) of each row, (O,) fp64."""
    return output_errors(_change(weight, codes, levels, group), hessian)


def output_errors(change: Tensor, hessian: Tensor) -> Tensor:
    """D^T H D of each row of a change (O, I), (O,) fp64; H is symmetric."""
    change = change.double()
    errors = change.new_zeros(len(change))
    for start in range(0, len(hessian), _COLUMNS_AT_ONCE):
        stop = start + _COLUMNS_AT_ONCE
        # What lies below the diagonal is what lies above it.
        pulled = change[:, start:stop] @ hessian[start:stop, start:]
        pulled[:, _COLUMNS_AT_ONCE:] *= 2
        errors += pulled.mul_(change[:, start:]).sum(dim=1)
    return errors


def _rough_losses(change: Tensor, lower: Tensor) -> Tensor:
    """D^T H D of each row in fp32, (O,), with H = `lower` times its transpose; to choose where to start."""
    losses = torch.zeros(len(change))
    for start in range(0, len(lower), _COLUMNS_AT_ONCE):
        # Above the diagonal there are zeros.
        part = change[:, start:] @ lower[start:, start : start + _COLUMNS_AT_ONCE]
        losses += part.square_().sum(dim=1)
    return losses


def _change(weight: Tensor, codes: Tensor, levels: Levels, group: int) -> Tensor:
    """What a matrix of these codes and levels differs by, fp32 (O, I)."""
    sizes = torch.tensor(group_sizes(weight.shape[1], group))
    scale, zero = (numbers.repeat_interleave(sizes, dim=1) for numbers in levels)
    return (codes.float() - zero).mul_(scale).sub_(weight)


def best_levels(weight: Tensor, codes: Tensor, hessian: Tensor, group: int) -> Levels:
    """The scales and real zeros with the least loss for given codes, in closed form.

    For every row, with A = [q on group j | ones on group j] of 2 G columns, solves
    (A^T H A) [s; z] = A^T H b in fp64. Where all codes of a group are equal, its two columns are multiples
    of each other; a small weight on s^2 then decides.

    Args:
        weight: b, (O, I).
        codes: uint8 (O, I).
        hessian: damped, (I, I) fp64.

    Returns:
        fp32 (O, G); a scale may be negative.
    """
    sizes = group_sizes(weight.shape[1], group)
    flat = []
    for part, square in zip(codes.split(sizes, dim=1), _squares(hessian, sizes), strict=True):
        is_flat = part.amax(dim=1) == part.amin(dim=1)
        flat.append(torch.where(is_flat, 0.01 * square.sum().abs() + 1e-30, 0.0))
    ridge = torch.cat([torch.stack(flat, dim=1), torch.zeros(len(weight), len(sizes))], dim=1)
    scale, shift = best_pairs(weight, codes, torch.ones(1, weight.shape[1]), hessian, group, ridge)
    least = _LEAST_SCALE * weight.double().square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-20)
    scale = torch.where(scale.abs() < least, torch.where(scale < 0, -least, least), scale)
    return Levels(scale.float(), (-shift / scale).float())


def best_pairs(
    weight: Tensor,
    first: Tensor,
    second: Tensor,
    hessian: Tensor,
    group: int,
    ridge: Tensor,
    prior: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The numbers s and z of each group with the least loss of s * first + z * second, fp64 (O, G) each.

    Args:
        weight: b, (O, I).
        first: (O, I).
        second: (O, I), or (1, I) where all rows have the same.
        hessian: damped, (I, I) fp64.
        ridge: weight on the squares of [s | z] less `prior`, (O, 2 G).
        prior: (O, 2 G); 0 when left out.
    """
    count = len(group_sizes(weight.shape[1], group))
    row_bytes = 8 * ((2 * count) ** 2 + 6 * weight.shape[1])
    step = max(1, _SYSTEM_BYTES // row_bytes)
    parts = []
    for at in range(0, max(1, len(weight)), step):
        here = slice(at, at + step)
        own = second if len(second) == 1 else second[here]
        weights = ridge[here].double()
        wanted = weights * prior[here].double() if prior is not None else None
        parts.append(
            _solved(
                weight[here].double(), first[here].double(), own.double(), hessian, group, weights, wanted
            )
        )
    found = torch.cat(parts)
    return found[:, :count], found[:, count:]


def _squares(hessian: Tensor, sizes: list[int]) -> list[Tensor]:
    """The squares of a matrix (I, I) on its diagonal, one for each group."""
    return [rows.split(sizes, dim=1)[index] for index, rows in enumerate(hessian.split(sizes))]


def _solved(
    weight: Tensor,
    first: Tensor,
    second: Tensor,
    hessian: Tensor,
    group: int,
    ridge: Tensor,
    pull: Tensor | None,
) -> Tensor:
    wanted = weight @ hessian
    right = torch.cat([_group_sums(part * wanted, group) for part in (first, second)], dim=1)
    crossed = _products(first, second, hessian, group)
    ones = _products(first, first, hessian, group)
    others = _products(second, second, hessian, group).expand_as(ones)
    system = torch.cat(
        [torch.cat([ones, crossed], dim=2), torch.cat([crossed.transpose(1, 2), others], dim=2)], dim=1
    )
    system.diagonal(dim1=1, dim2=2).add_(ridge)
    if pull is not None:
        right = right + pull
    found, failed = torch.linalg.solve_ex(system, right[..., None])
    if failed.any():
        diagonal = system.diagonal(dim1=1, dim2=2)
        system = system + torch.diag_embed(
            0.01 * diagonal.mean(dim=1, keepdim=True).expand_as(diagonal) + 1e-30
        )
        found = torch.where((failed != 0)[:, None, None], torch.linalg.solve(system, right[..., None]), found)
    return found[..., 0]


def _products(first: Tensor, second: Tensor, hessian: Tensor, group: int) -> Tensor:
    """f^T H s for f a row of `first` on group j and s the same row of `second` on group k, fp64 (O, j, k)."""
    size = group or max(1, first.shape[1])
    starts = range(0, first.shape[1], size)
    if len(second) == 1 < len(first):
        pulled = _group_sums(hessian * second, group)
        return torch.stack([first[:, at : at + size] @ pulled[at : at + size] for at in starts], dim=1)
    found = first.new_zeros(len(first), len(starts), len(starts))
    for index, at in enumerate(starts):
        # Of a symmetric result, half is computed.
        begin = at if first is second else 0
        pulled = first[:, at : at + size] @ hessian[at : at + size, begin:]
        found[:, index, begin // size :] = _group_sums(pulled.mul_(second[:, begin:]), group)
    return found + found.triu(1).transpose(1, 2) if first is second else found


def _group_sums(numbers: Tensor, group: int) -> Tensor:
    """Sums over the columns of each group, (O, I) -> (O, G)."""
    return torch.cat([part.sum(dim=2) for part in grouped(numbers, group)], dim=1)


class _Tunable(Packed):
    """A matrix whose codes are fixed and whose levels are trained: `scale * code + shift`."""

    def __init__(self, matrix: Coded) -> None:
        super().__init__(matrix.shape, matrix.format)
        assert matrix.zeros is not None
        self.codes = matrix.code_rows()
        self.scale = nn.Parameter(matrix.per_group(matrix.scales).float())
        self.shift = nn.Parameter(-self.scale.detach() * matrix.per_group(matrix.zeros).float())
        sizes = torch.tensor(group_sizes(matrix.shape[1], matrix.group))
        self._group_of = torch.arange(len(sizes)).repeat_interleave(sizes)

    def unpack_rows(self, rows: Tensor | slice) -> Tensor:
        scale, shift = self.scale[rows][:, self._group_of], self.shift[rows][:, self._group_of]
        return torch.addcmul(shift, scale, self.codes[rows].float())

    def levels(self) -> Levels:
        scale = self.scale.detach()
        safe = torch.where(scale == 0, 1.0, scale)
        return Levels(scale, (-self.shift.detach() / safe).clamp(-65000, 65000))


def _holders(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where the coded matrices of a block's linear layers are held: module and name."""
    places: list[tuple[nn.Module, str]] = []
    for module in block.modules():
        if isinstance(module, Linear):
            if isinstance(module.weight, Stacked):
                places += [(module.weight.parts, str(i)) for i in range(len(module.weight.parts))]
            else:
                places.append((module, "weight"))
    return [(holder, key) for holder, key in places if isinstance(holder._modules[key], Coded)]


def _error(run: BlockRun) -> float:
    """Mean squared error of the block's outputs over the calibration text."""
    errors = [float((run.output(i) - run.target(i)).square().mean()) for i in range(len(run))]
    return sum(errors) / max(1, len(errors))
