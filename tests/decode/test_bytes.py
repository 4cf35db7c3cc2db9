"""The law of the next byte against the sum over all token sequences, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from plait.decode.bytes import END, ByteState, Marginal, MixtureState
from plait.errors import ConfigError
from plait.text import ByteVocabulary, Tokenizer, byte_vocabulary

PIECES = ["<end>", "a", "b", "c", "ab", "bc", "abc", "ca"]
MERGES = [("a", "b"), ("b", "c"), ("ab", "c"), ("c", "a")]
END_ID, START = 0, (0,)
STRINGS = [bytes(text) for size in range(7) for text in itertools.product(b"abc", repeat=size)]


class Table:
    """An order-1 model of tokens: one row of log-probabilities for each last token."""

    def __init__(self, laws: np.ndarray) -> None:
        self.laws = laws

    def read(
        self, main: tuple[int, ...], wanted: Iterable[tuple[int, ...]]
    ) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        yield from ((ids, self.laws[ids[-1]]) for ids in wanted)

    def fork(self) -> Table:
        return Table(self.laws)


@pytest.fixture(scope="module")
def tokens() -> ByteVocabulary:
    tokenizer = Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": PIECES,
            "tokenizer.ggml.token_type": [3] + [1] * 7,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in MERGES],
            "tokenizer.ggml.eos_token_id": END_ID,
        }
    )
    return byte_vocabulary(tokenizer)


@pytest.fixture(scope="module")
def table() -> Table:
    weights = np.random.default_rng(5).gamma(0.4, size=(8, 8)) + 1e-3
    return Table(np.log(weights / weights.sum(axis=1, keepdims=True)))


def naive_encode(text: str) -> tuple[int, ...]:
    symbols = list(text)
    while True:
        pairs = [
            (MERGES.index(pair), i) for i, pair in enumerate(itertools.pairwise(symbols)) if pair in MERGES
        ]
        if not pairs:
            return tuple(PIECES.index(symbol) for symbol in symbols)
        _, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


def brute_force(table: Table, *, valid_only: bool) -> dict[bytes, float]:
    """P of every string of up to 7 bytes as a beginning, by walking all token sequences that cover it."""
    found = dict.fromkeys([*STRINGS, *(s + bytes([b]) for s in STRINGS if len(s) == 6 for b in b"abc")], 0.0)

    def allowed(ids: tuple[int, ...]) -> list[int]:
        text = "".join(PIECES[i] for i in ids)
        return [v for v in range(1, 8) if not valid_only or naive_encode(text + PIECES[v]) == (*ids, v)]

    def walk(ids: tuple[int, ...], probability: float) -> None:
        before = "".join(PIECES[i] for i in ids).encode()
        if len(before) > 6:
            return
        law = np.exp(table.laws[ids[-1] if ids else END_ID])
        options = allowed(ids)
        total = law[[*options, END_ID]].sum()
        for v in options:
            share = probability * law[v] / total
            for size in range(1, len(PIECES[v]) + 1):
                begun = before + PIECES[v].encode()[:size]
                if begun in found:
                    found[begun] += share
            walk((*ids, v), share)

    found[b""] = 1.0
    walk((), 1.0)
    return found


def test_the_law_is_the_sum_over_all_valid_sequences(tokens: ByteVocabulary, table: Table) -> None:
    truth = brute_force(table, valid_only=True)
    for data in STRINGS:
        if truth[data] == 0:
            continue
        law = np.exp(ByteState(tokens, table, START, data).law())
        assert law.sum() == pytest.approx(1, abs=1e-12)
        for byte in b"abc":
            assert abs(law[byte] - truth[data + bytes([byte])] / truth[data]) < 1e-12
        assert abs(law[END] - (1 - sum(truth[data + bytes([b])] for b in b"abc") / truth[data])) < 1e-12
        assert set(np.flatnonzero(law)) <= {*b"abc", END}


def test_pushing_is_beginning_again_and_forks_are_independent(tokens: ByteVocabulary, table: Table) -> None:
    for data in STRINGS[-700::20]:
        state, total = ByteState(tokens, table, START), 0.0
        for count, byte in enumerate(data):
            cold = ByteState(tokens, table, START, data[:count])
            assert np.exp(state.law()) == pytest.approx(np.exp(cold.law()), abs=1e-12)
            total += state.law()[byte]
            twin = state.fork()
            state.push(byte)
            twin.push(ord("a"))
            assert twin.data == data[:count] + b"a"
        assert total == pytest.approx(ByteState(tokens, table, START).log_of(data), abs=1e-10)
        assert total == pytest.approx(ByteState(tokens, table, START, data, base=0).log_total(), abs=1e-10)


def test_the_marginal_law_sums_over_every_sequence(tokens: ByteVocabulary, table: Table) -> None:
    truth = brute_force(table, valid_only=False)
    for data in STRINGS[::7]:
        state = ByteState(tokens, table, START, data, marginal=Marginal(beam=1000))
        law = np.exp(state.law())
        for byte in b"abc":
            assert abs(law[byte] - truth[data + bytes([byte])] / truth[data]) < 1e-12
        assert state.pruned == 0
    narrow = ByteState(tokens, table, START, b"abcabc", marginal=Marginal(beam=2))
    assert 0 < narrow.pruned < 1
    assert np.exp(narrow.law()).sum() == pytest.approx(1)


def test_a_mixture_is_the_mean(tokens: ByteVocabulary, table: Table) -> None:
    other = Table(np.roll(table.laws, 1, axis=1))
    states = [ByteState(tokens, model, START, b"ab") for model in (table, other)]
    mixture = MixtureState([state.fork() for state in states], [3, 1])
    for state in (mixture, *states):
        state.push(ord("c"))
    mean = 0.75 * np.exp(states[0].law()) + 0.25 * np.exp(states[1].law())
    assert np.exp(mixture.law()) == pytest.approx(mean, abs=1e-14)
    twin = mixture.fork()
    twin.push(ord("a"))
    assert mixture.data == b"abc"


def test_mistakes_are_refused_and_change_nothing(tokens: ByteVocabulary, table: Table) -> None:
    state = ByteState(tokens, table, START, b"ab")
    before = state.law().copy()
    for byte in (ord("z"), 0, 256, -1, True):
        with pytest.raises(ConfigError):
            state.push(byte)
    assert (state.law() == before).all()
    assert state.data == b"ab"
    for data in (b"ab\xff", b"xyz", b"\0"):
        with pytest.raises(ConfigError):
            ByteState(tokens, table, START, data)
    with pytest.raises(ConfigError, match="start"):
        ByteState(tokens, table, ())
    for weights in ([1.0], [1.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(ConfigError):
            MixtureState([state, state], weights)
    for beam in (0, -1, 1.5):
        with pytest.raises(ConfigError):
            Marginal(beam=beam)
