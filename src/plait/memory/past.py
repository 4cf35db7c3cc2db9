"""Everything one sequence remembers: a memory or a state for each layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from plait.errors import ConfigError, IncompatibleError
from plait.memory.memory import Memory
from plait.memory.state import State
from plait.memory.strand import HoldsTensors, allocated_bytes

__all__ = ["Past"]


class Past:
    """The past of one sequence, layer by layer.

    A refused call changes no layer.

    Args:
        layers: one memory or state for each layer of the model, all of one length.
        adapter: what the model was changed by when it computed this, and is whenever it goes on from here; None
            for the model as it is.
    """

    def __init__(self, layers: Sequence[Memory | State], adapter: object | None = None) -> None:
        self.layers = list(layers)
        self.adapter = adapter
        for number, layer in enumerate(self.layers):
            if isinstance(layer, Memory):
                layer.layer = number

    def __len__(self) -> int:
        """Position of the next token."""
        return len(self.layers[0])

    @property
    def is_shareable(self) -> bool:
        """Whether other sequences may begin with strands of this one; a recurrent state has none."""
        return all(isinstance(layer, Memory) and layer.plan.is_shareable for layer in self.layers)

    def commit(self, path: Sequence[int] | Tensor | None = None, *, is_prompt: bool = False) -> None:
        """Make the rows of the last forward pass part of the past; see `Memory.commit`.

        Raises:
            ConfigError: the rows do not follow each other, and nothing changed; or the codec cannot store
                the numbers of a layer, such as NaN. The rows are part of the past of all layers then, in
                that one as plain numbers.
        """
        for layer in self.layers:
            layer.check_commit(path)
        refused = None
        for index, layer in enumerate(self.layers):
            try:
                layer.commit(path, is_prompt=is_prompt)
            except ConfigError as error:
                refused = refused or ConfigError(f"Layer {index}: {error}")
        if refused is not None:
            raise refused

    def rows_at_once(self, least: int, most: int) -> int:
        """How many pending rows may be committed together, so that the past is that of committing one by one.

        A codec stores tokens at places of the sequence that do not depend on how many rows a step commits
        (`Codec.rows_at_once`), so that a draft changes what an answer costs and never the answer.

        Args:
            least: rows that are committed in any case, such as those of a prompt.
            most: rows that are to be committed.
        """
        if least >= most:
            return most
        memories = (layer for layer in self.layers if isinstance(layer, Memory))
        return min((memory.rows_at_once(least, most) for memory in memories), default=most)

    def truncate(self, length: int) -> None:
        """Forget every token at position `length` or later; see `Memory.truncate`."""
        for layer in self.layers:
            layer.check_truncate(length)
        for layer in self.layers:
            layer.truncate(length)

    def fork(self) -> Past:
        """A second past that shares what is stored; writing to one does not change the other."""
        return Past([layer.fork() for layer in self.layers], self.adapter)

    def growth(self, count: int) -> int:
        """Bytes that `count` more rows would allocate, before codec and policy store or drop any.

        A state is kept twice while rows are pending, so it grows by itself.
        """
        return sum(
            layer.growth(count) if isinstance(layer, Memory) else layer.nbytes() for layer in self.layers
        )

    def splice(self, source: Past, start: int, stop: int, *, materialise: bool = False) -> None:
        """Append tokens [start, stop) of another past, moved behind the last one; see `Memory.splice`.

        Raises:
            ConfigError: `source` is of another model, or does not hold those tokens.
            IncompatibleError: a layer keeps a recurrent state, which holds no tokens to be moved.
        """
        if len(self.layers) != len(source.layers):
            raise ConfigError(
                f"splice takes a past of the same model. Got {len(source.layers)} layers for {len(self.layers)}."
            )
        pairs = list(zip(self.memories("moved"), source.memories("moved"), strict=True))
        for ours, theirs in pairs:
            ours.check_splice(theirs, start, stop)
        for ours, theirs in pairs:
            ours.splice(theirs, start, stop, materialise=materialise)

    def memories(self, what: str) -> list[Memory]:
        """The memory of every layer, for a use in which tokens are `what`, such as "moved".

        Raises:
            IncompatibleError: a layer keeps a recurrent state instead.
        """
        found = []
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, Memory):
                raise IncompatibleError(
                    f"Layer {index} keeps a recurrent state ({type(layer).__name__}), from which no token can be "
                    f"{what}. Read the text again instead."
                )
            found.append(layer)
        return found

    def nbytes(self) -> int:
        """Bytes allocated over all layers; strands shared between pasts count in each."""
        parts: list[HoldsTensors] = []
        for layer in self.layers:
            if isinstance(layer, Memory):
                parts += [*layer.held(), *layer.notes]
        states = sum(layer.nbytes() for layer in self.layers if not isinstance(layer, Memory))
        return allocated_bytes(parts) + states
