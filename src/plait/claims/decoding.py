"""What drafts bring on real prompts: tokens for each pass, how deep guesses hold, and time against plain decoding.

All sides answer the same prompts in turns, in an order that changes, with the same greedy law.
"""

from __future__ import annotations

import statistics
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from plait.claims.drafts import answer, same_up_to_ties, with_draft
from plait.claims.tasks import TASKS
from plait.decode.speculate import Account, DraftBudget, Mode, Step, Tree
from plait.errors import UnknownNameError, suggestion

if TYPE_CHECKING:
    from plait.engine import LanguageModel

__all__ = ["Decoding", "Recorder", "Runs", "TaskRow", "measure_decoding"]


class Recorder(DraftBudget):
    """A budget like another one, which counts, for each depth, how often a guess was scored there and how often one was right.

    Attributes:
        scored, right: passes by depth, from 1 on.
        rows: of all passes that chose a token.
        passes: how many those were.
    """

    def __init__(self, budget: DraftBudget) -> None:
        super().__init__(budget.mode, times=budget.times)
        self.scored: dict[int, int] = {}
        self.right: dict[int, int] = {}
        self.rows = self.passes = 0

    def settle(
        self, account: Account, tree: Tree, path: Sequence[int], following: Sequence[int], step: Step
    ) -> None:
        super().settle(account, tree, path, following, step)
        self.passes += 1
        self.rows += tree.num_scored
        depths = tree.depths()
        for depth in {depths[node] for node in tree.scored if node and node not in tree.probes}:
            self.scored[depth] = self.scored.get(depth, 0) + 1
        for node in path[1:]:
            self.right[depths[node]] = self.right.get(depths[node], 0) + 1


@dataclass
class TaskRow:
    """One draft on one task.

    Args:
        task, draft: which.
        tokens, passes: of all answers.
        rows: mean rows of a pass.
        ratios: of each prompt and round, seconds of plain decoding by seconds of this one for each token.
        accepted: for each depth from 1 on, the share of passes with guesses that deep in which one was right.
        identical: share of answers that are those of plain decoding, or part at a tie.
    """

    task: str
    draft: str
    tokens: int = 0
    passes: int = 0
    rows: float = 0.0
    ratios: list[float] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)
    identical: float = 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens for each forward pass."""
        return self.tokens / max(self.passes, 1)

    @property
    def ratio(self) -> float:
        """Speed against plain decoding, the median over prompts and rounds."""
        return statistics.median(self.ratios)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form, with what follows from it."""
        return vars(self) | {"tokens_per_pass": self.tokens_per_pass, "ratio": self.ratio}


@dataclass
class Decoding:
    """What was measured.

    Args:
        rows: one for each task and draft.
        curve: seconds of a forward pass by its rows, from the last draft that guessed.
    """

    rows: list[TaskRow]
    curve: dict[int, float]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {"rows": [row.to_json() for row in self.rows], "seconds_of_a_pass": self.curve}


def measure_decoding(
    lm: LanguageModel,
    drafts: Sequence[str],
    tasks: Sequence[str] = tuple(TASKS),
    *,
    prompts: int = 5,
    max_new_tokens: int = 64,
    rounds: int = 1,
) -> Generator[str, None, Decoding]:
    """Answer the prompts of tasks plainly and with each draft, in turns; yields a line now and then.

    Args:
        lm: the model; its own draft is not used.
        drafts: spec strings; each starts each task without having learned anything.
        tasks: names from `TASKS`.
        prompts: of each task, at most.
        max_new_tokens: of each answer, which goes on behind an end token.
        rounds: times that everything is answered. What is learned stays from round to round.

    Raises:
        UnknownNameError: no task has that name.
    """
    from plait.decode import Sampling

    if unknown := [task for task in tasks if task not in TASKS]:
        raise UnknownNameError(
            f"Unknown task {unknown[0]!r}.{suggestion(unknown[0], TASKS)} Known: {', '.join(TASKS)}."
        )
    greedy = Sampling(temperature=0.0)
    plain = with_draft(lm, "none")
    plain.time_passes()
    found: list[TaskRow] = []
    curve: dict[int, float] = {}
    for task in tasks:
        asked = TASKS[task](lm)[:prompts]
        sides = [with_draft(lm, draft) for draft in drafts]
        rows = [TaskRow(task, draft) for draft in drafts]
        recorders = [Recorder(side.draft_budget) for side in sides]
        for side, recorder in zip(sides, recorders, strict=True):
            side.draft_budget = recorder
        for number in range(rounds):
            for place, prompt in enumerate(asked):
                yield f"{task}, prompt {place + 1} of {len(asked)}, round {number + 1} of {rounds}"
                order = [plain, *sides] if (number + place) % 2 else [*sides[::-1], plain]
                answers = {
                    id(side): answer(side, prompt, greedy, max_new_tokens, ignore_end=True) for side in order
                }
                expected = answers[id(plain)]
                for side, row in zip(sides, rows, strict=True):
                    given = answers[id(side)]
                    row.tokens += len(given.tokens)
                    row.passes += given.passes
                    row.identical += same_up_to_ties(plain, prompt, expected.tokens, given.tokens)
                    row.ratios.append(
                        expected.seconds
                        / (len(expected.tokens) - 1)
                        / given.seconds
                        * (len(given.tokens) - 1)
                    )
        for row, recorder in zip(rows, recorders, strict=True):
            row.identical /= rounds * len(asked)
            row.rows = recorder.rows / max(recorder.passes, 1)
            row.accepted = [
                recorder.right.get(depth, 0) / recorder.scored[depth] for depth in sorted(recorder.scored)
            ]
            curve = recorder.times.curve or curve
        found += rows
    return Decoding(found, curve)


class Runs(DraftBudget):
    """A budget that keeps how many guesses were right in a row, where the guesses of a tree are a chain.

    A run ends with a wrong guess, or with the last of a chain behind which the model itself chose the next token.
    One that goes on into the next window, which the model does not interrupt, counts as one.

    Attributes:
        runs: their lengths.
    """

    def __init__(self, mode: Mode) -> None:
        super().__init__(mode)
        self.runs: list[int] = []
        self._open = 0

    def settle(
        self, account: Account, tree: Tree, path: Sequence[int], following: Sequence[int], step: Step
    ) -> None:
        super().settle(account, tree, path, following, step)
        if len(tree) == 1:
            return
        right = len(path) - 1
        child = next((node for node in tree.unscored if tree.parents[node] == path[-1]), None)
        self._open += right
        if child is not None and tree.tokens[child] == following[-1]:
            self._open += 1
        else:
            self.finish(even_empty=True)

    def finish(self, *, even_empty: bool = False) -> None:
        """End the run that goes on, as the answer did."""
        if self._open or even_empty:
            self.runs.append(self._open)
        self._open = 0
