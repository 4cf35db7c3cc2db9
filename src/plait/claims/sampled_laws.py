"""Text drawn with every speculator from tables, whose exact law is known; and with mistakes that must be noticed.

The tables have one word more than is ever said, which stands for the placeholder of lexical units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from plait.claims.toy_laws import (
    TableReader,
    chi_square_of,
    counted,
    joint_law,
    random_table,
    spoken,
)
from plait.decode import Sampler, Sampling, Streams
from plait.decode.gumbel import top
from plait.decode.speculate import (
    LUD,
    PEARL,
    RSDC,
    RSDS,
    Chain,
    Context,
    PromptLookup,
    Speculator,
    TokenRecycling,
    Tree,
)
from plait.decode.speculate.draft_model import Children, DraftModelSpeculator, Level
from plait.decode.speculate.mix import Union

__all__ = ["LENGTH", "MISTAKES", "SPECULATORS", "fit", "fits", "law", "sampled"]

WORDS = 6
SIZE = WORDS + 1
LENGTH = 3
# The last two tokens count for the tables; that they stood there before is what a look-up finds.
_PROMPT = (0, 1, 2, 3, 0, 1)


def _table(seed: int) -> torch.Tensor:
    table = random_table(SIZE, seed)
    table[:, :, WORDS:] = -torch.inf
    return table


TARGET, DRAFT = _table(1), _table(2)
_MODEL: Any = SimpleNamespace(config=SimpleNamespace(vocab_size=SIZE, placeholder=WORDS))


def _reader() -> TableReader:
    return TableReader(DRAFT)


_recycler = TokenRecycling(k=4, nodes=12).for_model(_MODEL)

SPECULATORS: dict[str, Callable[[int], Speculator]] = {
    "prompt-lookup": lambda seed: PromptLookup(match=2, tokens=3, patience=0).build(),
    "token-recycling": lambda seed: _recycler(),
    "chain": lambda seed: Chain(tokens=3).guess_with(_reader()),
    "rsd-c": lambda seed: RSDC(branch=(2, 2)).guess_with(_reader()),
    "rsd-s": lambda seed: RSDS(width=3, depth=3).guess_with(_reader()),
    "with-replacement": lambda seed: _Independent(seed, drops=False),
    "pearl": lambda seed: PEARL(gamma=2).guess_with(_reader()),
    "lud": lambda seed: LUD(pads=2, beta=0.2).for_model(_MODEL)(),
    "mix": lambda seed: Union([_recycler(), RSDS(width=2, depth=2).guess_with(_reader())]),
}
"""What makes each speculator, for a seed; `with-replacement` draws siblings independently of each other."""


class _Independent(DraftModelSpeculator):
    """Five draws with replacement from the root's law, and one below each, by a draft that is surer than it should be.

    Args:
        seed: of the draws.
        drops: whether a draw that repeats one is left out, which is a mistake.
    """

    def __init__(self, seed: int, *, drops: bool) -> None:
        super().__init__(TableReader(3 * DRAFT), 2)
        self.random = np.random.default_rng(seed)
        self.drops = drops

    def grow(self, level: Level) -> Children:
        found: Children = []
        for node, row in enumerate(level.log_laws):
            draws = self.random.choice(SIZE, 1 if level.depth else 5, p=np.exp(row)).tolist()
            found += [(node, token) for token in (dict.fromkeys(draws) if self.drops else draws)]
        return found

    def propose(self, context: Context) -> Tree:
        return replace(super().propose(context), replacement=True)


class _Mistaken(DraftModelSpeculator):
    """Grows the tree of another method, and spoils each level."""

    def __init__(self, inner: DraftModelSpeculator, spoil: Callable[[Level, Children], Children]) -> None:
        super().__init__(inner.reader, inner.depth)
        self.inner, self.spoil = inner, spoil

    def grow(self, level: Level) -> Children:
        return self.spoil(level, self.inner.grow(level))


def _branching(spoil: Callable[[Level, Children], Children]) -> Speculator:
    return _Mistaken(RSDC(branch=(3, 2)).guess_with(_reader()), spoil)


def _sorted(level: Level, children: Children) -> Children:
    return sorted(children, key=lambda child: (child[0], level.log_laws[child]))


def _without_unlikely(level: Level, children: Children) -> Children:
    return [child for child in children if level.log_laws[child] > np.log(0.2)]


def _likeliest(level: Level, children: Children) -> Children:
    return [(node, int(token)) for node, row in enumerate(level.log_laws) for token in top(row, 2)]


class _CutByProbability(DraftModelSpeculator):
    """Stochastic beam search that keeps the likeliest sequences, and not those with the best perturbed scores."""

    def __init__(self) -> None:
        self.beam: Any = RSDS(width=16, depth=2).guess_with(_reader())
        super().__init__(self.beam.reader, self.beam.depth)

    def grow(self, level: Level) -> Children:
        children: Children = self.beam.grow(level)
        kept = np.sort(np.argsort(-self.beam.phi, kind="stable")[:3])
        self.beam.phi, self.beam.psi = self.beam.phi[kept], self.beam.psi[kept]
        return [children[place] for place in kept]


class _SharedStreams(Streams):
    """Uniforms of which each is used at two positions, as in the published program of PEARL."""

    def uniform(self, position: int, round: int = 0, purpose: str = "verify") -> float:
        return super().uniform(position // 2, 0, purpose)


MISTAKES: dict[str, Callable[[int], Speculator]] = {
    "likeliest-declared-as-drawn": lambda seed: _branching(_likeliest),
    "siblings-sorted": lambda seed: _branching(_sorted),
    "unlikely-draws-dropped": lambda seed: _branching(_without_unlikely),
    "duplicates-dropped": lambda seed: _Independent(seed, drops=True),
    "beam-cut-by-probability": lambda seed: _CutByProbability(),
    "uniforms-used-twice": SPECULATORS["chain"],
}
"""Speculators that declare their draws falsely, or whose numbers are used twice; see `_SharedStreams`."""


def law() -> npt.NDArray[np.float64]:
    """The exact law of the next tokens, (SIZE,) * LENGTH."""
    return joint_law(TARGET, Sampling(), LENGTH, _PROMPT)


def sampled(name: str, first: int, count: int) -> npt.NDArray[np.float64]:
    """How often each continuation came with a speculator, or a mistake, and `count` seeds from `first` on."""
    make = SPECULATORS.get(name) or MISTAKES[name]

    def outcomes() -> Iterator[tuple[int, ...]]:
        for seed in range(first, first + count):
            sampler = Sampler(Sampling(seed=seed), SIZE)
            if name == "uniforms-used-twice":
                sampler.streams = _SharedStreams(seed)
            yield spoken(TARGET, sampler, make(seed), LENGTH, prompt=_PROMPT)[0]

    return counted(outcomes(), (SIZE,) * LENGTH)


def fit(name: str, count: int) -> float:
    """Probability of counts as unlikely as those of `count` continuations, if they have the law."""
    return chi_square_of(sampled(name, 0, count), law())


def fits(counts: dict[str, int], processes: int, piece: int = 5000) -> Iterator[tuple[str, float]]:
    """`fit` of many, each with its own count, in pieces by several processes; a name and its fit as each is done."""
    exact = law()
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        waiting = {
            pool.submit(sampled, name, first, min(piece, count - first)): name
            for name, count in counts.items()
            for first in range(0, count, piece)
        }
        left = {name: -(-count // piece) for name, count in counts.items()}
        found = {name: np.zeros_like(exact) for name in counts}
        for future in as_completed(waiting):
            name = waiting[future]
            found[name] += future.result()
            left[name] -= 1
            if not left[name]:
                yield name, chi_square_of(found[name], exact)
