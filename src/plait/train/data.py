"""Token data: documents of ids, and packed batches of them in an order that a seed decides.

Shapes: N tokens of all documents, T tokens of a piece.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from plait.errors import ConfigError, ModelFileError
from plait.files import replacing

__all__ = ["Batches", "Piece", "TokenData"]


class Piece(NamedTuple):
    """A run of tokens of one document.

    Attributes:
        ids: (T,) int64.
        weights: (T,) fp32, how much the prediction of each token counts; that of the first is not made.
        notes: more about each token, by name, (T, ...).
    """

    ids: Tensor
    weights: Tensor
    notes: dict[str, Tensor]


@dataclass
class TokenData:
    """Documents side by side.

    Args:
        ids: (N,) int64.
        lengths: tokens of each document.
        weights: (N,) fp32; ones when left out.
        notes: what an objective wants to know about each token, by name, (N, ...).

    Raises:
        ConfigError: lengths that do not add up.
    """

    ids: Tensor
    lengths: list[int]
    weights: Tensor = field(default_factory=lambda: torch.ones(0))
    notes: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.weights):
            self.weights = torch.ones(len(self.ids))
        counts = {sum(self.lengths), len(self.ids), len(self.weights), *map(len, self.notes.values())}
        if len(counts) != 1:
            raise ConfigError(
                f"TokenData needs one weight and one note a token. Got lengths {sorted(counts)}."
            )

    @classmethod
    def of(cls, documents: Sequence[Sequence[int]]) -> TokenData:
        """From lists of ids."""
        return cls(
            torch.tensor([token for document in documents for token in document], dtype=torch.int64),
            [len(document) for document in documents],
        )

    def __len__(self) -> int:
        return len(self.ids)

    def starts(self) -> list[int]:
        """Where each document starts."""
        return [0, *torch.tensor(self.lengths).cumsum(0).tolist()][:-1] if self.lengths else []

    def piece(self, start: int, stop: int) -> Piece:
        """Tokens [start, stop), which must be of one document."""
        run = slice(start, stop)
        return Piece(self.ids[run], self.weights[run], {name: note[run] for name, note in self.notes.items()})

    def pieces(self, context: int) -> list[tuple[int, int]]:
        """Every document in runs of at most `context` tokens, as (start, stop)."""
        return [
            (first, min(first + context, start + length))
            for start, length in zip(self.starts(), self.lengths, strict=True)
            for first in range(start, start + length, context)
        ]

    def first(self, count: int) -> TokenData:
        """The first `count` tokens, or all of them."""
        lengths: list[int] = []
        for length in self.lengths:
            if left := count - sum(lengths):
                lengths.append(min(length, left))
        run = slice(sum(lengths))
        notes = {name: note[run] for name, note in self.notes.items()}
        return TokenData(self.ids[run], lengths, self.weights[run], notes)

    def counting_all(self) -> TokenData:
        """The same documents with every token of weight 1."""
        return TokenData(self.ids, self.lengths, notes=self.notes)

    def with_notes(self, notes: Mapping[str, Tensor]) -> TokenData:
        """The same documents with more notes."""
        return TokenData(self.ids, self.lengths, self.weights, {**self.notes, **notes})

    def fingerprint(self) -> str:
        """A digest of everything; the same for the same data only."""
        digest = hashlib.sha256(json.dumps(self.lengths).encode())
        for name, tensor in sorted({"ids": self.ids, "weights": self.weights, **self.notes}.items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write to a safetensors file, which is replaced whole."""
        tensors = {"ids": self.ids, "weights": self.weights, "lengths": torch.tensor(self.lengths)}
        tensors |= {f"notes.{name}": note.contiguous() for name, note in self.notes.items()}
        with replacing(path) as beside:
            save_file(tensors, beside)

    @classmethod
    def load(cls, path: Path) -> TokenData:
        """Read what `save` wrote.

        Raises:
            ModelFileError: the file is missing, damaged, or of another kind.
        """
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(
                tensors.pop("ids"),
                tensors.pop("lengths").tolist(),
                tensors.pop("weights"),
                {name.removeprefix("notes."): note for name, note in tensors.items()},
            )
        except (SafetensorError, OSError, KeyError, ConfigError) as error:
            raise ModelFileError(
                f"{path} holds no token data ({error}). Start the run again in another folder."
            ) from error


class Batches:
    """Packed batches: the pieces of an epoch in a random order, cut into runs of exactly `rows` tokens.

    A piece that crosses the border of a batch is cut there, so no row is padding. What is left at the end
    of an epoch is left out of it. A batch is a function of its number, so a run is resumed by counting.

    Args:
        data: at least `rows` tokens.
        rows: tokens of a batch.
        context: longest piece.
        seed: of the order; every epoch has another one.

    Raises:
        ConfigError: there are fewer tokens than rows.
    """

    def __init__(self, data: TokenData, *, rows: int, context: int, seed: int) -> None:
        if len(data) < rows:
            raise ConfigError(
                f"A batch of {rows} tokens needs as many. The data has {len(data)}; give more text or fewer rows."
            )
        self.data, self.rows, self.seed = data, rows, seed
        self.pieces = torch.tensor(data.pieces(context), dtype=torch.int64)
        self.per_epoch = len(data) // rows
        self._epoch = -1
        self._order = self._ends = torch.zeros(0, dtype=torch.int64)

    def __getitem__(self, number: int) -> list[Piece]:
        epoch, place = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = torch.randperm(len(self.pieces), generator=generator)
            chosen = self.pieces[self._order]
            self._ends = (chosen[:, 1] - chosen[:, 0]).cumsum(0)
            self._epoch = epoch
        low, high = place * self.rows, (place + 1) * self.rows
        index = int(torch.searchsorted(self._ends, low, right=True))
        batch = []
        while low < high:
            stop = int(self.pieces[self._order[index], 1])
            end = int(self._ends[index])
            first = stop - (end - low)
            last = min(stop, first + high - low)
            batch.append(self.data.piece(first, last))
            low += last - first
            index += 1
        return batch
