"""Contexts read in parallel: what they cost, what they equal, and where they are kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from plait.engine import APE, ContextReport, ContextStore, LanguageModel, ParallelExample, Session
from plait.engine.context_store import ContextKey
from plait.errors import CapacityError, ConfigError, IncompatibleError
from plait.memory import FrozenStrand, Memory, Strand
from plait.memory.arrangements import ParallelGroup

Make = Callable[..., LanguageModel]
PREFIX = "Read these notes. "
NOTES = ["The first note speaks of bees. ", "Another is about a very long winter in the north. ", "Third. "]
QUESTION = "What is it?"


@pytest.fixture
def fed(make_small: Make) -> Iterator[list[int]]:
    rows: list[int] = []
    hook = make_small().model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[1])))
    yield rows
    hook.remove()


def nats(session: Session, answer: str = " yes") -> float:
    (twin,) = session.fork()
    twin.read(QUESTION)
    return twin.score(answer).nats


def test_one_context_without_weights_is_ordinary_reading(make_small: Make) -> None:
    lm = make_small()
    session = lm.session()
    session.read_parallel(NOTES[:1], prefix=PREFIX, temperature=1.0, scale=1.0)
    plain = lm.session()
    plain.read(PREFIX + NOTES[0])
    assert session.tokens == plain.tokens
    assert nats(session) == pytest.approx(nats(plain), abs=1e-4)
    answers = [s.generate(QUESTION, max_new_tokens=8, ignore_end=True).tokens for s in (session, plain)]
    assert answers[0] == answers[1]


def test_the_order_of_contexts_does_not_matter_but_what_they_say_does(make_small: Make) -> None:
    lm = make_small()
    values = []
    for notes in (NOTES, NOTES[::-1], ["", *NOTES, ""], [NOTES[0], NOTES[1], "Other. "]):
        session = lm.session()
        session.read_parallel(notes, prefix=PREFIX)
        values.append(nats(session))
    assert values[1] == pytest.approx(values[0], abs=1e-5)
    assert values[2] == pytest.approx(values[0], abs=1e-5)
    assert values[3] != pytest.approx(values[0], abs=1e-4)


def test_contexts_see_the_prefix_and_themselves_only(make_small: Make) -> None:
    lm = make_small()
    together, alone = lm.session(), lm.session()
    together.read_parallel(NOTES, prefix=PREFIX)
    alone.read(PREFIX + NOTES[2])
    alone.fork()
    start = len(PREFIX)
    for one, other in zip(together.past.layers, alone.past.layers, strict=True):
        assert isinstance(one, Memory)
        assert isinstance(other, Memory)
        (group,) = [strand for strand in one.strands if isinstance(strand, ParallelGroup)]
        (mine,), (wanted,) = group.contexts[2], other.pieces(start, start + len(NOTES[2]))
        assert isinstance(mine, FrozenStrand)
        assert isinstance(wanted, FrozenStrand)
        torch.testing.assert_close(mine.keys, wanted.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mine.values, wanted.values, atol=1e-5, rtol=1e-5)


def test_only_the_longest_counts_and_all_are_read_in_one_pass(make_small: Make, fed: list[int]) -> None:
    lm = make_small()
    session = lm.session()
    report = session.read_parallel(NOTES * 5, prefix=PREFIX)
    distinct = sum(map(len, NOTES))
    assert report == ContextReport(encoded=distinct, cached=0)
    assert fed == [len(PREFIX), distinct]
    assert len(session) == len(PREFIX) + max(map(len, NOTES))
    many = lm.session()
    many.read_parallel([f"{number:03} " * 10 for number in range(40)], prefix=PREFIX)
    assert len(many) < 100
    assert many.generate(QUESTION, max_new_tokens=3, ignore_end=True).tokens


def test_weights_change_what_is_said_and_fitting_finds_the_best(make_small: Make) -> None:
    lm = make_small()
    examples = [
        ParallelExample(PREFIX, NOTES, QUESTION, " bees"),
        ParallelExample(PREFIX, NOTES[1:], "Where?", " north"),
    ]
    by_hand = {}
    for temperature in (1.0, 0.6):
        for scale in (1.0, 0.5):
            total = 0.0
            for example in examples:
                session = lm.session()
                session.read_parallel(
                    example.contexts, prefix=example.prefix, temperature=temperature, scale=scale
                )
                session.read(example.question)
                score = session.score(example.answer)
                total += score.nats / score.tokens
            by_hand[temperature, scale] = total
    assert len({round(value, 4) for value in by_hand.values()}) == 4
    best = APE.fit(lm, examples, temperatures=(1.0, 0.6), scales=(1.0, 0.5))
    assert (best.temperature, best.scale) == min(by_hand, key=by_hand.__getitem__)
    with pytest.raises(ConfigError, match="at least one example"):
        APE.fit(lm, [])


def test_forks_share_contexts_and_sessions_go_on_behind_them(make_small: Make) -> None:
    lm = make_small()
    session = lm.session()
    session.read_parallel(NOTES, prefix=PREFIX)
    first, second = session.fork(2)
    one = first.generate(QUESTION, max_new_tokens=6, ignore_end=True).tokens
    two = second.generate(QUESTION, max_new_tokens=6, ignore_end=True).tokens
    assert one == two
    first.rewind(len(session))
    assert first.generate(QUESTION, max_new_tokens=6, ignore_end=True).tokens == one
    first.read_parallel(["More.", "And more."], temperature=1.0, scale=1.0)
    assert first.generate(QUESTION, max_new_tokens=2, ignore_end=True).tokens
    first.rewind(len(PREFIX))
    plain = lm.generate(PREFIX + QUESTION, max_new_tokens=6, ignore_end=True).tokens
    assert first.generate(QUESTION, max_new_tokens=6, ignore_end=True).tokens == plain


def test_an_edit_in_front_moves_contexts_and_one_inside_is_refused(make_small: Make) -> None:
    lm = make_small()
    session = lm.session()
    session.read_parallel(NOTES, prefix=PREFIX)
    session.read(QUESTION)
    session.fork()
    longest = max(map(len, NOTES))
    report = session.edit(5, 10, "all of the")
    # What is left of the prefix is read again, and the question, which stands behind the contexts.
    again = min(32, len(PREFIX) - 10) + len(QUESTION)
    assert report.encoded == 10 + again
    assert report.moved == len(session) - 15 - again
    assert session.generate(max_new_tokens=3, ignore_end=True).tokens
    start = len(PREFIX) + 5
    for place in (start + 1, start + longest - 1):
        with pytest.raises(ConfigError, match="parallel contexts, which an edit cannot change"):
            session.edit_tokens(place, place + 1, [7])
    session.edit_tokens(start + longest + 2, start + longest + 3, [7])


def test_contexts_are_never_read_anew_by_mistake(make_small: Make) -> None:
    lm = make_small()
    session = lm.session()
    session.read_parallel(NOTES, prefix=PREFIX)
    tokens = list(session.tokens)
    with pytest.raises(ConfigError, match="read a question behind them first"):
        session.generate(max_new_tokens=2)
    with pytest.raises(ConfigError, match="read a question behind them first"):
        session.score("x")
    with pytest.raises(ConfigError, match="cannot be cut"):
        session.rewind(len(PREFIX) + 3)
    assert session.tokens == tokens
    assert session.generate(QUESTION, max_new_tokens=2, ignore_end=True).tokens


def test_bad_contexts_are_refused_and_nothing_is_changed(make_small: Make) -> None:
    lm = make_small()
    session = lm.session()
    with pytest.raises(ConfigError, match="allow_empty_prefix"):
        session.read_parallel(NOTES)
    session.read_parallel(NOTES, allow_empty_prefix=True)
    session.close()
    session = lm.session()
    session.read(PREFIX)
    for settings in ({"temperature": 0.0}, {"scale": -1.0}):
        with pytest.raises(ConfigError, match=f"APE.{next(iter(settings))}"):
            session.read_parallel(NOTES, **settings)  # type: ignore[arg-type]
    with pytest.raises(CapacityError, match=r"prefix of 18 tokens and the longest context of 500 .* of 512"):
        session.read_parallel(["x" * 500, "y"])
    assert session.text == PREFIX
    windowed = make_small("window:size=30,sinks=25").session()
    windowed.read(PREFIX)
    with pytest.raises(ConfigError, match="cannot be cut"):
        windowed.read_parallel(NOTES)
    assert windowed.text == PREFIX
    assert session.read_parallel([]) == session.read_parallel([""]) == ContextReport(0, 0)
    with pytest.raises(ConfigError, match="at least one"):
        lm.session().score("x")
    with pytest.raises(CapacityError, match="512"):
        session.score("x" * 600)


@pytest.mark.parametrize("memory", ["full", "dense:dtype=bf16", "window:size=200,sinks=4"])
def test_contexts_meet_every_memory(make_small: Make, memory: str) -> None:
    session = make_small(memory).session()
    session.read_parallel(NOTES, prefix=PREFIX)
    assert len(session.generate(QUESTION, max_new_tokens=5, ignore_end=True).tokens) == 5


def stored_bits(session: Session) -> list[torch.Tensor]:
    bits = []
    for memory in session.past.layers:
        assert isinstance(memory, Memory)
        for group in memory.strands:
            if isinstance(group, ParallelGroup):
                for strand in group.contexts[0]:
                    assert isinstance(strand, FrozenStrand)
                    bits += [strand.keys, strand.values]
    return bits


@pytest.mark.parametrize("memory", ["full", "dense:dtype=bf16"])
def test_contexts_from_memory_and_from_disk_are_those_read_anew(
    make_small: Make, memory: str, tmp_path: Path, fed: list[int]
) -> None:
    lm = make_small(memory)
    writing = ContextStore(folder=tmp_path)
    sessions = [lm.session() for _ in range(3)]
    total = sum(map(len, NOTES))
    assert sessions[0].read_parallel(NOTES, prefix=PREFIX, store=writing) == ContextReport(total, 0)
    fed.clear()
    assert sessions[1].read_parallel(NOTES[::-1], prefix=PREFIX, store=writing) == ContextReport(0, total)
    reading = ContextStore(folder=tmp_path)
    assert sessions[2].read_parallel(NOTES, prefix=PREFIX, store=reading) == ContextReport(0, total)
    assert fed == [len(PREFIX)] * 2
    assert (writing.hits, writing.misses, reading.hits, reading.misses) == (3, 3, 3, 0)
    for given, wanted in zip(stored_bits(sessions[2]), stored_bits(sessions[0]), strict=True):
        assert torch.equal(given, wanted)
    answers = {s.generate(QUESTION, max_new_tokens=8, ignore_end=True).tokens for s in sessions}
    assert len(answers) == 1


def test_another_prefix_memory_or_model_finds_nothing(make_small: Make, tmp_path: Path) -> None:
    lm = make_small()
    store = ContextStore(folder=tmp_path)
    total = sum(map(len, NOTES))
    lm.session().read_parallel(NOTES, prefix=PREFIX, store=store)
    assert lm.session().read_parallel(NOTES, prefix="Other notes. ", store=store).cached == 0
    assert (
        make_small("dense:dtype=fp16").session().read_parallel(NOTES, prefix=PREFIX, store=store).cached == 0
    )
    weight = next(iter(lm.model.parameters()))
    from plait.engine import context_store

    context_store._FINGERPRINTS.clear()
    before = weight.detach().clone()
    with torch.no_grad():
        weight.flatten()[0] += 1
    try:
        assert lm.session().read_parallel(NOTES, prefix=PREFIX, store=store).cached == 0
    finally:
        with torch.no_grad():
            weight.copy_(before)
        context_store._FINGERPRINTS.clear()
    assert lm.session().read_parallel(NOTES, prefix=PREFIX, store=store).cached == total


def test_what_depends_on_more_than_tokens_is_not_stored(make_small: Make) -> None:
    lm, store = make_small(), ContextStore()
    edited = lm.session()
    edited.read(PREFIX + "And more. ")
    edited.fork()
    edited.edit(5, 10, "a", refresh=0)
    edited.read_parallel(NOTES, store=store)
    behind = lm.session()
    behind.read_parallel(NOTES[:1], prefix=PREFIX)
    behind.fork()[0].read_parallel(NOTES[1:], store=store)
    assert (len(store), store.hits, store.misses) == (0, 0, 0)


def test_the_least_recently_used_contexts_are_dropped(make_small: Make, tmp_path: Path) -> None:
    lm = make_small()
    probe = ContextStore(folder=tmp_path)
    lm.session().read_parallel(["a" * 40], prefix=PREFIX, store=probe)
    one, file = probe.nbytes(), next(tmp_path.iterdir()).stat().st_size
    probe.clear()
    assert list(tmp_path.iterdir()) == []
    store = ContextStore(max_bytes=2 * file + 10, folder=tmp_path)
    assert one <= file
    for clock, letter in enumerate("abac", start=1):
        lm.session().read_parallel([letter * 40], prefix=PREFIX, store=store)
        # Files of one moment have no order.
        for path in tmp_path.iterdir():
            if path.stat().st_mtime > 1e6:
                os.utime(path, (clock, clock))
    assert store.hits == 1
    assert store.nbytes() <= 2 * file + 10
    assert len(store) == len(list(tmp_path.iterdir())) == 2
    store.hits = 0
    lm.session().read_parallel(["a" * 40, "c" * 40], prefix=PREFIX, store=store)
    assert store.hits == 2
    tiny = ContextStore(max_bytes=10)
    lm.session().read_parallel(NOTES, prefix=PREFIX, store=tiny)
    assert (len(tiny), tiny.nbytes()) == (0, 0)
    with pytest.raises(ConfigError, match="max_bytes"):
        ContextStore(max_bytes=-1)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "renamed"])
def test_damaged_files_are_found_and_read_anew(make_small: Make, tmp_path: Path, damage: str) -> None:
    lm = make_small()
    lm.session().read_parallel(NOTES[:2], prefix=PREFIX, store=ContextStore(folder=tmp_path))
    first, second = sorted(tmp_path.iterdir())
    data = bytearray(first.read_bytes())
    if damage == "cut":
        data = data[:-7]
    elif damage == "flipped":
        data[-5] ^= 16
    elif damage == "empty":
        data = bytearray()
    else:
        data = bytearray(second.read_bytes())
    first.write_bytes(data)
    store = ContextStore(folder=tmp_path)
    session = lm.session()
    report = session.read_parallel(NOTES[:2], prefix=PREFIX, store=store)
    assert report.cached in (len(NOTES[0]), len(NOTES[1]))
    assert (store.damaged, store.hits, store.misses) == (1, 1, 1)
    wanted = lm.session()
    wanted.read_parallel(NOTES[:2], prefix=PREFIX)
    assert nats(session) == pytest.approx(nats(wanted), abs=1e-5)
    assert first.stat().st_size > 0


def test_a_full_disk_leaves_no_half_file_and_the_session_as_it_was(
    make_small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, store = make_small(), ContextStore(folder=tmp_path)
    session = lm.session()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        session.read_parallel(NOTES, prefix=PREFIX, store=store)
    assert list(tmp_path.iterdir()) == []
    assert (len(store), len(session)) == (0, 0)


def test_strands_that_are_not_plain_numbers_stay_in_memory(make_small: Make, tmp_path: Path) -> None:
    class Codes(FrozenStrand):
        """Anything that is not exactly the plain strand."""

    lm = make_small()
    session = lm.session()
    session.read_parallel(NOTES[:1], prefix=PREFIX)
    from plait.engine.context_store import Context

    layers: list[list[Strand]] = []
    for memory in session.past.layers:
        assert isinstance(memory, Memory)
        strand = memory.strands[0]
        assert isinstance(strand, FrozenStrand)
        layers.append([Codes(memory.heads, strand.keys, strand.values)])
    key = ContextKey("model", "codes", (1,), (2,))
    with pytest.raises(IncompatibleError, match="codes makes a Codes"):
        ContextStore(folder=tmp_path).put(key, Context(layers))
    store = ContextStore()
    store.put(key, Context(layers))
    assert store.get(key, []) is not None
