"""Memories of layers whose scores have a bias by distance: every codec, moved and shared strands, drafts, packed batches.

`memory_oracle.LAYERS` brings such layers into the tests of policies, visits, frames and parallel contexts.
"""

from __future__ import annotations

import pytest
import torch
from memory_methods import CODEC_ENTRIES, CodecEntry
from memory_oracle import (
    LAYERS,
    SLOPES,
    TokenTable,
    assert_equal_to,
    biases,
    ids_of,
    new_memory,
    paths_of,
    random_tree,
)

from plait.errors import ConfigError
from plait.memory import Heads, Memory, MemoryPlan, Rows, attend
from plait.ops import DistanceBias

BIASED = ["alibi", "harmonic"]
each_layer = pytest.mark.parametrize("layer", BIASED)


def needs_places(codec: CodecEntry) -> bool:
    """Whether a bias would need to know where the tokens that a codec keeps have stood."""
    return MemoryPlan.parse(codec.spec).codec.drops_tokens


@each_layer
@pytest.mark.parametrize(
    "codec", [codec for codec in CODEC_ENTRIES if needs_places(codec)], ids=lambda codec: codec.spec
)
def test_a_codec_that_drops_tokens_refuses_the_layer(codec: CodecEntry, layer: str) -> None:
    with pytest.raises(ConfigError, match="a bias by distance needs"):
        new_memory(LAYERS[layer], codec.spec)


@each_layer
@pytest.mark.parametrize(
    "codec", [codec for codec in CODEC_ENTRIES if not needs_places(codec)], ids=lambda codec: codec.spec
)
def test_every_codec_keeps_its_bound(codec: CodecEntry, layer: str) -> None:
    table, ids = TokenTable(LAYERS[layer], dead=codec.dead), ids_of(48)
    tolerance = codec.tolerance(table)
    memory = new_memory(LAYERS[layer], codec.spec)
    table.write(memory, ids, [40])
    tree = random_tree(6, torch.Generator().manual_seed(3))
    draft = ids_of(6, seed=2)
    given = memory.attend(*table.rows(draft), mask=tree)
    assert_equal_to(given, table.answer(ids, draft, parents=tree.parents), tolerance)
    path = max(paths_of(tree), key=len)
    memory.commit(path)
    ids += [draft[node] for node in path]
    assert_equal_to(table.write(memory, ids[:5], [2]), table.answer(ids, ids[:5]), tolerance)


@each_layer
def test_moved_tokens_are_seen_from_where_they_stand_now(layer: str) -> None:
    table, ids, before, new = TokenTable(LAYERS[layer]), ids_of(40), ids_of(7, 1), ids_of(5, 2)
    source, target = new_memory(LAYERS[layer]), new_memory(LAYERS[layer])
    table.write(source, ids, [11])
    table.write(target, before)
    target.splice(source, 9, 31)
    assert_equal_to(table.write(target, new, [1]), table.answer([*before, *ids[9:31]], new))


@each_layer
def test_sequences_that_share_a_past_equal_lone_ones(layer: str) -> None:
    table, past = TokenTable(LAYERS[layer]), ids_of(90)
    memories = [new_memory(LAYERS[layer])]
    table.write(memories[0], past)
    pasts = []
    for number in range(3):
        memories.append(memories[0].fork())
        own = ids_of(3 * number, seed=number)
        table.write(memories[-1], own) if own else None
        pasts.append([*past, *own])
    tree = random_tree(5, torch.Generator().manual_seed(4))
    news = [ids_of(n, seed=9 + n) for n in (1, 5, 2)]
    rows = Rows([(1, len(pasts[0])), (5, len(pasts[1]), tree), (2, len(pasts[2]))])
    out = attend(memories[1:], *table.rows([token for new in news for token in new]), rows)
    for segment, ids, new in zip(rows.segments, pasts, news, strict=True):
        parents = tree.parents if segment.mask is tree else None
        assert_equal_to(out[segment.rows], table.answer(ids, new, parents=parents))


def test_pieces_of_a_prompt_give_the_bits_of_no_other_law() -> None:
    """What a bias takes off is what the oracle takes off, so a layer without it answers otherwise."""
    table, ids = TokenTable(LAYERS["harmonic"]), ids_of(60)
    given = table.write(new_memory(LAYERS["harmonic"]), ids, [7, 8, 40])
    plain = table.write(Memory(LAYERS["grouped"], new_memory().plan), ids)
    assert (given - plain).abs().max() > 0.1
    assert biases(LAYERS["harmonic"], [[0, 1, 2]])[0, 0].tolist() == pytest.approx([0.0, -1.5, -2.25])


def test_slopes_for_other_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Heads.bias must have a slope for each of 2 heads. Got 4"):
        Heads(2, 1, 8, scale=1.0, bias=DistanceBias(SLOPES, "linear"))
