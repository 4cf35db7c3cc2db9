"""Prompts read side by side are as prompts read alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from plait.engine import LanguageModel
from plait.errors import CapacityError, ConfigError
from plait.memory import FrozenStrand, Memory
from plait.memory.arrangements import pack

Make = Callable[..., LanguageModel]
LENGTHS = [1, 30, 2, 200, 7, 64, 64, 3, 120, 15]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 257, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture
def fed(make_small: Make) -> Iterator[list[int]]:
    rows: list[int] = []
    hook = make_small().model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[1])))
    yield rows
    hook.remove()


def stored(memory: object) -> list[torch.Tensor]:
    assert isinstance(memory, Memory)
    plain = [strand for strand in memory.all_strands() if isinstance(strand, FrozenStrand)]
    return [torch.cat([s.keys for s in plain], dim=1), torch.cat([s.values for s in plain], dim=1)]


@pytest.mark.parametrize("rows_per_pass", [2048, 150, 40])
def test_packed_prompts_equal_prompts_alone(make_small: Make, rows_per_pass: int) -> None:
    lm = make_small()
    sessions = lm.prefill(prompts(), rows_per_pass=rows_per_pass)
    for prompt, session in zip(prompts(), sessions, strict=True):
        alone = lm.session()
        lm.new_engine().read(prompt[:-1], alone.past)
        assert len(session.past) == len(prompt) - 1
        if len(prompt) > 1:
            for one, other in zip(session.past.layers, alone.past.layers, strict=True):
                for given, wanted in zip(stored(one), stored(other), strict=True):
                    torch.testing.assert_close(given, wanted, atol=1e-4, rtol=1e-4)
        pieces = list(lm.stream(prompt, max_new_tokens=6, ignore_end=True))
        tokens = [choice.token for piece in pieces for choice in piece.choices]
        assert list(session.generate(max_new_tokens=6, ignore_end=True).tokens) == tokens


def test_all_prompts_are_one_pass_without_padding(make_small: Make, fed: list[int]) -> None:
    make_small().prefill(prompts())
    assert fed == [sum(LENGTHS) - len(LENGTHS)]


def test_passes_are_filled_as_packing_says(make_small: Make, fed: list[int]) -> None:
    make_small().prefill(prompts(), rows_per_pass=150)
    first = [min(length - 1, 150) for length in LENGTHS if length > 1]
    bins = [sum(first[index] for index in bin) for bin in pack(first, 150)]
    # The prompt of 199 rows has 49 left for a pass of its own.
    assert fed == [*bins, 49]


def test_a_prompt_changes_nothing_in_its_neighbours(make_small: Make) -> None:
    lm = make_small()
    changed = prompts()
    changed[3] = changed[3][::-1]
    for index, (one, other) in enumerate(zip(lm.prefill(prompts()), lm.prefill(changed), strict=True)):
        if index != 3 and LENGTHS[index] > 1:
            for given, wanted in zip(one.past.layers, other.past.layers, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(stored(given), stored(wanted), strict=True))


def test_sessions_of_one_pass_are_independent(make_small: Make) -> None:
    lm = make_small()
    first, second = lm.prefill(["the same beginning", "the same beginning"])
    first.generate(" of one", max_new_tokens=5, ignore_end=True)
    second.edit(4, 8, "other")
    assert second.text == "the other beginning"
    assert lm.prefill([]) == []


def test_bad_prompts_are_refused_by_their_place(make_small: Make) -> None:
    lm = make_small()
    with pytest.raises(ConfigError, match="Prompt 1 is empty"):
        lm.prefill(["a", ""])
    with pytest.raises(CapacityError, match=r"Prompt 2 has 600 tokens.*512"):
        lm.prefill(["a", "b", "c" * 600])
    with pytest.raises(ConfigError, match=r"\[0, 257\)"):
        lm.prefill([[1, 257, 3]])
    with pytest.raises(ConfigError, match="rows_per_pass"):
        lm.prefill(["a"], rows_per_pass=0)


def test_texts_scored_side_by_side_equal_texts_scored_alone(make_small: Make, fed: list[int]) -> None:
    lm = make_small()
    texts = ["ab", "Once upon a time there was", "x" * 90, "The quick brown fox. " * 7]
    together = lm.score(texts)
    assert fed == [sum(len(text) for text in texts)]
    for text, score in zip(texts, together, strict=True):
        alone = lm.score(text)
        assert score.nats == pytest.approx(alone.nats, rel=1e-5)
        assert score[1:] == alone[1:]
    windows = lm.score(texts, context=32, stride=8)
    assert [score.tokens for score in windows] == [len(text) - 1 for text in texts]
    assert lm.score([]) == []
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        lm.score(["good", "x"])
