"""Traces: what is told of strands and drafts is true, and asking for it changes no answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from plait.decode import Sampling
from plait.engine import LanguageModel, Piece, Request

Make = Callable[..., LanguageModel]
PROMPT = [65, 66, 67, 68] * 60


def pieces_of(lm: LanguageModel, *, trace: bool, memory_bytes: int | None = None) -> list[Piece]:
    engine = lm.new_engine(memory_bytes=memory_bytes)
    engine.submit(
        Request(
            prompt=PROMPT,
            sampling=Sampling(temperature=0),
            max_new_tokens=20,
            ignore_end=True,
            trace=trace,
        )
    )
    pieces = []
    while not engine.is_idle:
        pieces += [piece for _, piece in engine.step()]
        engine.check_integrity()
    return pieces


MEMORIES = [
    "full",
    "gear:bits=4,group=16,buffer=64",
    "window:size=64",
    "lm-infinite:local=64,initial=4",
    "infllm:block=16,local=64,execution=32,initial=16",
]


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("draft", ["none", "prompt-lookup"])
def test_a_trace_says_where_attention_went_and_changes_nothing(
    make_small: Make, memory: str, draft: str
) -> None:
    traced, plain = (pieces_of(make_small(memory, draft), trace=trace) for trace in (True, False))
    assert [piece.choices for piece in traced] == [piece.choices for piece in plain]
    assert all(piece.trace is None for piece in plain)
    length = len(PROMPT)
    for piece in traced:
        assert piece.trace is not None
        strands, tree = piece.trace.strands, piece.trace.draft
        # Shares of one query's attention over everything that it visited.
        assert sum(strand.weight for strand in strands) == pytest.approx(1, abs=1e-3)
        assert all(strand.nbytes > 0 and strand.layers == 2 for strand in strands)
        assert strands[-1].position + strands[-1].tokens <= length + len(tree.tokens)
        assert len(tree.accepted) == len(piece.choices)
        assert [tree.tokens[node] for node in tree.accepted[1:]] == [c.token for c in piece.choices[:-1]]
        length += len(piece.choices)


@pytest.mark.model
def test_a_model_with_a_native_program_is_asked_once_more_and_answers_the_same(
    smollm2_lowered: LanguageModel,
) -> None:
    answers = []
    for trace in (True, False):
        engine = smollm2_lowered.new_engine(memory_bytes=2**27)
        request = smollm2_lowered.request(
            smollm2_lowered.encode("The capital of France is"), max_new_tokens=6, trace=trace
        )
        sequence = engine.submit(request)
        while not engine.is_idle:
            for _, piece in engine.step():
                assert (piece.trace is not None) == trace
                if piece.trace is not None:
                    assert sum(strand.weight for strand in piece.trace.strands) == pytest.approx(1, abs=1e-3)
            engine.check_integrity()
        answers.append(sequence.result().tokens)
    assert answers[0] == answers[1]


@pytest.fixture(scope="session")
def smollm2_lowered(smollm2_gguf: object) -> LanguageModel:
    """SmolLM2 as it is loaded by default."""
    from plait.engine import load

    return load(str(smollm2_gguf))
