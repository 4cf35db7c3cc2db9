"""Guesses that are accepted several at once are stored as if tokens had come one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from plait.decode.speculate import SPECULATORS, Context, Speculator, Tree
from plait.engine import Engine, LanguageModel
from plait.memory import Memory, MemoryPlan, Past

Make = Callable[..., LanguageModel]

PROMPT = list(b"one two three one two")
MEMORIES = [
    "gear:group=8,buffer=8,rank=2,rank_decode=1",
    "gear:backbone=kcvt,bits=2,buffer=5,rank=0,rank_decode=0",
    "saq:steps=8@16/8@4/rest@2,group=8",
    "think:recent=3,window=4,chunk=5",
    "think:recent=3,window=4,chunk=8,gear:group=8,buffer=8,rank=2,rank_decode=1",
    "snapkv:capacity=12,window=5,chunk=4",
    "snapkv:capacity=14,window=5,chunk=3,sinks=2,think:ratio=0.4,window=7,gear:group=8,buffer=8,rank=2,rank_decode=1",
    "window:size=40,sinks=2,gear:group=8,buffer=8,rank=2,rank_decode=1",
    "infllm:local=16,initial=2,block=4,topk=99,cached=99,execution=16,gear:group=4,buffer=4,bits=2",
]


class Told(Speculator):
    """Proposes what follows, and something wrong behind it."""

    def __init__(self, truth: Sequence[int]) -> None:
        self.truth = truth

    def propose(self, context: Context) -> Tree:
        at = len(context.tokens)
        right = self.truth[at : at + min(at % 9, context.budget - 1)]
        wrong = [(self.truth[at] + 1) % 257] if at < len(self.truth) and context.budget > 1 else []
        return Tree.chain([context.tokens[-1], *right, *wrong])


def strand_lengths(past: Past) -> list[list[int]]:
    memories = [layer for layer in past.layers if isinstance(layer, Memory)]
    return [[len(strand) for strand in memory.held()] for memory in memories]


def answered(
    lm: LanguageModel, count: int, truth: Sequence[int] = ()
) -> tuple[tuple[int, ...], list[list[int]], int]:
    """Tokens, lengths of all strands of every layer, and forward passes."""
    engine = Engine(lm.model, lm.tokenizer, lm.plan, new_speculator=lambda: Told(truth))
    past = lm.model.new_past(lm.plan)
    sequence = engine.submit(lm.request(PROMPT, max_new_tokens=count, ignore_end=True), past)
    passes = 0
    while not engine.is_idle:
        engine.step()
        passes += 1
    return sequence.result().tokens, strand_lengths(past), passes


@pytest.mark.parametrize("memory", MEMORIES)
def test_answers_and_stored_strands_are_those_of_plain_decoding(
    make_small: Make, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut: list[int] = []
    rows_at_once = Past.rows_at_once

    def noted(past: Past, least: int, most: int) -> int:
        found = rows_at_once(past, least, most)
        cut.append(most - found)
        return found

    monkeypatch.setattr(Past, "rows_at_once", noted)
    for count in (30, 61):
        lm = make_small(memory)
        plain = answered(lm, count)
        guessing = answered(lm, count, [*PROMPT, *plain[0]])
        assert guessing[:2] == plain[:2]
        assert guessing[2] < 0.7 * plain[2], "Few guesses were accepted, so that nothing was tested."
    assert any(cut), "No accepted path reached a place at which tokens are stored."


def test_smollm2_repeats_a_list_through_four_bits_as_without_guesses(smollm2: LanguageModel) -> None:
    answers = []
    prompt = "red, green, blue, white, black, pink, grey, brown. " * 4 + "red, green,"
    for draft in ("none", "prompt-lookup:match=2,tokens=8"):
        lm = LanguageModel(
            name="smollm2",
            model=smollm2.model,
            tokenizer=smollm2.tokenizer,
            chat_template=None,
            plan=MemoryPlan.parse("gear:bits=2,group=16,buffer=16"),
            draft=SPECULATORS.parse(draft),
        )
        answers.append(lm.generate(prompt, max_new_tokens=40, ignore_end=True).tokens)
    assert answers[0] == answers[1]
