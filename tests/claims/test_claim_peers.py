"""What claims about models rest on: the peer, the float64 truth, the contest, the texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from plait.claims import MeasurementError, Quantity, contest, follow
from plait.claims.contest import Contestant, Race, decode_contest
from plait.claims.contestant import decode_window
from plait.claims.float64 import hidden_rows
from plait.claims.greedy import by_peer
from plait.claims.texts import manual, source

# Transformers normalises in fp32 whatever the dtype of the model.
NORM_ROUNDING = 1e-5


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """A tiny Llama with grouped heads and random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=10_000.0,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def test_the_float64_pass_is_a_llama(llama: LlamaForCausalLM) -> None:
    tokens = [5, 3, 96, 0, 41, 41, 7, 12, 60, 2, 33]
    with torch.inference_mode():
        expected = llama.double()(torch.tensor([tokens])).logits[0]
        exact = hidden_rows(llama.state_dict(), llama.config, tokens) @ llama.lm_head.weight.T
        llama.float()
    assert exact.dtype == torch.float64
    assert float((exact - expected).abs().max()) < NORM_ROUNDING * float(expected.abs().max())


def test_the_peer_answers_each_row_of_a_padded_batch_as_if_it_were_alone(llama: LlamaForCausalLM) -> None:
    prompts = [[5], [9, 8, 7, 6, 5, 4], [1, 2, 3]]
    counts: list[list[int]] = []
    together = by_peer(llama, prompts, 7, counts.append)
    assert together == [by_peer(llama, [prompt], 7)[0] for prompt in prompts]
    assert counts == [[step] * 3 for step in range(1, 8)]


def test_the_decode_window_begins_when_every_prompt_was_read() -> None:
    marks = [(1.0, [1, 0]), (2.0, [2, 1]), (4.0, [3, 2]), (5.0, [3, 3])]
    assert decode_window(marks) == (3.0, 3, 2)


class Fake:
    """A side of the contest that knows its answers beforehand."""

    answers: Mapping[str, list[list[int]]]
    asked: list[str]

    def __init__(self, name: str, side: str, threads: int, environment: dict[str, str]) -> None:
        self.name = name

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None:
        self.asked.append(f"{self.name} ends")

    def wait_until_ready(self) -> int:
        return 10**9

    def run(self, race: Race) -> dict[str, Any]:
        self.asked.append(self.name)
        fast = {"plait": 1.0, "plait_torch": 4.0, "transformers": 2.0}[self.name]
        tokens = self.answers[self.name]
        return {
            "tokens": tokens,
            "seconds": 2 * fast,
            "decode_seconds": fast,
            "decode_tokens": 4,
            "decode_steps": 3,
        }


def quick_contest(monkeypatch: pytest.MonkeyPatch, theirs: list[list[int]]) -> dict[str, Quantity]:
    """A contest of two rounds in which Plait is twice as fast."""
    monkeypatch.setattr(contest, "Contestant", Fake)
    monkeypatch.setattr(contest, "memory_bandwidth", lambda: 5e9)
    Fake.answers = {"plait": [[1, 2, 3]], "plait_torch": [[1, 2, 3]], "transformers": theirs}
    Fake.asked = []
    races = [Race("batch_1", [[7, 8]], 3)]
    return follow(decode_contest(races, rounds=2, threads=1), lambda line: None)


def test_a_contest_compares_speeds_of_equal_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    quantities = quick_contest(monkeypatch, [[1, 2, 3]])
    assert quantities["batch_1_decode_plait"] == Quantity(4.0, "tokens/s", (4.0, 4.0), 2)
    assert quantities["batch_1_total_transformers"] == Quantity(0.75, "tokens/s", (0.75, 0.75), 2)
    assert quantities["batch_1_decode_ratio_plait"] == Quantity(2.0, "x", (2.0, 2.0), 2)
    assert quantities["batch_1_total_ratio_plait_torch"] == Quantity(0.5, "x", (0.5, 0.5), 2)
    assert quantities["batch_1_weights_read_plait"] == Quantity(3.0, "GB/s", (3.0, 3.0), 2)
    assert quantities["memory_bandwidth"] == Quantity(5.0, "GB/s")
    # A warm-up and two rounds; who goes first changes.
    forwards = ["plait", "plait_torch", "transformers"]
    ends = ["transformers ends", "plait_torch ends", "plait ends"]
    assert Fake.asked == [*forwards[::-1], *forwards, *forwards[::-1], *ends]


def test_a_contest_of_different_texts_reports_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MeasurementError, match="new token 1 of prompt 0 on, so no speed"):
        quick_contest(monkeypatch, [[1, 9, 3]])
    ends = ["transformers ends", "plait_torch ends", "plait ends"]
    assert Fake.asked == ["transformers", "plait_torch", "plait", *ends]


def test_a_shorter_text_is_a_different_text(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MeasurementError, match="new token 2 of prompt 0"):
        quick_contest(monkeypatch, [[1, 2]])


def test_a_side_that_dies_is_reported_with_its_last_words() -> None:
    with Contestant("odd", "nobody", 1) as side, pytest.raises(MeasurementError) as error:
        side.wait_until_ready()
    assert str(error.value) == "odd died in the contest: KeyError: 'nobody'"


def test_the_manual_and_the_sources_are_on_this_machine() -> None:
    assert len(manual()) > 50_000
    assert source("textwrap", "indent").startswith("def indent(")
