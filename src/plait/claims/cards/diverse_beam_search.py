"""Groups of beams that pay for repetition give answers that differ, for the same number of passes."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run

if TYPE_CHECKING:
    from plait.engine import Beam, LanguageModel

__all__ = ["CLAIM"]

_BEAMS, _TOKENS, _OPENING = 6, 16, 6
_KINDS = {"beam": 1, "diverse": 6}

_STARTS = (
    "The history of computing began",
    "My favourite thing about the sea is",
    "Once upon a time there was",
    "The best way to learn a language is",
    "When the train finally arrived,",
    "Scientists have discovered that",
    "In the middle of the forest",
    "The most important rule of cooking is",
    "She opened the letter and",
    "A good teacher knows",
)


def _search(lm: LanguageModel, prompt: Sequence[int], groups: int) -> list[Beam]:
    return lm.beam_search(
        prompt, num_beams=_BEAMS, num_groups=groups, max_new_tokens=_TOKENS, ignore_end=True
    )


def _distinct(beams: Sequence[Beam], size: int) -> float:
    """Distinct runs of `size` tokens among all of the answers, as a fraction of all runs."""
    runs = [
        beam.tokens[start : start + size] for beam in beams for start in range(len(beam.tokens) - size + 1)
    ]
    return len(set(runs)) / len(runs)


def _overlap(tokens: Sequence[int], reference: Sequence[int]) -> float:
    """F1 of the tokens in common, however often and in whatever order."""
    from collections import Counter

    common = (Counter(tokens) & Counter(reference)).total()
    return 2 * common / (len(tokens) + len(reference))


def _reference_overlap(lm: LanguageModel, count: int) -> Generator[str, None, dict[str, float]]:
    """The best answer's overlap with how Python's manual really goes on, averaged over passages."""
    from plait.claims.texts import token_runs

    best = dict.fromkeys(_KINDS, 0.0)
    passages = token_runs(lm.tokenizer, [64 + _TOKENS] * count)
    for number, passage in enumerate(passages):
        yield f"passage {number + 1} of {count}"
        for kind, groups in _KINDS.items():
            beams = _search(lm, passage[:64], groups)
            best[kind] += max(_overlap(beam.tokens, passage[64:]) for beam in beams) / count
    return best


def _measure(run: Run) -> Measurements:
    import statistics
    import time

    from plait.engine import load

    yield "loading SmolLM2"
    lm = load("smollm2", weights="fp32")
    starts = run.pick(_STARTS, _STARTS[:2])
    distinct: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    openings: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    nats: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    ratios = []
    for number, start in enumerate(starts):
        yield f"prompt {number + 1} of {len(starts)}"
        seconds = {}
        # The order changes from prompt to prompt, so that going first helps nobody.
        for kind in list(_KINDS)[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            beams = _search(lm, lm.encode(start), _KINDS[kind])
            seconds[kind] = time.perf_counter() - began
            distinct[kind].append(_distinct(beams, 4))
            openings[kind].append(len({beam.tokens[:_OPENING] for beam in beams}))
            nats[kind].append(statistics.fmean(beam.logprob / len(beam.tokens) for beam in beams))
        ratios.append(seconds["diverse"] / seconds["beam"])
    overlap = yield from _reference_overlap(lm, run.pick(20, 2))
    mean = statistics.fmean
    count = len(starts)
    return {
        "distinct_4_ratio": Quantity(mean(distinct["diverse"]) / mean(distinct["beam"]), "x", samples=count),
        "distinct_openings": Quantity(mean(openings["diverse"]), f"of {_BEAMS}", samples=count),
        "distinct_openings_of_beam_search": Quantity(mean(openings["beam"]), f"of {_BEAMS}", samples=count),
        "nats_lost": Quantity(mean(nats["beam"]) - mean(nats["diverse"]), "nats/token", samples=count),
        "time_ratio": Quantity.median(ratios, "x"),
        "best_overlap_ratio": Quantity(overlap["diverse"] / overlap["beam"], "x", samples=run.pick(20, 2)),
    }


CLAIM = Claim(
    name="diverse-beam-search",
    title="Groups of beams give different answers",
    headline=(
        "Diverse beam search finds answers that differ, and better ones among them, at the cost of beam search (image "
        "captions, translation and visual questions, 20 beams)."
    ),
    source="Vijayakumar et al. 2018, Diverse Beam Search, arXiv:1610.02424 (tables 1 and 2)",
    scale=(
        "SmolLM2-135M-Instruct in fp32; 6 beams in 6 groups, Hamming penalty 0.5, against one group of 6; 10 beginnings, "
        "16 tokens each, turn by turn in one process. Overlap is the best answer's unigram F1 with the true next 16 tokens "
        "of 20 passages of Python's manual."
    ),
    bars=(
        Bar(
            quantity="distinct_4_ratio",
            relation=">=",
            value=1.6,
            unit="x",
            why="Runs of four tokens repeat in the answers of beam search, which differ in a word or two.",
        ),
        Bar(
            quantity="distinct_openings",
            relation=">=",
            value=4.0,
            unit="of 6",
            why="Each group is pushed away from the others from the first token on.",
        ),
        Bar(
            quantity="nats_lost",
            relation="<=",
            value=0.35,
            unit="nats/token",
            why="Answers that differ must still be likely ones.",
        ),
        Bar(
            quantity="time_ratio",
            relation="<=",
            value=1.1,
            unit="x",
            why="Both make the same passes; the choices of six small groups cost a little.",
        ),
        Bar(
            quantity="best_overlap_ratio",
            relation=">=",
            value=1.03,
            unit="x",
            why="The paper's oracle scores: among different answers one is nearer to the reference.",
        ),
    ),
    measure=_measure,
)
