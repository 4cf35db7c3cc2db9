"""Contexts that are read apart and used together: reading them, keeping them, and fitting their weight.

APE, adaptive parallel encoding: Yang, Chen, Chen 2025, arXiv:2502.05431; the attention is
`plait.memory.arrangements.ParallelGroup`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import Field

from plait.engine.context_store import Context, ContextKey, ContextStore, fingerprint
from plait.engine.prefill import read_packed
from plait.errors import ConfigError
from plait.memory import Past, Strand
from plait.spec import Spec

if TYPE_CHECKING:
    from plait.engine.language_model import LanguageModel

__all__ = ["APE", "ContextReport", "ParallelExample", "read_contexts"]

Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ContextReport(NamedTuple):
    """Tokens of contexts that the model read, and tokens that were taken from a store."""

    encoded: int
    cached: int


class ParallelExample(NamedTuple):
    """What parallel contexts are fitted on: texts, a question about them and its right answer."""

    prefix: str
    contexts: Sequence[str]
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class APE(Spec):
    """How contexts that are read in parallel are weighted.

    The best values depend on the model and on what is asked, so fit them; the defaults are those of the
    authors' demonstration. With 1 and 1 the contexts are weighted as if they had been read one after the other.

    Args:
        temperature: of attention within the contexts. Below 1 it is sharper.
        scale: on the contexts' share of attention. Below 1 they weigh less.
    """

    temperature: Above0 = 0.9
    scale: Above0 = 0.9

    @classmethod
    def fit(
        cls,
        lm: LanguageModel,
        examples: Sequence[ParallelExample],
        *,
        temperatures: Sequence[float] = (1.0, 0.9, 0.8, 0.7),
        scales: Sequence[float] = (1.0, 0.9, 0.8),
        store: ContextStore | None = None,
    ) -> APE:
        """The setting of a grid under which right answers are likeliest, as a mean over their tokens.

        Every context is read once; each setting then costs the reading of questions and answers.

        Raises:
            ConfigError: no example, or an empty grid.
        """
        grid = [cls(temperature=t, scale=s) for t, s in product(temperatures, scales)]
        if not examples or not grid:
            raise ConfigError("APE.fit takes at least one example, one temperature and one scale.")
        nats = [0.0] * len(grid)
        for example in examples:
            with lm.session() as session:
                session.read_parallel(
                    example.contexts, prefix=example.prefix, temperature=1.0, scale=1.0, store=store
                )
                for place, setting in enumerate(grid):
                    (twin,) = session.fork()
                    twin.weigh_parallel(temperature=setting.temperature, scale=setting.scale)
                    twin.read(example.question)
                    score = twin.score(example.answer)
                    nats[place] += score.nats / score.tokens
        return grid[min(range(len(grid)), key=nats.__getitem__)]


def read_contexts(
    lm: LanguageModel,
    prefix: Sequence[int],
    past: Past,
    contexts: Sequence[Sequence[int]],
    store: ContextStore | None,
) -> tuple[list[Context], ContextReport]:
    """The strands of contexts, each read with only the prefix in view; those not in the store side by side.

    Args:
        prefix: tokens, all of which `past` holds.
        contexts: token ids, each at least one.
    """
    memories = past.memories("read in parallel")
    found: dict[tuple[int, ...], Context | None] = dict.fromkeys(tuple(ids) for ids in contexts)
    keys = {
        ids: ContextKey("" if store is None else fingerprint(lm.model), str(lm.plan), tuple(prefix), ids)
        for ids in found
    }
    if store is not None:
        heads = [memory.heads for memory in memories]
        found = {ids: store.get(key, heads) for ids, key in keys.items()}
    missing = [ids for ids, context in found.items() if context is None]
    twins = [past.fork() for _ in missing]
    for twin in twins:
        for memory in twin.memories("read in parallel"):
            memory.set_apart()
    read_packed(lm.model, [[*prefix, *ids] for ids in missing], twins)
    for ids, twin in zip(missing, twins, strict=True):
        layers: list[list[Strand]] = []
        for memory in twin.memories("read in parallel"):
            memory.freeze()
            layers.append([piece.copied() for piece in memory.pieces(len(prefix), len(memory))])
        found[ids] = Context(layers)
        if store is not None:
            store.put(keys[ids], Context(layers))
    encoded = sum(len(ids) for ids in missing)
    total = sum(len(ids) for ids in found)
    chosen = [context for ids in contexts if (context := found[tuple(ids)]) is not None]
    return chosen, ContextReport(encoded, total - encoded)
