"""Contexts read apart and used together: how much of the quality of reading them in a row is kept."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Generator
from typing import TYPE_CHECKING

from plait.claims.claim import Bar, Claim, MeasurementError, Measurements, Quantity, Run
from plait.claims.labelled import NEEDS

if TYPE_CHECKING:
    from plait.engine import ContextStore, LanguageModel, ParallelExample, Session

__all__ = ["CLAIM"]

_PREFIX = "Here are documents, one after the other. Any of them can be repeated word by word.\n\n"
_MODULES = (
    "argparse", "bisect", "calendar", "cmd", "codecs", "configparser", "csv", "difflib", "fnmatch", "fractions", "heapq",
    "shlex", "statistics", "string", "textwrap", "zipfile",
)  # fmt: skip


def _documents(lm: LanguageModel, low: int, high: int, pick: random.Random) -> list[tuple[str, str]]:
    """Name and beginning, of `low` to `high` tokens, of chapters of Python's manual, in random order."""
    from plait.claims.texts import chapters

    found = []
    for name, text in chapters().items():
        ids = lm.tokenizer.encode(text)
        if len(ids) >= high:
            found.append((name, lm.tokenizer.decode(ids[: pick.randint(low, high)])))
    pick.shuffle(found)
    return found


def _many_documents(lm: LanguageModel, count: int, length: int, pick: random.Random) -> list[tuple[str, str]]:
    """Chapters of the manual and, where there are too few, modules of the library, cut to one length, in random order."""
    from plait.claims.texts import module_source

    found = _documents(lm, length, length, pick)[:count]
    for name in _MODULES[: count - len(found)]:
        ids = lm.tokenizer.encode(module_source(name))
        found.append((f"the module {name}", lm.tokenizer.decode(ids[:length])))
    if len(found) < count:
        raise MeasurementError(
            f"Python's manual and library have {len(found)} documents here; {count} are needed."
        )
    pick.shuffle(found)
    return found


def _example(
    documents: list[tuple[str, str]], asked: int, answer_tokens: int, lm: LanguageModel
) -> ParallelExample:
    """A request to repeat one of the documents."""
    from plait.engine import ParallelExample

    name, text = documents[asked]
    contexts = [f"Document about {title}:\n{body}\n\n" for title, body in documents]
    question = f"Repeat the document about {name}.\n\nDocument about {name}:\n"
    answer = lm.tokenizer.decode(lm.tokenizer.encode(text)[:answer_tokens])
    return ParallelExample(_PREFIX, contexts, question, answer)


def _nats(session: Session, example: ParallelExample) -> float:
    """Nats a token of the right answer behind the question."""
    session.read(example.question)
    score = session.score(example.answer)
    return score.nats / score.tokens


def _seconds(session: Session, example: ParallelExample, max_new_tokens: int) -> tuple[float, float]:
    """Time to the first token and to the last, the question included."""
    start = time.perf_counter()
    first = None
    for piece in session.stream(example.question, max_new_tokens=max_new_tokens, ignore_end=True):
        if first is None and piece.choices:
            first = time.perf_counter() - start
    if first is None:
        raise MeasurementError("Nothing was generated.")
    return first, time.perf_counter() - start


def _kinds_told(
    run: Run, lm: LanguageModel, store: ContextStore
) -> Generator[str, None, dict[str, Quantity]]:
    """How often the right kind is told of a thing, from examples that stand in contexts of their own."""
    from plait.claims.labelled import labelled_sets
    from plait.claims.laws import laws
    from plait.engine import APE, ParallelExample

    pick = random.Random(run.seed)
    prefix = "Every line describes one thing and says which kind it is.\n"
    right: dict[str, list[bool]] = {}
    for things in labelled_sets(pick)[: run.pick(3, 1)]:
        yield f"kinds of {things.name.replace('_', ' ')}"
        ids = [lm.encode(f" {kind}")[0] for kind in things.kinds]
        if len(set(ids)) < len(ids):
            raise MeasurementError(f"Two kinds of {things.name} begin with the same token.")
        per_context = run.pick(3, 1) * len(things.kinds)
        contexts = [things.examples(per_context, pick) for _ in range(4)]
        fitted_on = [
            ParallelExample(prefix, contexts, description, f" {kind}")
            for description, kind in things.taken(run.pick(10, 1))
        ]
        setting = APE.fit(lm, fitted_on, store=store)
        in_a_row, nothing, plain = (lm.session() for _ in range(3))
        in_a_row.read(prefix + "".join(contexts))
        nothing.read(prefix)
        plain.read_parallel(contexts, prefix=prefix, temperature=1.0, scale=1.0, store=store)
        (fitted,) = plain.fork()
        fitted.weigh_parallel(temperature=setting.temperature, scale=setting.scale)
        ways = {"in_a_row": in_a_row, "none": nothing, "with_prefix": plain, "fitted": fitted}
        for description, kind in things.taken(run.pick(48, 2)):
            for way, session in ways.items():
                (asked,) = session.fork()
                asked.read(description)
                law = laws(lm, asked.ready(), asked.tokens, ids[:1])[0, ids]
                right.setdefault(way, []).append(things.kinds[int(law.argmax())] == kind)
    told = {way: statistics.fmean(values) for way, values in right.items()}
    count = len(right["fitted"])
    return {
        **{f"kinds_{way}": Quantity(share, "of things", samples=count) for way, share in told.items()},
        "kinds_kept": Quantity(told["fitted"] / max(told["in_a_row"], 1 / count), "x", samples=count),
        "kinds_gain_over_none": Quantity(told["fitted"] - told["none"], "of things", samples=count),
    }


