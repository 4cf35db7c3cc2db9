"""One decoder for every family: blocks of a mixer and a feed-forward, described by a configuration.

Shapes: N packed rows, W width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, cast

import torch
from torch import Tensor, nn

from plait.errors import CapacityError, ConfigError, IncompatibleError
from plait.memory import Causal, Memory, MemoryPlan, Past, Rows, State, Turn, in_order, turns_of
from plait.nn.config import BlockConfig, NormConfig, TransformerConfig
from plait.nn.layers import FeedForward, Norm
from plait.nn.parameters import Parameters
from plait.nn.routing import Routed, routed
from plait.ops import capped
from plait.weights import Embedding, Linear

if TYPE_CHECKING:
    from plait.nn.adapters import Adapter
    from plait.nn.elastic import ElasticWeights

__all__ = ["Block", "Transformer"]


class Block(nn.Module):
    """A mixer and a feed-forward, each added to the row it read."""

    def __init__(self, config: BlockConfig, width: int, norm: NormConfig, parameters: Parameters) -> None:
        super().__init__()
        self.norms = config.norms
        self.mixer = config.mixer.build(width, norm, parameters.under("mixer"))
        self.feed_forward = FeedForward(config.feed_forward, width, parameters.under("feed_forward"))

        def norm_at(place: str, used: bool) -> nn.Module:
            return Norm(norm, width, parameters.under(place)) if used else nn.Identity()

        self.mixer_norm = norm_at("mixer_norm", config.norms != "post")
        self.feed_forward_norm = norm_at("feed_forward_norm", config.norms != "post")
        self.mixer_output_norm = norm_at("mixer_output_norm", config.norms != "pre")
        self.feed_forward_output_norm = norm_at("feed_forward_output_norm", config.norms != "pre")

    def forward(self, x: Tensor, rows: Rows, past: Sequence[Memory | State] | None) -> Tensor:
        if self.norms == "post":
            x = self.mixer_output_norm(x + self.mixer(x, rows, past))
            return self.feed_forward_output_norm(x + self.feed_forward(x))
        x = x + self.mixer_output_norm(self.mixer(self.mixer_norm(x), rows, past))
        return x + self.feed_forward_output_norm(self.feed_forward(self.feed_forward_norm(x)))


class Program(Protocol):
    """Another way to compute what a model computes, such as one native call for all layers."""

    def __call__(
        self,
        tokens: Tensor | None,
        rows: Rows,
        pasts: Sequence[Past],
        *,
        embeddings: Tensor | None = None,
        wanted: Tensor | None = None,
        with_logits: bool = False,
    ) -> tuple[Tensor, Tensor | None] | None:
        """Hidden rows and, if asked for, their logits; of the wanted rows only, or of all of them.

        None where this form does not apply to the pasts; nothing is written then.
        """
        ...

    def of(self, model: Transformer) -> Program:
        """The same form of another model of the same kind, such as a copy."""
        ...


class Transformer(nn.Module):
    """A decoder: token ids in, a hidden row for each token out, logits on request.

    Args:
        config: the model as data.
        parameters: where its parameters come from.

    Attributes:
        program: a faster form of the whole model, used where it applies; see `plait.nn.lower`.
        elastic: what changes the size of its matrices, where they are stacks of blocks.
        learns_through: a differentiable plan; the parallel form reads every segment through a memory of it. None
            for full attention.
    """

    def __init__(self, config: TransformerConfig, parameters: Parameters) -> None:
        super().__init__()
        self.config = config
        inner = config.embedding_width or config.width
        embedding = parameters.matrix(["embedding.weight"], inner, [config.vocab_size])
        self.embedding = Embedding(embedding)
        self.positions = (
            Embedding(parameters.matrix(["positions.weight"], config.width, [config.learned_positions]))
            if config.learned_positions
            else None
        )
        projected = config.embedding_width is not None
        self.project_in = (
            parameters.linear(["project_in"], inner, [config.width], False) if projected else None
        )
        self.blocks = nn.ModuleList(
            Block(block, config.width, config.norm, parameters.under(f"blocks.{index}"))
            for index, block in enumerate(config.blocks)
        )
        self.norm = (
            Norm(config.norm, config.width, parameters.under("norm")) if config.final_norm else nn.Identity()
        )
        self.project_out = (
            parameters.linear(["project_out"], config.width, [inner], False) if projected else None
        )
        head = (
            embedding if config.tied_head else parameters.matrix(["head.weight"], inner, [config.vocab_size])
        )
        bias = parameters.vector(["head.bias"], [config.vocab_size]) if config.head_bias else None
        self.head = Linear(head, bias)
        self.program: Program | None = None
        self.elastic: ElasticWeights | None = None
        self.learns_through: MemoryPlan | None = None
        self._active: list[Adapter | None] = [None]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__ | {"program": None}, memo))
        # A program reads the matrices of its own model.
        twin.program = None if self.program is None else self.program.of(twin)
        return twin

    @property
    def guard(self) -> contextlib.AbstractContextManager[Any]:
        """What to hold while the model computes, so that its size does not change in between."""
        return contextlib.nullcontext() if self.elastic is None else self.elastic.guard

    def resizable(self) -> ElasticWeights:
        """What changes the size of this model while it runs.

        Raises:
            IncompatibleError: it was not read from a stack of blocks.
        """
        if self.elastic is None:
            raise IncompatibleError(
                "This model was not read from a stack of blocks, so its size is fixed. Make a folder with "
                "plait quantize --format bitstack, and load that."
            )
        return self.elastic

    @property
    def adapter(self) -> Adapter | None:
        """The adapter of new pasts and of the parallel form; None for none."""
        return self._active[0]

    def use(self, adapter: Adapter | None) -> None:
        """Let an adapter change this model from now on; pasts that there are keep theirs.

        Raises:
            IncompatibleError: it was made for another model.
        """
        if adapter is not None:
            adapter.check_model(self)
        # In a list, so that it does not become a part of the model.
        self._active = [adapter]

    def new_past(self, plan: MemoryPlan, adapter: Adapter | Literal["own"] | None = "own") -> Past:
        """An empty past for one sequence.

        Args:
            adapter: what changes the model for this sequence; that of the model when left out.

        Raises:
            IncompatibleError: the plan's policy limits distances, which this model does not use.
        """
        if self.positions is not None and plan.policy.max_distance is not None:
            raise IncompatibleError(
                f"{plan.policy} limits distances between tokens, but this model learned a row for each of "
                f"{self.config.learned_positions} positions. Choose memory='full' or 'window'."
            )
        chosen = self.adapter if adapter == "own" else adapter
        past = Past([block.mixer.new_memory(plan) for block in self._blocks()], chosen)
        if chosen is not None:
            chosen.begin(self, past)
        return past

    def with_blocks(self, indices: Sequence[int]) -> Transformer:
        """A shallower model of some of the blocks, in order; parameters are shared, not copied.

        It has no `program`; `plait.nn.lower` may give it one.

        Raises:
            ConfigError: no block, one that does not exist, or blocks out of order.
        """
        count = len(self.blocks)
        if not indices or any(not 0 <= index < count for index in indices):
            raise ConfigError(f"with_blocks takes indices of the {count} blocks. Got {list(indices)}.")
        if any(second <= first for first, second in pairwise(indices)):
            raise ConfigError(f"with_blocks takes increasing indices. Got {list(indices)}.")
        twin = copy.copy(self)
        # A module's children are held in this table; the copy must not change those of the original.
        twin._modules = dict(self._modules)
        twin.blocks = nn.ModuleList(self.blocks[index] for index in indices)
        twin.config = dataclasses.replace(
            self.config, blocks=tuple(self.config.blocks[index] for index in indices)
        )
        twin.program, twin.learns_through, twin._active = None, None, [None]
        return twin

    def embed(self, tokens: Tensor) -> Tensor:
        """Embedding rows of token ids (N,), scaled as the model expects: (N, embedding width).

        Raises:
            ConfigError: an id is outside the vocabulary.
        """
        self._check_ids(tokens)
        x = self.embedding(tokens).float()
        return x if self.config.embedding_scale == 1.0 else x * self.config.embedding_scale

    def _check_ids(self, tokens: Tensor) -> None:
        low, high = map(int, tokens.aminmax()) if tokens.numel() else (0, 0)
        if not 0 <= low <= high < self.config.vocab_size:
            bad = tokens[(tokens < 0) | (tokens >= self.config.vocab_size)][0]
            raise ConfigError(f"Token ids must be in [0, {self.config.vocab_size}). Got {int(bad)}.")

    def forward(
        self,
        tokens: Tensor | None,
        rows: Rows,
        pasts: Sequence[Past] | None = None,
        *,
        embeddings: Tensor | None = None,
    ) -> Tensor:
        """Hidden rows of packed tokens.

        Args:
            tokens: (N,) int64 ids; None when `embeddings` is given.
            rows: which segment and position each row belongs to.
            pasts: what each segment remembers; the rows are added to it as pending (`Past.commit`).
                None for the parallel form, in which a segment sees only itself and gradients flow; see
                `learns_through`.
            embeddings: (N, embedding width) rows to use in place of `embed(tokens)`.

        Returns:
            (N, W) fp32, normalised as the output head expects.

        Raises:
            ConfigError: an id is outside the vocabulary, or there are more or fewer tokens than rows.
            CapacityError: a position lies behind the end of a learned position table.
            IncompatibleError: an adapter or a mixer has no gradient through memories.
        """
        with self.guard:
            turns = self._turns(rows, pasts)
            if not turns or pasts is None:
                return self._hidden(tokens, rows, pasts, embeddings)
            # Nothing may be written when a later turn would be refused.
            given = _given(tokens, embeddings, rows)
            if given is tokens:
                self._check_ids(given)
            parts = [
                self._hidden(
                    None if tokens is None else tokens[turn.chosen],
                    turn.rows,
                    [pasts[index] for index in turn.segments],
                    None if embeddings is None else embeddings[turn.chosen],
                )
                for turn in turns
            ]
            return in_order(turns, parts)

    def _turns(self, rows: Rows, pasts: Sequence[Past] | None) -> list[Turn]:
        """The calls of a program in which policies have runs of rows attended, one after the other; none for one call."""
        if self.program is None or pasts is None or len(pasts) != len(rows.segments):
            return []
        runs = []
        for segment, past in zip(rows.segments, pasts, strict=True):
            first = past.layers[0]
            whole = [range(segment.length)]
            runs.append(first.plan.policy.runs(segment) if isinstance(first, Memory) else whole)
        return turns_of(rows, runs) if any(len(of_segment) > 1 for of_segment in runs) else []

    def _hidden(
        self, tokens: Tensor | None, rows: Rows, pasts: Sequence[Past] | None, embeddings: Tensor | None
    ) -> Tensor:
        if pasts is None and self.learns_through is not None:
            pasts = [self.new_past(self.learns_through) for _ in rows.segments]
        found = self._by_program(tokens, rows, pasts, embeddings=embeddings)
        if found is not None:
            return found[0]
        given = _given(tokens, embeddings, rows)
        if embeddings is None:
            embeddings = self.embed(given)
        if pasts is None and self.adapter is not None and (prompt := self.adapter.prompt()) is not None:
            return self._behind_prompt(prompt, embeddings, rows)
        return self._through_blocks(embeddings, rows, pasts)

    def _behind_prompt(self, prompt: Tensor, embeddings: Tensor, rows: Rows) -> Tensor:
        """The parallel form with learned rows (L, W) before every segment, which are read and not answered for."""
        length = len(prompt)
        if any(segment.position or not isinstance(segment.mask, Causal) for segment in rows.segments):
            raise IncompatibleError(
                "The adapter in use puts rows before a text, which needs causal texts from their first token on here. "
                "Use another kind of adapter."
            )
        pieces = [torch.cat([prompt, embeddings[segment.rows]]) for segment in rows.segments]
        longer = Rows([(segment.length + length, 0) for segment in rows.segments], rows.device)
        kept = [
            torch.arange(segment.start + length, segment.start + segment.length)
            for segment in longer.segments
        ]
        return self._through_blocks(torch.cat(pieces), longer, None)[torch.cat(kept)]

    def _through_blocks(self, embeddings: Tensor, rows: Rows, pasts: Sequence[Past] | None) -> Tensor:
        x = self.enter(embeddings, rows)
        adapters = [self.adapter] * len(rows.segments) if pasts is None else [past.adapter for past in pasts]
        with routed(rows, cast("list[Routed | None]", adapters)):
            for index, block in enumerate(self._blocks()):
                x = block(x, rows, None if pasts is None else [past.layers[index] for past in pasts])
        x = self.norm(x)
        return x if self.project_out is None else self.project_out(x)

    def enter(self, embeddings: Tensor, rows: Rows) -> Tensor:
        """Rows as the first block reads them, (N, W), from embedding rows (N, embedding width)."""
        x = embeddings if self.project_in is None else self.project_in(embeddings)
        return x if self.positions is None else x + self._learned_positions(rows)

    def answer(
        self, tokens: Tensor, rows: Rows, pasts: Sequence[Past] | None = None, *, wanted: Tensor
    ) -> Tensor:
        """Logits of some of the packed rows: `logits(forward(...)[wanted])`, in one call where that is faster.

        Args:
            wanted: (R,) int64 row numbers.

        Returns:
            (R, V) fp32.
        """
        with self.guard:
            if not self._turns(rows, pasts):
                found = self._by_program(tokens, rows, pasts, wanted=wanted, with_logits=True)
                if found is not None and found[1] is not None:
                    return found[1]
            return self.logits(self(tokens, rows, pasts)[wanted])

    def _by_program(
        self, tokens: Tensor | None, rows: Rows, pasts: Sequence[Past] | None, **options: Any
    ) -> tuple[Tensor, Tensor | None] | None:
        if self.program is None or pasts is None:
            return None
        return self.program(tokens, rows, pasts, **options)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token id for hidden rows (N, W): (N, V) fp32."""
        return self.finish(self.head(hidden))

    def finish(self, logits: Tensor) -> Tensor:
        """Scale and cap what the output head gave, as the model was trained."""
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        logits = capped(logits, self.config.logit_softcap)
        if self.config.placeholder is not None:
            at = torch.tensor([self.config.placeholder], device=logits.device)
            logits = logits.index_fill(-1, at, -torch.inf)
        return logits

    def _learned_positions(self, rows: Rows) -> Tensor:
        assert self.positions is not None
        table = self.positions.weight.shape[0] - self.config.position_shift
        last = int(rows.positions.max()) + 1 if len(rows) else 0
        if last > table:
            raise CapacityError(
                f"The model has learned positions for {table} tokens. The sequence would reach {last}; shorten it."
            )
        return self.positions(rows.positions + self.config.position_shift).float()

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]


def _given(tokens: Tensor | None, embeddings: Tensor | None, rows: Rows) -> Tensor:
    """What the rows are made of, one for each."""
    given = tokens if embeddings is None else embeddings
    if given is None:
        raise ConfigError("Transformer needs tokens or embeddings. Got neither.")
    if len(given) != len(rows):
        raise ConfigError(f"Each token needs one row. Got {len(given)} for {len(rows)} rows.")
    return given
