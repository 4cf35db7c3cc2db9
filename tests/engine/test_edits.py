"""Edits of a session: only what changed is read, the rest moves, and nothing is changed by half."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from plait.claims.texts import manual, source
from plait.decode.speculate import SPECULATORS
from plait.engine import Edit, EditReport, LanguageModel, Session
from plait.engine.edits import token_edits
from plait.errors import CapacityError, ConfigError, IncompatibleError
from plait.memory import FrozenStrand, Memory, MemoryPlan, Past
from plait.nn import MixerConfig
from plait.nn.mixers import AttentionConfig
from plait.nn.mixers.linear_attention import LinearAttentionConfig
from plait.nn.rotary import RopeConfig
from plait.text import Tokenizer
from small_models import small_transformer

Make = Callable[..., LanguageModel]
TEXT = "def area(width, height):\n    return width * height\n\n\ndef edge(width):\n    return 4 * width\n"


def applied(text: str, edits: list[Edit]) -> str:
    """The text after edits, by hand."""
    for edit in sorted(edits, reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    return text


def random_edits(text: str, pick: random.Random, count: int) -> list[Edit]:
    """Edits that do not overlap: insertions, deletions and replacements by pieces of the text itself."""
    places = sorted(pick.sample(range(len(text) + 1), 2 * count))
    edits = []
    for start, end in zip(places[::2], places[1::2], strict=True):
        end = min(end, start + pick.choice([0, 0, 1, 7, 40]))
        at, size = pick.randrange(len(text)), pick.choice([0, 1, 3, 25])
        edits.append(Edit(start, end, text[at : at + size]))
    return edits


def layer(past: Past, index: int) -> Memory:
    memory = past.layers[index]
    assert isinstance(memory, Memory)
    return memory


def stored(past: Past, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys, turned to the frame of the sequence, and values of every token of a layer."""
    memory = layer(past, index)
    plain = [strand.reframed(0) for strand in memory.all_strands() if isinstance(strand, FrozenStrand)]
    return torch.cat([s.keys for s in plain], dim=1), torch.cat([s.values for s in plain], dim=1)


def read(lm: LanguageModel, text: str) -> Session:
    """A session in which a text was read and is remembered."""
    session = lm.session()
    session.read(text)
    session.fork(1)
    return session


@pytest.mark.model
@pytest.mark.parametrize("name", ["smollm2_tokenizer_of_engine", "gemma3_tokenizer_of_engine"])
def test_edits_in_characters_end_in_the_tokens_of_the_new_text(
    name: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    pick = random.Random(0)
    texts = [
        source("textwrap", "TextWrapper")[:3000],
        manual()[:3000],
        "naïve café — 漢字 🙂\n\n\tx = 1_000\n" * 12,
    ]
    touched, total = 0, 0
    for number in range(150):
        text = texts[number % 3]
        tokens = tokenizer.encode(text)
        edits = random_edits(text, pick, pick.choice([1, 1, 2, 4]))
        changes = token_edits(tokenizer, tokens, edits)
        result, stop = [], 0
        for start, end, ids in changes:
            result += [*tokens[stop:start], *ids]
            stop = end
            touched += len(ids) + end - start
        result += tokens[stop:]
        wanted = applied(text, edits)
        assert tokenizer.decode(result) == wanted
        assert result == tokenizer.encode(wanted)
        total += len(tokens)
    assert touched < total / 10


def test_a_session_with_edits_spells_the_edited_text(make_small: Make) -> None:
    pick = random.Random(1)
    session, text = read(make_small(), TEXT), TEXT
    for _ in range(25):
        edits = random_edits(text, pick, 2)
        text = applied(text, edits)[:200] or "x"
        session.apply(edits)
        if len(session) > 200:
            session.edit(200, len(session.text), "")
        if not session.text:
            session.edit(0, 0, "x")
        assert session.text == text
        assert len(session.past) <= len(session.tokens)
        session.generate(max_new_tokens=1, ignore_end=True)
        session.rewind(len(session) - 1)


@pytest.mark.parametrize("materialise", [False, True])
def test_the_first_layer_is_as_if_everything_had_been_read_again(make_small: Make, materialise: bool) -> None:
    lm = make_small()
    session = read(lm, TEXT)
    session.apply([Edit(9, 14, "w"), Edit(60, 60, "# comment\n")], materialise=materialise)
    session.fork(1)
    anew = read(lm, session.text)
    assert session.tokens == anew.tokens
    for given, wanted in zip(stored(session.past, 0), stored(anew.past, 0), strict=True):
        torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)
    # Deeper layers were computed with the old text in view.
    assert not torch.allclose(stored(session.past, 1)[0], stored(anew.past, 1)[0], atol=1e-3)


