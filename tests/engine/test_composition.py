"""Every codec with every policy in every use: equal to plain use, or refused by name; the page's table is what is found.

Write the table with `PLAIT_WRITE_DOCS=1 python -m pytest tests/engine/test_composition.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from plait.engine import Engine, LanguageModel, Session
from plait.errors import IncompatibleError
from plait.memory import CODECS, POLICIES, MemoryPlan

Make = Callable[..., LanguageModel]

PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "composition.md"
BEGIN, END = "<!-- generated: composition -->", "<!-- end: composition -->"

# Small blocks and buffers, so that tokens are stored, dropped and looked up within some hundred tokens.
CODEC_SPECS = {
    "dense": "dense",
    "dense:dtype=fp16": "dense:dtype=fp16",
    "gear": "gear:group=8,buffer=8,rank=2,rank_decode=1",
    "saq": "saq:steps=8@16/16@8/rest@4,group=8,sink=8@8",
    "snapkv": "snapkv:capacity=32,window=16,chunk=8",
    "think": "think:recent=4,window=4,chunk=8",
    "think, gear": "think:recent=4,window=4,chunk=8,gear:group=8,buffer=8,rank=2,rank_decode=1",
}
POLICY_SPECS = {
    "full": "full",
    "window": "window:size=24,sinks=2",
    "lm-infinite": "lm-infinite:local=24,initial=2",
    # All blocks are seen, since those that are looked up may depend on how many queries look together.
    "infllm": "infllm:local=24,initial=4,block=8,topk=99,cached=99,execution=8,representatives=2",
    "prflash": "prflash:block=8",
}
PROMPTS = [
    "one two three one two three one two three one two",
    "a short one",
    "this is some longer text, longer than the others, so that much of it is old when it ends; so it is",
]
OPTIONS = {"max_new_tokens": 12, "ignore_end": True}


def tokens_of(lm: LanguageModel, prompt: str) -> tuple[int, ...]:
    return lm.generate(prompt, **OPTIONS).tokens


def read(lm: LanguageModel, text: str) -> Session:
    session = lm.session()
    session.read(text)
    return session


def drafts(make: Make, memory: str) -> None:
    """Guesses are checked several at once; the answer is that of plain decoding."""
    guessing = make(memory, draft="prompt-lookup:match=2,tokens=5")
    for prompt in PROMPTS[:2]:
        assert tokens_of(guessing, prompt) == tokens_of(make(memory), prompt)


def batches(make: Make, memory: str) -> None:
    """Sequences side by side answer as each does alone."""
    lm = make(memory)
    assert [one.tokens for one in lm.generate(PROMPTS, **OPTIONS)] == [tokens_of(lm, p) for p in PROMPTS]


def sessions(make: Make, memory: str) -> None:
    """A second turn goes on from the first; a fork answers as the session that it was forked from."""
    session = read(make(memory), PROMPTS[0])
    session.generate(**OPTIONS)
    (twin,) = session.fork()
    answers = [one.generate(" and then", **OPTIONS).tokens for one in (session, twin)]
    assert answers[0] == answers[1]
    assert len(session.tokens) == len(PROMPTS[0]) + len(" and then") + 24


def shared_prefixes(make: Make, memory: str) -> None:
    """Requests that begin alike answer as without sharing what they begin with."""
    lm = make(memory)
    prompts = [PROMPTS[2] + tail for tail in (" red", " green")]
    shared, apart = (_served(lm.new_engine(share_prefixes=shares), lm, prompts) for shares in (True, False))
    assert shared == apart


def _served(engine: Engine, lm: LanguageModel, prompts: list[str]) -> list[tuple[int, ...]]:
    answers = []
    for prompt in prompts:
        sequence = engine.submit(lm.request(lm.encode(prompt), **OPTIONS))
        for _ in engine.run():
            pass
        answers.append(sequence.result().tokens)
    return answers


def packed_prompts(make: Make, memory: str) -> None:
    """Prompts that are read in one pass are remembered as those that are read alone."""
    lm = make(memory)
    sessions = lm.prefill([lm.encode(prompt) for prompt in PROMPTS])
    for session, prompt in zip(sessions, PROMPTS, strict=True):
        assert session.generate(**OPTIONS).tokens == tokens_of(lm, prompt)


def edits(make: Make, memory: str) -> None:
    """A session whose text is edited goes on from the edited text; what is moved is that of the memory's own tests."""
    session = read(make(memory), PROMPTS[2])
    session.generate(max_new_tokens=1, ignore_end=True)
    before, new = list(session.tokens), list(b"is not yet")
    session.edit_tokens(90, 92, new)
    assert session.tokens == [*before[:90], *new, *before[92:]]
    assert len(session.generate(**OPTIONS).tokens) == 12