def _measure(run: Run) -> Measurements:
    from plait.engine import APE, ContextStore, load

    yield "loading SmolLM2"
    lm = load("smollm2", weights="fp32")
    pick = random.Random(run.seed)
    num_fitted, num_asked, answer_tokens = run.pick((10, 20, 64), (1, 1, 16))
    low, high = run.pick((150, 300), (30, 60))
    documents = _documents(lm, low, high, pick)
    per_example = run.pick(5, 2)
    examples = []
    for _ in range(num_fitted + num_asked):
        chosen = pick.sample(documents, per_example)
        examples.append(_example(chosen, pick.randrange(per_example), answer_tokens, lm))
    yield f"fitting on {num_fitted} questions"
    store = ContextStore(max_bytes=8 << 30)
    setting = APE.fit(lm, examples[:num_fitted], store=store)

    nats: dict[str, list[float]] = {}
    for number, example in enumerate(examples[num_fitted:]):
        yield f"question {number + 1} of {num_asked}"
        in_a_row, nothing, bare, plain = (lm.session() for _ in range(4))
        in_a_row.read(example.prefix + "".join(example.contexts))
        nothing.read(example.prefix)
        bare.read_parallel(example.contexts, allow_empty_prefix=True, temperature=1.0, scale=1.0, store=store)
        plain.read_parallel(example.contexts, prefix=example.prefix, temperature=1.0, scale=1.0, store=store)
        (fitted,) = plain.fork()
        fitted.weigh_parallel(temperature=setting.temperature, scale=setting.scale)
        ways = {
            "in_a_row": in_a_row, "none": nothing, "without_prefix": bare, "with_prefix": plain, "fitted": fitted
        }  # fmt: skip
        for way, session in ways.items():
            nats.setdefault(way, []).append(_nats(session, example))
    mean = {way: statistics.fmean(values) for way, values in nats.items()}
    gap = {way: value - mean["in_a_row"] for way, value in mean.items()}

    yield "many contexts"
    many = _many_documents(lm, *run.pick((64, 200), (8, 30)), pick)
    many_nats: dict[str, list[float]] = {"many": [], "none": []}
    for asked in range(run.pick(4, 1)):
        example = _example(many, asked, answer_tokens, lm)
        session, nothing = lm.session(), lm.session()
        session.read_parallel(
            example.contexts,
            prefix=example.prefix,
            temperature=setting.temperature,
            scale=setting.scale,
            store=store,
        )
        nothing.read(example.prefix)
        many_nats["many"].append(_nats(session, example))
        many_nats["none"].append(_nats(nothing, example))
    many_tokens = sum(len(lm.tokenizer.encode(text)) for text in example.contexts)
    kinds = yield from _kinds_told(run, lm, store)

    ratios: dict[str, list[float]] = {"first": [], "whole": []}
    timed = _documents(lm, *run.pick((500, 500), (60, 60)), pick)[: run.pick(8, 2)]
    example = _example(timed, 0, answer_tokens, lm)
    lm.session().read_parallel(example.contexts, prefix=example.prefix, store=store)
    new_tokens = run.pick(32, 4)
    for number in range(run.pick(3, 1)):
        yield f"time, round {number + 1}"
        start = time.perf_counter()
        cached = lm.session()
        report = cached.read_parallel(example.contexts, prefix=example.prefix, store=store)
        ready = time.perf_counter() - start
        if report.encoded:
            raise MeasurementError("Contexts were read again although they are in the store.")
        ours = [ready + seconds for seconds in _seconds(cached, example, new_tokens)]
        row = lm.session()
        row.read(example.prefix + "".join(example.contexts))
        theirs = _seconds(row, example, new_tokens)
        ratios["first"].append(theirs[0] / ours[0])
        ratios["whole"].append(theirs[1] / ours[1])
    count = len(nats["fitted"])
    return {
        **{f"nats_{way}": Quantity(value, "nats/token", samples=count) for way, value in mean.items()},
        "fitted_temperature": Quantity(setting.temperature, "", samples=num_fitted),
        "fitted_scale": Quantity(setting.scale, "", samples=num_fitted),
        "gap_to_with_prefix": Quantity(gap["fitted"] / gap["with_prefix"], "x", samples=count),
        "gap_to_without_prefix": Quantity(gap["fitted"] / gap["without_prefix"], "x", samples=count),
        "gain_over_none": Quantity(mean["none"] - mean["fitted"], "nats/token", samples=count),
        "many_contexts_tokens": Quantity(many_tokens, "tokens"),
        "many_contexts_gain_over_none": Quantity(
            statistics.fmean(many_nats["none"]) - statistics.fmean(many_nats["many"]),
            "nats/token",
            samples=len(many_nats["many"]),
        ),
        **kinds,
        "first_token_speedup": Quantity.median(ratios["first"], "x"),
        "whole_answer_speedup": Quantity.median(ratios["whole"], "x"),
    }


