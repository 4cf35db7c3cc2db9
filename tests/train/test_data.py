"""Packed batches: every token once an epoch, no padding, the same order for a seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import ConfigError, ModelFileError
from plait.train import Batches, TokenData
from plait.train.data import Piece


def numbered(lengths: list[int]) -> TokenData:
    """Documents in which every token is another id, so that it can be followed."""
    ids = torch.arange(sum(lengths))
    return TokenData(ids, lengths, notes={"double": 2 * ids})


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    rows=st.integers(1, 25),
    context=st.integers(1, 12),
    seed=st.integers(0, 3),
)
def test_an_epoch_gives_every_token_at_most_once_in_full_batches(
    lengths: list[int], rows: int, context: int, seed: int
) -> None:
    data = numbered(lengths)
    if len(data) < rows:
        with pytest.raises(ConfigError, match="needs as many"):
            Batches(data, rows=rows, context=context, seed=seed)
        return
    batches = Batches(data, rows=rows, context=context, seed=seed)
    seen: list[int] = []
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    for number in range(batches.per_epoch):
        batch = batches[number]
        assert sum(len(piece.ids) for piece in batch) == rows
        for piece in batch:
            assert 0 < len(piece.ids) <= context
            assert torch.equal(piece.ids, torch.arange(int(piece.ids[0]), int(piece.ids[0]) + len(piece.ids)))
            assert len(document[piece.ids].unique()) == 1
            assert torch.equal(piece.notes["double"], 2 * piece.ids)
            seen += piece.ids.tolist()
    assert len(seen) == len(set(seen)) == batches.per_epoch * rows
    assert len(data) - len(seen) < rows


def flat(batch: list[Piece]) -> list[int]:
    return [token for piece in batch for token in piece.ids.tolist()]


def test_a_batch_is_a_function_of_its_number() -> None:
    data = numbered([50, 30, 7, 40])
    first = Batches(data, rows=16, context=9, seed=4)
    wanted = [flat(first[number]) for number in range(20)]
    again = Batches(data, rows=16, context=9, seed=4)
    assert [flat(again[number]) for number in reversed(range(20))] == wanted[::-1]
    assert [flat(Batches(data, rows=16, context=9, seed=5)[0])] != wanted[:1]
    # Another epoch has another order.
    assert wanted[0] != wanted[first.per_epoch]


def test_data_is_saved_whole_and_told_apart(tmp_path: Path) -> None:
    data = numbered([5, 1, 9])
    data.save(tmp_path / "data.safetensors")
    again = TokenData.load(tmp_path / "data.safetensors")
    assert again.fingerprint() == data.fingerprint()
    assert again.lengths == data.lengths
    assert torch.equal(again.notes["double"], data.notes["double"])
    other = numbered([5, 1, 9])
    other.weights[3] = 0.5
    assert other.fingerprint() != data.fingerprint()
    assert numbered([6, 9]).fingerprint() != numbered([9, 6]).fingerprint()


def test_damaged_data_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "data.safetensors"
    for content in (b"", b"nonsense that is not a header"):
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match="no token data"):
            TokenData.load(path)
    with pytest.raises(ModelFileError, match="no token data"):
        TokenData.load(tmp_path / "absent")
    with pytest.raises(ConfigError, match="one weight and one note"):
        TokenData(torch.arange(4), [3])


def test_the_first_tokens_keep_their_documents() -> None:
    data = numbered([5, 1, 9])
    assert data.first(8).lengths == [5, 1, 2]
    assert data.first(8).notes["double"].tolist() == list(range(0, 16, 2))
    assert data.first(100).fingerprint() == data.fingerprint()
    assert data.counting_all().weights.tolist() == [1.0] * 15