def parallel_contexts(make: Make, memory: str) -> None:
    """Contexts that are read apart answer alike in any order."""
    answers = []
    for contexts in (PROMPTS, PROMPTS[::-1]):
        session = make(memory).session()
        session.read_parallel(contexts, prefix="notes: ")
        answers.append(session.generate("so", **OPTIONS).tokens)
    assert answers[0] == answers[1]


USES = (drafts, batches, sessions, shared_prefixes, packed_prompts, edits, parallel_contexts)
# What was found of each pair: the reason of each use that was refused.
FOUND: dict[tuple[str, str], dict[str, str]] = {}


def name_of(use: Callable[[Make, str], None]) -> str:
    return use.__name__.replace("_", " ")


def refusals(make: Make, codec: str, policy: str) -> dict[str, str]:
    """The uses that a pair refuses, with the reasons."""
    if (codec, policy) not in FOUND:
        refused = {}
        for use in USES:
            try:
                use(make, f"{POLICY_SPECS[policy]},{CODEC_SPECS[codec]}")
            except IncompatibleError as error:
                refused[name_of(use)] = str(error)
        FOUND[codec, policy] = refused
    return FOUND[codec, policy]


@pytest.mark.parametrize("policy", POLICY_SPECS)
@pytest.mark.parametrize("codec", CODEC_SPECS)
def test_every_use_of_a_pair_equals_plain_use_or_is_refused_by_name(
    make_small: Make, codec: str, policy: str
) -> None:
    names = {policy, *codec.split(":")[0].split(", ")}
    for reason in refusals(make_small, codec, policy).values():
        assert any(re.search(rf"\b{name}\b", reason) for name in names), reason


def cell_of(refused: dict[str, str]) -> str:
    """What the page says of a pair."""
    return "none" if len(refused) == len(USES) else ", ".join(f"no {use}" for use in refused) or "all"


def test_at_least_four_fifths_work_and_the_page_says_which(make_small: Make) -> None:
    cells = {
        (codec, policy): refusals(make_small, codec, policy)
        for codec in CODEC_SPECS
        for policy in POLICY_SPECS
    }
    number = len(cells) * len(USES)
    working = number - sum(map(len, cells.values()))
    assert working >= 0.8 * number
    lines = [
        BEGIN,
        "",
        "| codec | " + " | ".join(POLICY_SPECS) + " |",
        "| --- |" + " --- |" * len(POLICY_SPECS),
    ]
    for codec in CODEC_SPECS:
        row = (cell_of(cells[codec, policy]) for policy in POLICY_SPECS)
        lines.append(f"| `{codec}` | " + " | ".join(row) + " |")
    uses = [name_of(use) for use in USES]
    lines += [
        "",
        f"Uses: {', '.join(uses)}. {working} of {number} combinations work ({working / number:.0%}).",
    ]
    said: dict[str, dict[str, None]] = {}
    for refused in cells.values():
        for use, reason in refused.items():
            said.setdefault(reason, {})[use] = None
    reasons = [
        f"- *{'every use' if len(found) == len(USES) else ', '.join(found)}*: {reason}"
        for reason, found in said.items()
    ]
    lines += ["", *(["What is refused says:", "", *reasons] if reasons else ["Nothing is refused."]), "", END]
    text = PAGE.read_text("utf-8")
    written = text[: text.index(BEGIN)] + "\n".join(lines) + text[text.index(END) + len(END) :]
    if os.environ.get("PLAIT_WRITE_DOCS"):
        PAGE.write_text(written, "utf-8")
    assert text == written, "Run PLAIT_WRITE_DOCS=1 python -m pytest tests/engine/test_composition.py"


def test_the_table_has_every_method() -> None:
    codecs = {MemoryPlan.parse(spec).codec.name for spec in CODEC_SPECS.values()}
    assert codecs == set(CODECS.names())
    assert set(POLICY_SPECS) == set(POLICIES.names())
