"""Guesses that are accepted several at once are stored as if tokens had come one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from plait.decode.speculate import SPECULATORS
from plait.engine import LanguageModel
from plait.memory import Memory, MemoryPlan, Past

Make = Callable[..., LanguageModel]

# What a small model says over and over is guessed right, across many places at which tokens are stored.
PROMPT = "ab ab ab ab ab ab "
MEMORIES = [
    "gear:group=8,buffer=8,rank=2,rank_decode=1",
    "gear:backbone=kcvt,bits=2,buffer=5,rank=0,rank_decode=0",
    "saq:steps=8@16/8@4/rest@2,group=8",
    "think:recent=3,window=4,chunk=5",
    "think:recent=3,window=4,chunk=8,gear:group=8,buffer=8,rank=2,rank_decode=1",
    "window:size=40,sinks=2,gear:group=8,buffer=8,rank=2,rank_decode=1",
    "infllm:local=16,initial=2,block=4,topk=99,cached=99,execution=16,gear:group=4,buffer=4,bits=2",
]
DRAFT = "prompt-lookup:match=2,tokens=7"


def strand_lengths(past: Past) -> list[list[int]]:
    memories = [layer for layer in past.layers if isinstance(layer, Memory)]
    return [[len(strand) for strand in memory.held()] for memory in memories]


def run(lm: LanguageModel, count: int) -> tuple[tuple[int, ...], list[list[int]], int]:
    """Tokens, lengths of all strands, and forward passes."""
    passes: list[int] = []
    hook = lm.model.register_forward_pre_hook(lambda *_: passes.append(1))
    session = lm.session()
    answer = session.generate(PROMPT, max_new_tokens=count, ignore_end=True)
    hook.remove()
    return answer.tokens, strand_lengths(session.past), len(passes)


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
        plain, guessing = (run(make_small(memory, draft=draft), count) for draft in ("none", DRAFT))
        assert guessing[:2] == plain[:2]
        assert guessing[2] < plain[2], "No guess was accepted, so that nothing was tested."
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
