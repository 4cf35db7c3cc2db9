"""A whole packed model on calibration text, for formats that ask what each matrix is worth.

Shapes: N tokens of all texts together, W width, O outputs and I inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from plait.memory import Rows
from plait.nn.transformer import Block, Transformer
from plait.weights import Linear, Packed

__all__ = ["PackedRun"]


class PackedRun:
    """A `plait.weights.ModelRun`; blocks are made when they are first asked for.

    Slopes of the loss are found from the last block to the first, each run again, so that the dense form of one
    block is in memory at a time.

    Args:
        shell: the model without its blocks.
        make: the blocks, in order, and what each of their linear layers is made of, by name.
        texts: token ids, at least two in each.
    """

    def __init__(
        self,
        shell: Transformer,
        make: Callable[[], tuple[Sequence[Block], Mapping[Linear, Sequence[str]]]],
        texts: Sequence[Tensor],
    ) -> None:
        self.shell, self._make = shell, make
        self.texts = [text for text in texts if len(text) > 1]
        self.rows = Rows([(len(text), 0) for text in self.texts])
        self._streams: list[Tensor] = []

    @cached_property
    def _made(self) -> tuple[Sequence[Block], Mapping[Linear, Sequence[str]]]:
        return self._make()

    @cached_property
    def matrices(self) -> Mapping[str, Packed]:
        return {
            name: piece
            for linear, names in self._made[1].items()
            for name, piece in zip(names, linear.weight.pieces(), strict=True)
        }

    @torch.no_grad()
    def loss(self, changed: str | None = None) -> float:
        blocks = self._made[0]
        first = 0 if changed is None else int(changed.split(".")[1])
        if changed is None:
            self._streams = [self.shell.enter(self.shell.embed(torch.cat(self.texts)), self.rows)]
        x = self._streams[first]
        for block in blocks[first:]:
            x = block(x, self.rows, None)
            if changed is None:
                self._streams.append(x)
        return float(self._nats(x))

    def sensitivity(self) -> dict[str, tuple[Tensor, Tensor]]:
        blocks, linears = self._made
        self.loss()
        found: dict[str, tuple[Tensor, Tensor]] = {}
        with torch.enable_grad():
            x = self._streams[-1].detach().requires_grad_()
            (slope,) = torch.autograd.grad(self._nats(x) * self._predicted, x)
            for block, stream in zip(reversed(blocks), reversed(self._streams[:-1]), strict=True):
                slope = self._through(block, stream, slope, linears, found)
        return {name: found[name] for name in self.matrices if name in found}

    def _through(
        self,
        block: Block,
        stream: Tensor,
        slope: Tensor,
        linears: Mapping[Linear, Sequence[str]],
        found: dict[str, tuple[Tensor, Tensor]],
    ) -> Tensor:
        """The slope in front of a block from that behind it; what its matrices see is added to `found`."""
        seen: dict[Linear, tuple[Tensor, Tensor]] = {}

        def keep(linear: torch.nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(linear, Linear)
            seen[linear] = (given[0].detach(), output)

        mine = [module for module in block.modules() if isinstance(module, Linear)]
        hooks = [linear.register_forward_hook(keep) for linear in mine]
        try:
            x = stream.detach().requires_grad_()
            y = block(x, self.rows, None)
        finally:
            for hook in hooks:
                hook.remove()
        outputs = [seen[linear][1] for linear in mine]
        before, *slopes = torch.autograd.grad(y, [x, *outputs], slope)
        for linear, of_output in zip(mine, slopes, strict=True):
            inputs = seen[linear][0].double().square().mean(dim=0)
            sizes = [piece.shape[0] for piece in linear.weight.pieces()]
            squares = of_output.double().square().sum(dim=0).split(sizes)
            found |= {name: (inputs, part) for name, part in zip(linears[linear], squares, strict=True)}
        return before

    @property
    def _predicted(self) -> int:
        return sum(len(text) - 1 for text in self.texts)

    def _nats(self, x: Tensor) -> Tensor:
        """Mean nats of the next token from rows behind the last block."""
        shell = self.shell
        hidden = shell.norm(x)
        hidden = hidden if shell.project_out is None else shell.project_out(hidden)
        total = hidden.new_zeros(())
        for segment, text in zip(self.rows.segments, self.texts, strict=True):
            logits = shell.logits(hidden[segment.rows][:-1])
            total = total + torch.nn.functional.cross_entropy(logits, text[1:], reduction="sum")
        return total / max(1, self._predicted)