def test_only_what_changed_is_read(make_small: Make) -> None:
    lm = make_small()
    session = read(lm, TEXT)
    fed: list[int] = []
    hook = lm.model.register_forward_pre_hook(lambda _, inputs: fed.append(len(inputs[1])))
    report = session.edit(9, 14, "a wide", refresh=0)
    # The last 16 tokens are read with the next answer, because it depends on them most.
    assert report == EditReport(encoded=6 + 16, moved=len(TEXT) - 14 - 16, reused=9)
    assert fed == [6]
    session.generate(max_new_tokens=2, ignore_end=True)
    hook.remove()
    assert fed == [6, 16, 1]


def test_tokens_behind_an_edit_are_read_again_unless_told_otherwise(make_small: Make) -> None:
    lm = make_small()
    text = 2 * TEXT
    report = read(lm, text).edit(9, 14, "a wide")
    assert report == EditReport(encoded=6 + 32 + 16, moved=len(text) - 14 - 32 - 16, reused=9)


def test_edits_at_once_equal_edits_one_after_the_other(make_small: Make) -> None:
    lm = make_small()
    together, apart = read(lm, TEXT), read(lm, TEXT)
    together.apply([Edit(9, 14, "w"), Edit(60, 70, "something else")])
    apart.edit(9, 14, "w")
    apart.edit(56, 66, "something else")
    assert together.tokens == apart.tokens
    for index in (0, 1):
        for one, other in zip(stored(together.past, index), stored(apart.past, index), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("refresh", [10_000, "line"])
def test_refreshing_everything_behind_the_edit_equals_reading_it_again(
    make_small: Make, refresh: Any
) -> None:
    lm = make_small()
    text = TEXT.replace("\n", " ")
    session = read(lm, text)
    report = session.edit(9, 14, "wide", refresh=refresh)
    assert report.moved == 0
    anew = read(lm, session.text)
    session.fork(1)
    for index in (0, 1):
        for one, other in zip(stored(session.past, index), stored(anew.past, index), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    logits = [s.generate(max_new_tokens=8, ignore_end=True, logprobs=1).tokens for s in (session, anew)]
    assert logits[0] == logits[1]


def test_refresh_reads_to_the_end_of_the_line_and_not_further(make_small: Make) -> None:
    session = read(make_small(), TEXT)
    report = session.edit(9, 14, "a wide", refresh="line")
    line = TEXT.index("\n") + 1 - 14
    assert report == EditReport(encoded=6 + line + 16, moved=len(TEXT) - 14 - line - 16, reused=9)


def test_an_edit_at_the_end_is_a_rewind_and_a_read(make_small: Make) -> None:
    lm = make_small()
    session = read(lm, TEXT)
    assert session.edit(80, len(TEXT), "end").moved == 0
    wanted = lm.generate(TEXT[:80] + "end", max_new_tokens=8, ignore_end=True).tokens
    assert session.generate(max_new_tokens=8, ignore_end=True).tokens == wanted


def test_text_that_was_not_read_yet_is_edited_without_the_model(make_small: Make) -> None:
    lm = make_small()
    session = lm.session()
    session.read(TEXT)
    assert session.edit(3, 8, "") == EditReport(len(TEXT) - 5, 0, 0)
    assert session.generate(max_new_tokens=5, ignore_end=True).tokens == (
        lm.generate(applied(TEXT, [Edit(3, 8, "")]), max_new_tokens=5, ignore_end=True).tokens
    )


def test_an_edit_in_one_fork_moves_nothing_in_the_other(make_small: Make) -> None:
    lm = make_small()
    session = read(lm, TEXT)
    (twin,) = session.fork(1)
    wanted = lm.generate(TEXT, max_new_tokens=6, ignore_end=True).tokens
    session.edit(4, 8, "surface")
    assert twin.text == TEXT
    assert twin.generate(max_new_tokens=6, ignore_end=True).tokens == wanted


def test_an_edit_that_changes_nothing_reads_nothing(make_small: Make) -> None:
    session = read(make_small(), TEXT)
    before = session.past
    assert session.edit(4, 8, "area") == EditReport(0, 0, len(TEXT))
    assert session.apply([]) == EditReport(0, 0, len(TEXT))
    assert session.past is before


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([Edit(-1, 2, "")], "from 0 to"),
        ([Edit(5, 4, "")], "the start first"),
        ([Edit(0, 1000, "")], "from 0 to"),
        ([Edit(0, 5, "x"), Edit(4, 6, "y")], "overlap"),
    ],
)
def test_a_wrong_edit_is_refused_and_nothing_is_changed(
    make_small: Make, edits: list[Edit], message: str
) -> None:
    session = read(make_small(), TEXT)
    past, tokens = session.past, list(session.tokens)
    with pytest.raises(ConfigError, match=message):
        session.apply([Edit(90, 90, "good"), *edits])
    assert (session.past, session.tokens) == (past, tokens)