CLAIM = Claim(
    name="ape",
    title="Contexts are read once, apart, and used together",
    headline=(
        "Contexts that are read in parallel keep 98 % of the quality of reading them in a row on retrieval and 93 % on "
        "in-context learning, and answers come up to 4.5 times as fast at 128K tokens (8B models, GPU)."
    ),
    source="Yang, Chen, Chen 2025, APE, arXiv:2502.05431",
    scale=(
        "SmolLM2-135M-Instruct in fp32; 5 chapters of Python's manual, cut to 150 to 300 tokens, and a request to repeat "
        "one: nats a token of its first 64 tokens, over 20 requests; temperature and scale fitted on 10 others. Gaps are "
        "to reading the chapters in a row. Many contexts: 64 of 200 tokens, all chapters that are that long and modules of the library, more than the model's "
        "context of 8,192 together. Kinds: 4 contexts of 3 examples of each kind, of iris, wine and breast cancer from scikit-learn, "
        "numbers told as words for fifths; 48 further things of each set, temperature and scale fitted on 10 others. Speed: 8 chapters of 500 tokens in the store, 32 new tokens, against reading all in a row, "
        "turns in 3 rounds."
    ),
    bars=(
        Bar(
            quantity="gap_to_with_prefix",
            relation="<=",
            value=0.65,
            unit="x",
            why="Temperature and scale must close a third of what parallel reading with a prefix loses.",
        ),
        Bar(
            quantity="gap_to_without_prefix",
            relation="<=",
            value=0.25,
            unit="x",
            why="Without a shared prefix every context attracts the weight parked on first tokens.",
        ),
        Bar(
            quantity="gain_over_none",
            relation=">=",
            value=1.5,
            unit="nats/token",
            why="The contexts must be used: without them the answer is nearly unknown.",
        ),
        Bar(
            quantity="many_contexts_gain_over_none",
            relation=">=",
            value=1.0,
            unit="nats/token",
            why="Contexts that share positions may be more than the model's context holds.",
        ),
        Bar(
            quantity="kinds_kept",
            relation=">=",
            value=0.93,
            unit="x",
            why="The paper keeps 93 % of the quality of in-context learning.",
        ),
        Bar(
            quantity="kinds_gain_over_none",
            relation=">=",
            value=0.15,
            unit="of things",
            why="The examples must teach something, or keeping it would mean nothing.",
        ),
        Bar(
            quantity="first_token_speedup",
            relation=">=",
            value=8.0,
            unit="x",
            why="Only prefix and question are read, some 60 of 4,000 tokens.",
        ),
        Bar(
            quantity="whole_answer_speedup",
            relation=">=",
            value=3.0,
            unit="x",
            why="Generating 32 tokens takes equally long on both sides.",
        ),
    ),
    measure=_measure,
    needs=NEEDS,
)
