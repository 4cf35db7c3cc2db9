"""Models of bytes: small ones on every memory, and the real one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from plait.decode import Sampling
from plait.decode.bytes import END, Marginal
from plait.engine import LanguageModel, ensemble
from plait.errors import ConfigError

STRINGS = [
    "a \U0001f600\U0001f44d ok",
    "\u4f60\u597d\uff0c\u4e16\u754c",
    "one\r\ntwo",
    "x =    1",
    "\t\ty\n\n z",
]


@pytest.mark.parametrize("memory", ["full", "dense:dtype=bf16"])
def test_a_model_whose_tokens_are_bytes_says_the_same(
    make_small: Callable[..., LanguageModel], memory: str
) -> None:
    lm = make_small(memory)
    byte_lm = lm.bytes(start=[0])
    text = "as it was"
    law = byte_lm.next(text)
    assert law.sum() == pytest.approx(1, abs=1e-12)
    greedy = byte_lm.generate(text, max_bytes=6)
    assert len(greedy.data) == 6 or greedy.ended
    state = byte_lm.state(text)
    assert state.settled()[1] == pytest.approx(1)
    # Every byte is a token, so each costs exactly one.
    state.law()
    before = state.reader.tokens_read
    for byte in greedy.data:
        state.push(byte)
        state.law()
    assert state.reader.tokens_read - before == len(greedy.data)


def test_sampling_stops_and_mistakes(make_small: Callable[..., LanguageModel]) -> None:
    byte_lm = make_small().bytes(start=[0])
    sampling = Sampling(temperature=1.0, top_k=5, seed=4)
    first = byte_lm.generate("abc", max_bytes=12, sampling=sampling)
    assert first == byte_lm.generate(b"abc", max_bytes=12, sampling=sampling)
    stopped = byte_lm.generate("abc", max_bytes=12, sampling=sampling, stop=[first.data[3:5]])
    assert first.data.startswith(stopped.data)
    assert len(stopped.data) <= 3
    for call in (
        lambda: byte_lm.generate("abc", max_bytes=0),
        lambda: byte_lm.generate("abc", stop=[b""]),
        lambda: byte_lm.next(b"\xff"),
        lambda: byte_lm.next(7),  # type: ignore[arg-type]
        lambda: byte_lm.next("\ud800"),
        lambda: byte_lm.fill("a", ""),
        lambda: make_small().bytes(start=[9999]),
        lambda: make_small().bytes(),
        lambda: ensemble([make_small()]),
        lambda: make_small().generate("abc", prompt_boundary="word"),
    ):
        with pytest.raises(ConfigError):
            call()


@pytest.mark.model
@pytest.mark.parametrize("text", STRINGS)
def test_pushing_is_beginning_again_and_the_chain_is_the_cover(smollm2: LanguageModel, text: str) -> None:
    byte_lm, data = smollm2.bytes(), text.encode()
    state, total = byte_lm.state(), 0.0
    for count, byte in enumerate(data):
        law = state.law()
        if count in (1, len(data) // 2, len(data) - 1):
            assert np.exp(law) == pytest.approx(byte_lm.next(data[:count]), abs=1e-5)
        total += float(law[byte])
        state.push(byte)
    assert total == pytest.approx(byte_lm.logprob(data), abs=1e-3)
    assert state.law()[END] < 0


@pytest.mark.model
def test_a_cut_word_is_finished(smollm2: LanguageModel) -> None:
    byte_lm = smollm2.bytes()
    assert byte_lm.next("import nump")[ord("y")] > 0.9
    assert smollm2.generate("import nump", max_new_tokens=3, prompt_boundary="exact").text.startswith(
        "y as np"
    )
    healed = smollm2.generate("import nump", max_new_tokens=3, prompt_boundary="healed")
    # One token taken back finishes the word, but not as the exact law goes on.
    assert healed.text.startswith("y")
    assert byte_lm.heal("").ids == byte_lm.start
    marginal = smollm2.bytes(marginal=Marginal(beam=8)).state("import nump")
    assert np.exp(marginal.law())[ord("y")] > 0.9
    settled = smollm2.settle("The capital of France is")
    assert settled.text == ""
    assert settled.share > 0.99
