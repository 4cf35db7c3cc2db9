"""Vector codes: short runs of a row, each the sum of entries of a few codebooks.

Egiazarian et al. 2024, "Extreme Compression of Large Language Models via Additive Quantization" (AQLM),
arXiv:2401.06118, is the format, and what PV-Tuning (arXiv:2405.14852) tunes:

    w[row, run] = s_row * sum over c of C_c[code_c]

Here codebooks are found by k-means on the rows divided by their norms, each on what the ones before leave; the layer
calibration of AQLM is left to tuning.

Shapes: O output rows, I input columns, W columns of a run, R = O I / W runs, M codebooks of K entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from torch import Tensor

from plait import ops
from plait.errors import ConfigError
from plait.weights.coded import half
from plait.weights.format import Packed, WeightFormat, check_matrix, take_tensors
from plait.weights.stats import Stats
from plait.weights.tiles import BLOCK
from plait.weights.tunable import Tunable

__all__ = ["VQ", "Additive", "TunableAdditive", "beam_search", "k_means"]

_MAX_COLUMNS, _MAX_ROWS, _MAX_BOOKS, _MAX_RUN = 1 << 20, 1 << 28, 8, 64
_ROUNDS, _BEAM = 12, 5
# Runs whose distances to a codebook are formed at once: 64 MB of fp32.
_RUNS_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class VQ(WeightFormat, name="vq"):
    """Runs of `group` weights as the sum of entries of `books` codebooks of 256 each: `8 books / group` bits a weight.

    Codebooks cost `256 * books * group * 16` bits for each matrix, which is 0.2 bits a weight of one of 576 x 576, and 0.6 of
    192 x 576; they are counted. Native products need a multiple of 32 columns; other matrices are decoded piece by piece.
    As it starts it is coarse; tune it (`plait train weights`).

    Args:
        books: codebooks whose entries are added.
        group: columns of a run; must divide the columns of every matrix.
        seed: of the entries that k-means starts from.

    Raises:
        ConfigError: from `pack`, a weight that is not a matrix of finite numbers, columns that runs do not divide, or
            fewer runs than entries of a codebook.
    """

    books: Annotated[int, Field(ge=1, le=_MAX_BOOKS)] = 2
    group: Annotated[int, Field(ge=1, le=_MAX_RUN)] = 8
    seed: Annotated[int, Field(ge=0)] = 0

    packs_embeddings = False

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        rows, columns = shape
        bits = 8 * self.books * rows * columns / self.group + 16 * self.books * 256 * self.group + 16 * rows
        return bits / max(1, rows * columns)

    def pack(self, weight: Tensor, stats: Stats | None = None) -> Additive:
        check_matrix(self.name, weight)
        weight = weight.detach().float()
        if not torch.isfinite(weight).all():
            raise ConfigError(f"{self.name} packs finite weights. The weight has NaN or infinite values.")
        rows, columns = weight.shape
        if columns % self.group:
            raise ConfigError(
                f"VQ.group must divide the {columns} columns of the matrix. Got {self.group}; take 8, 4 or 2."
            )
        if rows * columns // self.group < 256:
            raise ConfigError(
                f"A codebook of 256 entries needs as many runs. A matrix of {rows} x {columns} has "
                f"{rows * columns // self.group}; choose a smaller group, or uniform."
            )
        scales = half(weight.norm(dim=1) / max(1, columns) ** 0.5, "Scales")
        safe = torch.where(scales == 0, 1.0, scales.float())
        left = (weight / safe[:, None]).reshape(-1, self.group)
        books = []
        for number in range(self.books):
            book = half(k_means(left, 256, seed=self.seed + number), "Codebooks")
            books.append(book)
            left = left - book.float()[_nearest(left, book.float())]
        stacked = torch.stack(books)
        # Each code knows the others now.
        target = (weight / safe[:, None]).reshape(-1, self.group)
        codes = torch.cat([beam_search(part, stacked.float()) for part in target.split(_RUNS_AT_ONCE // 16)])
        return Additive((rows, columns), codes.view(rows, -1, self.books), stacked, scales)


class Additive(Packed, kind="additive"):
    """A matrix of vector codes. In native form it is multiplied as it lies here, without another copy.

    Products with activations in 15 bits (see `ops.PackedMatrix`) belong to a lowered model; `matmul` itself multiplies in
    fp32. A row's result has the same bits in any batch.

    Args:
        shape: (O, I).
        codes: uint8 (O, I / W, M).
        books: fp16 (M, 256, W).
        scales: fp16 (O,).

    Raises:
        ConfigError: tensors that do not fit together.
    """

    codes: Tensor
    books: Tensor
    scales: Tensor

    def __init__(self, shape: tuple[int, int], codes: Tensor, books: Tensor, scales: Tensor) -> None:
        super().__init__(shape, "vq")
        rows, columns = self.shape
        count, width = (books.shape[0], books.shape[2]) if books.dim() == 3 else (0, 0)
        if not (0 <= rows <= _MAX_ROWS and 0 <= columns <= _MAX_COLUMNS):
            raise ConfigError(f"its shape is {shape}, which is not that of a matrix")
        if not (1 <= count <= _MAX_BOOKS and 1 <= width <= _MAX_RUN) or columns % width:
            raise ConfigError(
                f"its codebooks have shape {tuple(books.shape)}, which does not cut {columns} columns"
            )
        take_tensors(
            {"codes": codes, "books": books, "scales": scales},
            {
                "codes": ((rows, columns // width, count), (torch.uint8,)),
                "books": ((count, 256, width), (torch.float16,)),
                "scales": ((rows,), (torch.float16,)),
            },
        )
        for name, tensor in (("codes", codes), ("books", books), ("scales", scales)):
            self.register_buffer(name, tensor.contiguous())

    def unpack_rows(self, rows: Tensor | slice) -> Tensor:
        numbers = torch.arange(self.shape[0])[rows]
        flat = numbers.reshape(-1)
        runs = _summed(self.books.float(), self.codes[flat].flatten(0, 1))
        values = runs.view(len(flat), self.shape[1]) * self.scales.float()[flat, None]
        return values.view(*numbers.shape, self.shape[1])

    @property
    def has_native_form(self) -> bool:
        return self.native is not None or (
            self.codes.device.type == "cpu"
            and self.shape[1] > 0
            and self.shape[1] % BLOCK == 0
            and ops.has_native_vectors()
        )

    def to_native(self) -> ops.PackedMatrix:
        if self.native is None:
            self.native = ops.AdditiveMatrix(self.shape, self.codes, self.books, self.scales)
        return self.native

    def matmul(self, x: Tensor) -> Tensor:
        if self.has_native_form and not (torch.is_grad_enabled() and x.requires_grad):
            native = self.to_native()
            assert isinstance(native, ops.AdditiveMatrix)
            return native.matmul_exact(x)
        return super().matmul(x)

    def select(self, rows: Tensor) -> Additive:
        return Additive((len(rows), self.shape[1]), self.codes[rows], self.books, self.scales[rows])

    def tunable(self) -> Packed:
        return TunableAdditive(self)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.named_buffers())

    @classmethod
    def from_tensors(
        cls, shape: tuple[int, int], settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Self:
        if tensors.keys() != {"codes", "books", "scales"}:
            raise ConfigError(f"it has the parts {sorted(tensors)}, not codes, books and scales")
        return cls(shape, **tensors)


class TunableAdditive(Tunable):
    """Vector codes that are tuned: codebooks and row scales are trained."""

    def __init__(self, matrix: Additive) -> None:
        super().__init__(matrix.shape, matrix.format, {"books": matrix.books, "scale": matrix.scales})
        self.width = matrix.books.shape[2]
        self.register_buffer("codes", matrix.codes.flatten(0, 1).clone())

    def dense(self) -> Tensor:
        runs = _summed(self.number("books"), self.codes)
        return runs.view(self.shape) * self.number("scale")[:, None]

    @torch.no_grad()
    def nearest(self, target: Tensor, groups: Tensor) -> Tensor:
        scale = self._scale_of(groups)
        wanted = target / torch.where(scale == 0, 1.0, scale)
        books, present = self.number("books"), self.codes[groups]
        found = torch.cat(
            [beam_search(part, books) for part in wanted.split(_RUNS_AT_ONCE // 16)] or [present]
        )
        errors = [
            (_summed(books, codes) - wanted).square().sum(dim=1, keepdim=True) for codes in (found, present)
        ]
        return torch.where(errors[0] < errors[1], found, present)

    @torch.no_grad()
    def decoded(self, codes: Tensor, groups: Tensor) -> Tensor:
        return _summed(self.number("books"), codes) * self._scale_of(groups)

    def _scale_of(self, groups: Tensor) -> Tensor:
        return self.number("scale")[groups // (self.shape[1] // self.width), None]

    @torch.no_grad()
    def packed(self) -> Additive:
        codes = self.codes.view(self.shape[0], -1, self.codes.shape[1]).clone()
        return Additive(
            self.shape, codes, half(self.number("books"), "Codebooks"), half(self.number("scale"), "Scales")
        )


def k_means(points: Tensor, count: int, *, seed: int, rounds: int = _ROUNDS) -> Tensor:
    """Centres (count, W) of points (R, W), R at least `count`; centres that lose all points are put on far ones."""
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randperm(len(points), generator=generator)[:count]].clone()
    for _ in range(rounds):
        owner = _nearest(points, centres)
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


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Index of the nearest centre of each point, (R,)."""
    halved = centres.square().sum(dim=1) / 2
    return torch.cat([(halved - part @ centres.T).argmin(dim=1) for part in points.split(_RUNS_AT_ONCE)])


def _summed(books: Tensor, codes: Tensor) -> Tensor:
    """Sums of entries: codes (n, M) in books (M, K, W) give (n, W)."""
    total = books[0][codes[:, 0].long()]
    for number in range(1, len(books)):
        total = total + books[number][codes[:, number].long()]
    return total