def test_wrong_tokens_sizes_and_closed_sessions_are_refused(make_small: Make) -> None:
    session = read(make_small(), TEXT)
    with pytest.raises(ConfigError, match=r"\[0, 257\)"):
        session.edit_tokens(0, 1, [257])
    with pytest.raises(ConfigError, match="from 0 to"):
        session.edit_tokens(0, 101, [1])
    with pytest.raises(CapacityError, match="512"):
        session.edit(5, 5, "x" * 500)
    for refresh in (-1, "lines", True):
        with pytest.raises(ConfigError, match="refresh"):
            session.edit(5, 5, "x", refresh=refresh)  # type: ignore[arg-type]
    assert session.text == TEXT
    session.close()
    with pytest.raises(ConfigError, match="closed"):
        session.edit(0, 0, "x")


def test_a_failure_in_the_middle_leaves_the_session_as_it_was(
    make_small: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_small()
    session = read(lm, TEXT)
    wanted = lm.generate(TEXT, max_new_tokens=5, ignore_end=True).tokens
    calls = []

    def failing(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError

    monkeypatch.setattr(Past, "splice", failing)
    with pytest.raises(MemoryError):
        session.apply([Edit(1, 2, "abc"), Edit(50, 60, "")], refresh=0)
    assert session.text == TEXT
    assert session.generate(max_new_tokens=5, ignore_end=True).tokens == wanted


def test_special_tokens_are_kept_and_cannot_be_crossed(make_small: Make) -> None:
    lm = make_small()
    session = lm.session()
    session.read_tokens([0, *lm.tokenizer.encode("first"), 0, *lm.tokenizer.encode("second")])
    session.edit(2, 4, "XYZ")
    session.edit(0, 0, ">")
    assert session.text == ">fiXYZtsecond"
    assert [at for at, token in enumerate(session.tokens) if token == 0] == [0, 8]
    with pytest.raises(ConfigError, match="special token"):
        session.edit(5, 9, "")
    session.edit_tokens(0, 9, [])
    assert session.text == "second"


def test_tokens_that_are_no_text_can_be_edited_as_tokens_only(make_small: Make) -> None:
    lm = make_small()
    session = lm.session()
    session.read_tokens([lm.tokenizer.encode("漢")[0], *lm.tokenizer.encode("abc")])
    with pytest.raises(ConfigError, match="do not spell a text"):
        session.edit(1, 1, "x")
    session.edit_tokens(0, 1, [])
    assert session.text == "abc"


def make_other(tokenizer: Tokenizer, *mixers: MixerConfig, seed: int = 1, **changes: Any) -> LanguageModel:
    """A model with other positions, or other mixers."""
    mixers = mixers or (AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=16),)
    return LanguageModel(
        name="other",
        model=small_transformer(
            *mixers, seed=seed, vocab_size=257, width=32, inner=32, max_positions=256, **changes
        ),
        tokenizer=tokenizer,
        chat_template=None,
        plan=MemoryPlan(),
        draft=SPECULATORS.parse("none"),
    )


def test_learned_positions_and_recurrent_states_refuse_by_name(byte_tokenizer: Tokenizer) -> None:
    learned = read(make_other(byte_tokenizer, learned_positions=256), TEXT)
    with pytest.raises(IncompatibleError, match="other has learned positions"):
        learned.edit(5, 5, "x")
    # A replacement by as many tokens moves nothing.
    assert learned.edit(5, 6, "x").moved == 0
    assert len(learned.past) == len(TEXT) - 16
    recurrent = read(make_other(byte_tokenizer, LinearAttentionConfig(num_heads=2, head_dim=16)), TEXT)
    with pytest.raises(IncompatibleError, match="state"):
        recurrent.edit(5, 5, "x")
    assert learned.text == TEXT[:5] + "x" + TEXT[6:]
    assert recurrent.text == TEXT


def test_each_layer_turns_keys_by_its_own_speeds(byte_tokenizer: Tokenizer) -> None:
    def mixer(theta: float, window: int | None) -> AttentionConfig:
        rope = RopeConfig(theta=theta, dim=16)
        return AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16, rope=rope, window=window)

    lm = make_other(byte_tokenizer, mixer(1e4, 40), mixer(1e6, None), seed=2)
    session = read(lm, TEXT)
    session.edit(3, 3, "inserted ", refresh=10_000)
    moved = read(lm, TEXT)
    moved.edit(
        3,
        3,
        "inserted ",
    )
    anew = read(lm, session.text)
    answers = [s.generate(max_new_tokens=6, ignore_end=True, logprobs=1) for s in (session, anew)]
    assert answers[0].tokens == answers[1].tokens
    moved.fork(1)
    keys = stored(moved.past, 0)[0], stored(anew.past, 0)[0][:, : len(moved)]
    torch.testing.assert_close(*keys, atol=1e-5, rtol=1e-5)


def test_a_text_is_edited_behind_what_its_memory_has_dropped_and_not_inside(make_small: Make) -> None:
    lm = make_small("snapkv:capacity=52,window=40,chunk=8")
    session, other = read(lm, TEXT), read(lm, TEXT)
    tokens, nbytes = list(session.tokens), session.nbytes()
    with pytest.raises(
        ConfigError, match=r"at 10: snapkv has dropped some of them\. Go back to at least \d+ or"
    ):
        session.edit_tokens(10, 12, [65, 66, 67])
    assert (session.tokens, session.nbytes()) == (tokens, nbytes)
    end = len(tokens)
    report = session.edit_tokens(end - 30, end - 28, [65, 66, 67], refresh=0)
    assert report.moved == 12
    assert session.tokens == [*tokens[: end - 30], 65, 66, 67, *tokens[end - 28 :]]
    options = {"max_new_tokens": 8, "ignore_end": True}
    assert session.generate(**options).tokens != ()
    assert len(other.generate(**options).tokens) == 8
    # A text that is begun anew is read anew.
    assert session.follow(tokens[:10]) == 0
    assert len(session.generate(**options).tokens) == 8
