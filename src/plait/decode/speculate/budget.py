"""How many guesses are worth their rows: the budget of speculation, the same for every method.

A forward pass over n rows takes T(n), which on a processor soon grows with n. A guess that is reached with
probability r adds r tokens and one row. With B sequences in a pass, those guesses are scored that maximise

    (B + sum of r) / (T(rows) + time of drafting)

Down a tree r never grows, so for each number of guesses the likeliest ones form subtrees that hang together,
and the best number is found by trying all of them. Where that gains less than 2 % over plain decoding, nothing
is guessed. Times and probabilities are moving averages of what happened.

What guessing costs is all that plain decoding would not do: rows, drafting, choosing and learning; where a draft works
beside the pass, what the whole step takes longer. While guessing rests none of it is done.

What is scored may depend on anything for nodes that were not drawn. For drawn nodes it is settled before they
are drawn, by their place in the tree alone: a choice that looked at what was drawn would change the answer's law.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from plait.decode.speculate.base import Speculator
from plait.decode.speculate.tree import Context, Tree

__all__ = ["Account", "DraftBudget", "Mode", "PassTimes", "Proposal", "Step"]

# Rows at which passes are timed. One pass is not given more guesses than the last of them.
GRID = (1, 2, 4, 8, 16, 32, 64, 96)
# What guessing must gain over plain decoding, and the share of a pass below which it is not worth a rest.
_GAIN, _FREE = 1.02, 0.005
# Share of the time that trying what did not pay may take: well below what guessing must gain.
_TRIED = 0.01
# Tokens of plain decoding before drafts that did not pay are tried again, and trees that are then tried.
REST, TRIAL = 64, 8
# Newest samples weigh at least this much in a moving average; a single time counts at most so many times over.
_RATE, _OUTLIER = 0.05, 1.5
# Rows beyond the first up to which passes are timed before anything is known, and guesses that are asked for then.
_FIRST = 7
# Trees after which a draft that costs next to nothing may be found wanting.
_EVIDENCE = 32
# After so many trees the shape of drawn ones is planned anew.
_PLAN = 8

Mode = Literal["off", "auto"] | int


class PassTimes:
    """T(n), the seconds of a forward pass over n rows."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._seconds: list[float] = []

    @property
    def measured(self) -> int:
        """Rows up to which passes were timed."""
        return self._rows[-1] if self._rows else 0

    @property
    def curve(self) -> dict[int, float]:
        """Seconds of a pass by its rows, as far as passes were timed."""
        return dict(zip(self._rows, self(self._rows).tolist(), strict=True)) if self._rows else {}

    def measure(self, rows: int, seconds_of: Callable[[int], float]) -> bool:
        """Time what is missing of the grid, up to its first point at or above `rows`; whether anything was."""
        before = self.measured
        while self.measured < min(rows, GRID[-1]):
            following = GRID[len(self._rows)]
            # The first pass of all finds caches cold.
            seconds = min(seconds_of(following) for _ in range(1 if self._rows else 3))
            self._rows.append(following)
            self._seconds.append(seconds)
        return self.measured > before

    def __call__(self, rows: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Seconds for each number of rows: linear between what was timed and behind it, and never falling."""
        known = np.array(self._rows, dtype=np.float64)
        seconds = np.maximum.accumulate(np.array(self._seconds))
        wanted = np.asarray(rows, dtype=np.float64)
        found: npt.NDArray[np.float64] = np.interp(wanted, known, seconds)
        if len(known) > 1:
            slope = (seconds[-1] - seconds[-2]) / (known[-1] - known[-2])
            found = found + slope * np.maximum(wanted - known[-1], 0.0)
        return found

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a pass: all times drift together, with the length of the past, and this one most.

        A pass that was interrupted by something else counts as one that took a half longer.
        """
        if not self._rows:
            return
        expected = float(self(rows))
        change = min(max(seconds / expected, 1 / _OUTLIER), _OUTLIER) - 1
        near = int(np.argmin(np.abs(np.log(np.array(self._rows) / rows))))
        for place in range(len(self._seconds)):
            self._seconds[place] *= 1 + (0.2 if place == near else _RATE) * change


class _Mean:
    """A moving average that begins as a plain one."""

    def __init__(self, value: float, count: float = 0.0) -> None:
        self.value, self.count = value, count

    def add(self, sample: float) -> None:
        self.count += 1
        self.value += max(_RATE, 1 / self.count) * (sample - self.value)


class Chances:
    """How often a guess was right where the guess above it was, for each slot of a tree.

    Args:
        before: what a slot that is new here begins with; None for half at the first place, and less behind.
    """

    def __init__(self, before: Chances | None = None) -> None:
        self.before = before
        self._means: dict[Hashable, _Mean] = {}

    def of(self, slot: Hashable, rank: int) -> float:
        """The chance of a guess, given that its parent is reached; `rank` counts its siblings before it."""
        mean = self._means.get(slot)
        if mean is not None:
            return mean.value
        return 0.5 / (1 + rank) if self.before is None else self.before.of(slot, rank)

    def add(self, slot: Hashable, rank: int, hit: bool) -> None:
        """Note that a guess whose parent was reached was right or wrong."""
        mean = self._means.get(slot)
        if mean is None:
            # What is believed before counts as two samples.
            mean = self._means[slot] = _Mean(self.of(slot, rank), 2.0)
        mean.add(float(hit))
        if self.before is not None:
            self.before.add(slot, rank, hit)


class _Shape(NamedTuple):
    """The guesses of a tree: how each is reached, and what it costs.

    `reach` is the probability that a node is on the accepted path, `cost` the rows that scoring it takes, its
    probes included; both are 0 for a probe.
    """

    reach: list[float]
    cost: list[int]


class Account:
    """What guessing has brought to one sequence, and whether it goes on.

    Args:
        budget: of the model and the draft.
    """

    def __init__(self, budget: DraftBudget) -> None:
        self.budget = budget
        self.chances = Chances(budget.chances)
        # Where the draft did not pay for others a moment ago, it rests here too.
        self.rest, self.trial = budget.rest, TRIAL
        # Tokens that guesses added to a pass, and what they cost, in plain passes.
        self.gain, self.cost = _Mean(0.0), _Mean(0.0)
        self.draft_seconds, self.level_seconds = 0.0, _Mean(0.0)
        # Seconds of choosing and learning since the last step was noted.
        self.other_seconds = 0.0
        # Of the step that is being made: whether nothing is guessed in it, and whether the draft works beside it.
        self.is_resting = self.is_beside = False
        # The least reach of a drawn node that is scored, and the deepest level that is drafted.
        self.least = 0.0
        self.depth: int | None = None
        # Guesses that the next tree may use, if it can be told how many it needs.
        self.width = _FIRST
        self.trees = 0

    def propose(self, speculator: Speculator, context: Context) -> Proposal:
        """What a speculator guesses now, or nothing while guessing rests."""
        budget, self.draft_seconds = self.budget, 0.0
        is_free = budget.mode != "off" and speculator.may_trim(context.sampler)
        self.is_resting = budget.mode == "auto" and self.rest > 0 and speculator.may_rest(context.sampler)
        self.is_beside = speculator.works_ahead and not self.is_resting
        if self.is_resting:
            return Proposal(Tree.root(context.tokens[-1]), self, is_free)
        if is_free and isinstance(budget.mode, int):
            context = context._replace(budget=min(context.budget, budget.mode))
        elif is_free:
            context = context._replace(width=self.width)
            if not self.trial and self.depth is not None:
                context = context._replace(depth=self.depth)
        start = budget.clock()
        tree = speculator.propose(context)
        self.draft_seconds = budget.clock() - start
        return Proposal(tree, self, is_free)

    def observe(
        self, speculator: Speculator, tokens: Sequence[int], tree: Tree, path: Sequence[int], logits: Tensor
    ) -> None:
        """Let a speculator learn from a checked tree, and count the time; arguments as of `Speculator.observe`."""
        start = self.budget.clock()
        learn = speculator.pass_over if self.is_resting else speculator.observe
        learn(tokens, tree, path, logits)
        self.other_seconds += self.budget.clock() - start

    def shape(self, tree: Tree) -> _Shape:
        """How likely each node of a tree is reached, and its rows."""
        reach, cost, hosts = [1.0], [1], [0]
        for node in range(1, len(tree)):
            parent = tree.parents[node]
            is_probe = node in tree.probes
            host = hosts[parent] if is_probe else node
            hosts.append(host)
            cost.append(not is_probe)
            cost[host] += is_probe
            reach.append(
                0.0 if is_probe else reach[parent] * self.chances.of(tree.slot(node), tree.places[node][-1])
            )
        return _Shape(reach, cost)

    def learn(self, tree: Tree, path: Sequence[int], following: Sequence[int]) -> None:
        """Learn from a tree that was judged which of its places are right how often.

        Args:
            tree: with what was scored of it.
            path: the accepted nodes that were scored.
            following: the token that was chosen behind each of them.
        """
        reached = dict(zip(path, following, strict=True))
        for node in range(1, len(tree)):
            token = reached.get(tree.parents[node])
            if token is not None and node not in tree.probes:
                self.chances.add(tree.slot(node), tree.places[node][-1], tree.tokens[node] == token)

    def note(self, gained: int, cost: float, levels: int) -> None:
        """Note what a tree brought, and decide whether guessing goes on.

        Args:
            gained: tokens beyond the first.
            cost: of rows and drafting, in plain passes.
            levels: of the tree.
        """
        if self.is_resting:
            self.rest -= 1
            self.budget.rest = self.rest
            if not self.rest:
                self.trial, self.gain, self.cost = TRIAL, _Mean(0.0), _Mean(0.0)
            return
        self.gain.add(gained)
        self.cost.add(cost)
        if levels:
            self.level_seconds.add(self.draft_seconds / levels)
        self.trees += 1
        if self.trial:
            self.trial -= 1
        elif self.trees % REST == 0:
            self.trial = 1
        # The dearer guessing is, the fewer trees are tried before it is known, and the longer it rests.
        spent = self.cost.value * self.gain.count
        is_known = self.gain.count >= _EVIDENCE or spent > 2 * REST * (_GAIN - 1)
        if is_known and self.cost.value > _FREE and 1 + self.gain.value < _GAIN * (1 + self.cost.value):
            self.rest = max(REST, round(self.cost.value * min(self.gain.count, _EVIDENCE) / _TRIED))
            self.budget.rest = self.rest

    def plan(self, tree: Tree, shape: _Shape, rows: int, sequences: int) -> None:
        """Settle, from this tree, how deep the next ones are drafted and which of their drawn nodes are scored."""
        times, level = self.budget.times, self.level_seconds.value
        if self.trees % _PLAN or (level < _FREE * float(times(rows)) and not tree.drawn):
            return
        depths = tree.depths()
        nodes = [node for node in range(1, len(tree)) if node not in tree.probes]
        nodes.sort(key=lambda node: -shape.reach[node])
        best, self.least, self.depth = 0.0, 0.0, 1
        for depth in range(1, max(depths) + 1):
            chosen = [node for node in nodes if depths[node] <= depth]
            reach, cost = [shape.reach[node] for node in chosen], [shape.cost[node] for node in chosen]
            rates = _rates(reach, cost, rows, sequences, times, depth * level)
            count = int(np.argmax(rates))
            if count and rates[count] > best:
                best, self.least, self.depth = float(rates[count]), reach[count - 1], depth


class Proposal(NamedTuple):
    """A tree and the account of its sequence; `is_free` where leaving guesses out leaves the text as it is."""

    tree: Tree
    account: Account
    is_free: bool


class DraftBudget:
    """Chooses which guesses are scored, for all sequences of a pass together.

    Shared by the sequences of a loaded model: what it learns in one request helps the next.

    Args:
        mode: `auto` for what pays by the machine's own times; `off` for everything that is proposed; a number
            for at most so many guesses for each sequence and pass, whatever they cost.
        times: T(n) of the model, which its drafts share.
        clock: seconds.

    Attributes:
        chances: how often the guesses of all sequences were right, by slot.
        rest: tokens for which new sequences do not guess, because it did not pay for others.
    """

    def __init__(
        self,
        mode: Mode = "auto",
        *,
        times: PassTimes | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.mode = mode
        self.clock = clock
        self.times = PassTimes() if times is None else times
        self.chances = Chances()
        self.rest = 0
        self._measuring = 0.0

    def prepare(self, seconds_of: Callable[[int], float]) -> None:
        """Time passes of a few rows now, once, so that no request waits for that."""
        if self.mode == "auto":
            self.times.measure(1 + _FIRST, seconds_of)

    def choose(
        self, proposals: Sequence[Proposal], rows: int, seconds_of: Callable[[int], float]
    ) -> list[Tree]:
        """The trees, each with what is not worth its row marked as unscored.

        Args:
            proposals: of the sequences that choose a token in this pass.
            rows: of the pass without guesses: roots, and pieces of prompts.
            seconds_of: times a pass over so many rows.
        """
        trees = [proposal.tree for proposal in proposals]
        if self.mode != "auto":
            return trees
        if any(proposal.account.is_beside for proposal in proposals):
            # Without guesses that wait there is no tree yet, but the step is held to a plain one all the same.
            self._measure(1, seconds_of)
        if all(len(tree) == 1 for tree in trees):
            return trees
        start, self._measuring = self.clock(), 0.0
        chosen = self._chosen(proposals, rows, seconds_of)
        # Times are measured once for all, and are no part of what this step costs.
        spent = self.clock() - start - self._measuring
        guessing = [proposal.account for proposal in proposals if len(proposal.tree) > 1]
        for account in guessing:
            account.other_seconds += spent / len(guessing)
        return chosen

    def _measure(self, rows: int, seconds_of: Callable[[int], float]) -> bool:
        start = self.clock()
        found = self.times.measure(rows, seconds_of)
        self._measuring += self.clock() - start
        return found

    def _chosen(
        self, proposals: Sequence[Proposal], rows: int, seconds_of: Callable[[int], float]
    ) -> list[Tree]:
        """As `choose`, where something was guessed."""
        trees = [proposal.tree for proposal in proposals]
        self._measure(rows + _FIRST, seconds_of)
        kept: list[set[int]] = [set() for _ in trees]
        candidates: list[tuple[float, int, int, int]] = []
        gained = overhead = 0.0
        for place, (tree, account, is_free) in enumerate(proposals):
            if len(tree) == 1:
                continue
            shape = account.shape(tree)
            rows += shape.cost[0] - 1
            overhead += account.draft_seconds + account.other_seconds
            guesses = [node for node in range(1, len(tree)) if node not in tree.probes]
            if is_free and not tree.drawn:
                candidates += [(-shape.reach[node], place, node, shape.cost[node]) for node in guesses]
            else:
                least = account.least if is_free and not account.trial else 0.0
                kept[place].update(node for node in guesses if shape.reach[node] >= least)
                gained += sum(shape.reach[node] for node in kept[place])
                rows += sum(shape.cost[node] for node in kept[place])
            account.plan(tree, shape, rows, len(trees))
        candidates.sort()
        reach, cost = [-one[0] for one in candidates], [one[3] for one in candidates]
        while True:
            rates = _rates(reach, cost, rows, len(trees) + gained, self.times, overhead)
            count = int(np.argmax(rates))
            # Times beyond those that were measured are a guess, so what seems to pay there is measured first.
            if not self._measure(rows + sum(cost[:count]), seconds_of):
                break
        if rates[count] >= _GAIN * rates[0]:
            for _, place, node, _ in candidates[:count]:
                kept[place].add(node)
        for nodes, (_, account, _) in zip(kept, proposals, strict=True):
            account.width = max(_FIRST, 2 * len(nodes))
        return [_trimmed(tree, nodes) for tree, nodes in zip(trees, kept, strict=True)]

    def settle(
        self, account: Account, tree: Tree, path: Sequence[int], following: Sequence[int], step: Step
    ) -> None:
        """Learn from a tree that was judged; arguments as of `Account.learn`, and the pass that it was in."""
        if self.mode != "auto":
            return
        start = self.clock()
        if not account.is_resting:
            account.learn(tree, path, following)
        if self.times.measured:
            without = step.rows - tree.num_scored + 1
            seconds = self.times([step.rows, without, step.sequences]).tolist()
            plain = seconds[2] / step.sequences
            longer = (step.seconds if account.is_beside else seconds[0]) - seconds[1]
            cost = (max(longer, 0.0) + account.draft_seconds + account.other_seconds) / plain
            account.note(len(path) - 1, cost, max(tree.depths()))
        account.other_seconds = self.clock() - start


class Step(NamedTuple):
    """A forward pass: its rows, how many sequences chose a token in it, and its seconds if a draft worked beside it."""

    rows: int
    sequences: int
    seconds: float = 0.0


def _rates(
    reach: Sequence[float], cost: Sequence[int], rows: int, tokens: float, times: PassTimes, overhead: float
) -> npt.NDArray[np.float64]:
    """Tokens a second with the first 0, 1, 2, ... guesses."""
    gained = np.concatenate(([0.0], np.cumsum(reach)))
    needed = rows + np.concatenate(([0], np.cumsum(cost)))
    rates: npt.NDArray[np.float64] = (tokens + gained) / (times(needed) + overhead)
    return rates


def _trimmed(tree: Tree, kept: set[int]) -> Tree:
    """A tree whose guesses outside `kept`, and the probes below them, are not scored."""
    unscored: set[int] = set()
    for node in range(1, len(tree)):
        is_below = tree.parents[node] in unscored
        if is_below or (node not in kept and node not in tree.probes):
            unscored.add(node)
    return replace(tree, unscored=frozenset(unscored)) if unscored else tree
