"""Long texts through several memories: what is still found, how well the text is predicted, what it costs."""

from __future__ import annotations

import difflib
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from plait.claims.reading import token_nats
from plait.errors import CapacityError, ConfigError, IncompatibleError
from plait.evaluation.long_tasks import Case, Material, Task
from plait.files import write_text
from plait.memory import MemoryPlan

if TYPE_CHECKING:
    from plait.engine import LanguageModel

__all__ = ["Outcome", "Report", "evaluate"]

_VERSION = 1
_STRETCH = 512


@dataclass(frozen=True)
class Outcome:
    """One case under one memory.

    Attributes:
        task, memory, length, number: which case it is; `length` is what was asked for, in tokens.
        depth: where in what was read that which is needed stands, from 0 to 1.
        hit: 1 where the answer was found, chosen or completed, else 0; for completed lines their similarity, from 0 to 1.
            None for a text that is read through.
        nats: mean negative log-probability of a token of the right answer.
        curve: for a text that is read through, mean nats of each stretch of 512 tokens.
        nbytes: bytes of keys, values and what belongs to them, after reading.
        seconds: of reading and answering.
        refused: why this memory cannot take this case; empty where it can.
    """

    task: str
    memory: str
    length: int
    number: int
    depth: float = 0.0
    hit: float | None = None
    nats: float = 0.0
    curve: tuple[float, ...] = ()
    nbytes: int = 0
    seconds: float = 0.0
    refused: str = ""

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What tells cases apart."""
        return self.task, self.memory, self.length, self.number


@dataclass
class Report:
    """All outcomes of an evaluation; with a file, what was measured before it was stopped is not measured again.

    Attributes:
        settings: what must be equal for outcomes to be comparable: the model, the seed, the texts.
        outcomes: by what tells them apart.
    """

    settings: dict[str, Any]
    outcomes: dict[tuple[str, str, int, int], Outcome] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None, settings: dict[str, Any]) -> Report:
        """The report that a file holds, or a new one.

        Raises:
            ConfigError: the file is no report, or was made with other settings.
        """
        if path is None or not path.exists():
            return cls(settings)
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            version, made_with = kept["version"], kept["settings"]
            outcomes = [Outcome(**{**one, "curve": tuple(one["curve"])}) for one in kept["outcomes"]]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path} is no report of this command: {error}. Give another file.") from None
        if version != _VERSION or made_with != settings:
            raise ConfigError(
                f"{path} was made with {made_with}, not with {settings}. Give another file, or the same settings."
            )
        return cls(settings, {one.key: one for one in outcomes})

    def save(self, path: Path) -> None:
        """Write all outcomes to a file, in one step."""
        write_text(path, json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n")

    def to_json(self) -> dict[str, Any]:
        """As plain data, with a summary."""
        return {
            "version": _VERSION,
            "settings": self.settings,
            "summary": self.summary(),
            "outcomes": [asdict(one) for one in self.outcomes.values()],
        }

    def summary(self) -> list[dict[str, Any]]:
        """Means over the cases of each task, memory and length, in the order in which they were asked for."""
        groups: dict[tuple[str, str, int], list[Outcome]] = {}
        for one in self.outcomes.values():
            groups.setdefault((one.task, one.memory, one.length), []).append(one)
        rows = []
        for (task, memory, length), group in groups.items():
            row: dict[str, Any] = {"task": task, "memory": memory, "length": length, "cases": len(group)}
            if refused := next((one.refused for one in group if one.refused), ""):
                rows.append({**row, "refused": refused})
                continue
            hits = [one.hit for one in group if one.hit is not None]
            rows.append(
                {
                    **row,
                    "hit": mean(hits) if hits else None,
                    "nats": mean(one.nats for one in group),
                    "nbytes": round(mean(one.nbytes for one in group)),
                    "seconds": mean(one.seconds for one in group),
                }
            )
        return rows


def evaluate(
    lm: LanguageModel,
    memories: Sequence[str],
    tasks: Sequence[Task],
    *,
    lengths: Sequence[int],
    count: int,
    seed: int = 0,
    material: Material | None = None,
    report: Report | None = None,
) -> Iterator[tuple[str, Report]]:
    """Measure every task at every length under every memory; all memories get the same cases.

    Args:
        lm: the model; its own memory is not used.
        memories: spec strings, such as `"full"` or `"infllm:local=512,gear:bits=4"`.
        tasks: from `find_tasks`.
        lengths: tokens of a case.
        count: cases of each task and length.
        seed: of the cases.
        material: what they are made of; Python's manual and library when left out.
        report: outcomes to go on from.

    Yields:
        What was done last, in words, and the report so far, after each case.

    Raises:
        ConfigError: a number that is too small, or a memory that is none.
    """
    if count < 1 or not lengths or min(lengths) < 128:
        raise ConfigError(
            f"count must be at least 1 and lengths at least 128 tokens. Got {count} and {list(lengths)}."
        )
    plans = {memory: MemoryPlan.parse(memory) for memory in memories}
    material = material or Material(lm.tokenizer)
    report = report or Report({})
    for task in tasks:
        for length in lengths:
            draw = random.Random(f"{seed} {task.name} {length}")
            for number, case in enumerate(task.cases(material, draw, length, count)):
                for memory, plan in plans.items():
                    blank = Outcome(task.name, memory, length, number, round(case.depth, 4))
                    if blank.key in report.outcomes:
                        continue
                    report.outcomes[blank.key] = _outcome(lm, plan, task, case, blank)
                    yield f"{task.name}, {length} tokens, case {number + 1} of {count}, {memory}", report


def _outcome(lm: LanguageModel, plan: MemoryPlan, task: Task, case: Case, blank: Outcome) -> Outcome:
    twin = lm.with_memory(plan)
    began = time.perf_counter()
    settled = asdict(blank)
    try:
        settled |= _asked(twin, task, case) if task.measures else _read_through(twin, case)
    except (CapacityError, IncompatibleError) as error:
        settled["refused"] = str(error)
    return Outcome(**{**settled, "seconds": time.perf_counter() - began})


def _read_through(lm: LanguageModel, case: Case) -> dict[str, Any]:
    limit = lm.plan.longest(lm.model.config.max_positions)
    if len(case.read) > limit:
        raise CapacityError(f"{len(case.read)} tokens are more than the model's context of {limit}.")
    past = lm.model.new_past(lm.plan)
    nats = token_nats(lm, past, case.read)
    curve = tuple(mean(nats[start : start + _STRETCH]) for start in range(0, len(nats), _STRETCH))
    return {"nats": mean(nats), "curve": curve, "nbytes": past.nbytes()}


def _asked(lm: LanguageModel, task: Task, case: Case) -> dict[str, Any]:
    with lm.session() as session:
        session.read_tokens(case.read)
        # Apart from the text before it, as the question of a conversation would be, so that lossy memories apply.
        session.fork()
        session.read_tokens(case.asked)
        scores = [session.score(answer) for answer in case.answers]
        nats = [score.nats / score.tokens for score in scores]
        nbytes = session.nbytes()
        if task.measures == "chosen":
            hit = float(nats[0] == min(nats))
        else:
            right = case.answers[0]
            said = session.generate(max_new_tokens=scores[0].tokens + 4).text
            if task.measures == "found":
                hit = float(right.strip() in said)
            else:
                said = said.split("\n")[0]
                hit = difflib.SequenceMatcher(None, said.strip(), right.strip(), autojunk=False).ratio()
    return {"hit": hit, "nats": nats[0], "nbytes": nbytes}
