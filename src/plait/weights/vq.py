"""Vector codes: short runs of a row, each the sum of entries of a few codebooks.

Egiazarian et al. 2024, "Extreme Compression of Large Language Models via Additive Quantization" (AQLM),
arXiv:2401.06118, is the format, and what PV-Tuning (arXiv:2405.14852) tunes:

    w[row, run] = s_row * sum over c of C_c[code_c]

Codebooks are found by k-means on the rows divided by their norms, each on what the ones before leave. Where they are
calibrated, AQLM's turns of codes and codebooks follow (`plait.weights.aqlm`).

Shapes: O output rows, I input columns, W columns of a run, R = O I / W runs, M codebooks of K entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from plait import ops
from plait.errors import ConfigError
from plait.weights.aqlm import VectorCodes, calibrated
from plait.weights.codebooks import beam_search, k_means, nearest_entries, summed
from plait.weights.coded import half
from plait.weights.format import Packed, WeightFormat, check_matrix, take_tensors
from plait.weights.gptq import damped, needed
from plait.weights.stats import Stats
from plait.weights.tiles import BLOCK
from plait.weights.tunable import Tunable

__all__ = ["VQ", "Additive", "TunableAdditive"]

_MAX_COLUMNS, _MAX_ROWS, _MAX_BOOKS, _MAX_RUN = 1 << 20, 1 << 28, 8, 64


@dataclass(frozen=True, kw_only=True)
class VQ(WeightFormat, name="vq"):
    """Runs of `group` weights as the sum of entries of `books` codebooks of 256 each: `8 books / group` bits a weight.

    Codebooks cost `256 * books * group * 16` bits for each matrix, which is 0.2 bits a weight of one of 576 x 576, and 0.6 of
    192 x 576; they are counted. Native products need a multiple of 32 columns; other matrices are decoded piece by piece.
    As it starts it is coarse; calibrate it, tune it (`plait train weights`), or both.

    Args:
        books: codebooks whose entries are added.
        group: columns of a run; must divide the columns of every matrix.
        start: `weights` puts the nearest codes, `calibrated` chooses codes and codebooks in turns so that outputs are kept,
            which needs calibration text and takes about as long for each round as the rest.
        rounds: of these turns at most, where calibrated.
        damping: share of the mean of the second moments that is added to each, in (0, 1], where calibrated.
        seed: of the entries that k-means starts from.

    Raises:
        ConfigError: from `pack`, a weight that is not a matrix of finite numbers, columns that runs do not divide,
            fewer runs than entries of a codebook, or no `hessian` where calibrated.
    """

    books: Annotated[int, Field(ge=1, le=_MAX_BOOKS)] = 2
    group: Annotated[int, Field(ge=1, le=_MAX_RUN)] = 8
    start: Literal["weights", "calibrated"] = "weights"
    rounds: Annotated[int, Field(ge=1, le=100)] = 4
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    seed: Annotated[int, Field(ge=0)] = 0

    packs_embeddings = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"hessian"}) if self.start == "calibrated" else frozenset()

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
            left = left - book.float()[nearest_entries(left, book.float())]
        stacked = torch.stack(books)
        # Each code knows the others now.
        target = (weight / safe[:, None]).reshape(-1, self.group)
        codes = beam_search(target, stacked.float())
        if self.start == "calibrated":
            hessian = damped(needed(f"{self.name} (start=calibrated)", stats).hessian, self.damping)
            start = VectorCodes(codes.long(), stacked.float(), scales.float())
            found = calibrated(weight, hessian, start, self.rounds)
            codes, stacked, scales = found.codes.to(torch.uint8), found.books.half(), found.scales.half()
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
        runs = summed(self.books.float(), self.codes[flat].flatten(0, 1))
        values = runs.view(len(flat), self.shape[1]) * self.scales.float()[flat, None]
        return values.view(*numbers.shape, self.shape[1])

    @property
    def has_native_form(self) -> bool:
        return self.native is not None or (
            self.codes.device.type == "cpu"
            and self.shape[1] > 0
            and self.shape[1] % BLOCK == 0
            and ops.has_native_matrices()
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
        runs = summed(self.number("books"), self.codes)
        return runs.view(self.shape) * self.number("scale")[:, None]

    @torch.no_grad()
    def nearest(self, target: Tensor, groups: Tensor) -> Tensor:
        scale = self._scale_of(groups)
        wanted = target / torch.where(scale == 0, 1.0, scale)
        books, present = self.number("books"), self.codes[groups]
        found = beam_search(wanted, books)
        errors = [
            (summed(books, codes) - wanted).square().sum(dim=1, keepdim=True) for codes in (found, present)
        ]
        return torch.where(errors[0] < errors[1], found, present)

    @torch.no_grad()
    def decoded(self, codes: Tensor, groups: Tensor) -> Tensor:
        return summed(self.number("books"), codes) * self._scale_of(groups)

    def _scale_of(self, groups: Tensor) -> Tensor:
        return self.number("scale")[groups // (self.shape[1] // self.width), None]

    @torch.no_grad()
    def packed(self) -> Additive:
        codes = self.codes.view(self.shape[0], -1, self.codes.shape[1]).clone()
        return Additive(
            self.shape, codes, half(self.number("books"), "Codebooks"), half(self.number("scale"), "Scales")
        )
