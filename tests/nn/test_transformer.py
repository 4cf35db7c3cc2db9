"""The decoder as such: any configuration, packed or alone, at once or through memory."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import at_once, random_ids, through_memory

from plait.errors import CapacityError, ConfigError, IncompatibleError
from plait.memory import MemoryPlan, Rows
from plait.nn import (
    BlockConfig,
    FeedForwardConfig,
    NormConfig,
    RandomParameters,
    Transformer,
    TransformerConfig,
)
from plait.nn.distance_bias import Harmonic, Linear
from plait.nn.mixers import AttentionConfig
from plait.nn.rotary import LinearScaling, RopeConfig, YaRN

VOCABULARY = 101
POSITIONS = 40


@st.composite
def block_configs(draw: st.DrawFn) -> BlockConfig:
    kv_heads = draw(st.integers(1, 3))
    head_dim = draw(st.integers(2, 9))
    rope = None
    if draw(st.booleans()):
        scalings = [None, LinearScaling(factor=3.0), YaRN(factor=2.0, original_max_position_embeddings=16)]
        rope = RopeConfig(dim=head_dim // 2 * 2, scaling=draw(st.sampled_from(scalings)))
    return BlockConfig(
        mixer=AttentionConfig(
            num_heads=kv_heads * draw(st.integers(1, 3)),
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            scale=draw(st.sampled_from([None, 0.3])),
            softcap=draw(st.sampled_from([None, 2.0])),
            rope=rope,
            window=draw(st.none() | st.integers(1, 12)),
            qkv_bias=draw(st.booleans()),
            output_bias=draw(st.booleans()),
            qk_norm=draw(st.booleans()),
            distance_bias=draw(
                st.sampled_from([None, Harmonic(limit=9), Linear(slopes="harmonic", weight=0.2, product=1.5)])
            ),
        ),
        feed_forward=FeedForwardConfig(
            size=draw(st.integers(1, 20)),
            activation=draw(st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"])),
            gated=draw(st.booleans()),
            bias=draw(st.booleans()),
        ),
        norms=draw(st.sampled_from(["pre", "post", "sandwich"])),
    )


@st.composite
def configs(draw: st.DrawFn) -> TransformerConfig:
    shift = draw(st.integers(0, 2))
    learned = draw(st.booleans())
    width = draw(st.integers(2, 24))
    return TransformerConfig(
        family="random",
        vocab_size=VOCABULARY,
        width=width,
        blocks=tuple(draw(st.lists(block_configs(), min_size=1, max_size=3))),
        norm=NormConfig(
            kind=draw(st.sampled_from(["rms", "layer"])),
            epsilon=1e-3,
            has_weight=draw(st.booleans()),
            has_bias=draw(st.booleans()),
        ),
        max_positions=POSITIONS,
        embedding_width=draw(st.none() | st.integers(1, 16)),
        learned_positions=POSITIONS + shift if learned else None,
        position_shift=shift if learned else 0,
        embedding_scale=draw(st.sampled_from([1.0, 2.5])),
        final_norm=draw(st.booleans()),
        tied_head=draw(st.booleans()),
        head_bias=draw(st.booleans()),
        logit_scale=draw(st.sampled_from([1.0, 0.5])),
        logit_softcap=draw(st.sampled_from([None, 3.0])),
    )


def small(**changes: object) -> TransformerConfig:
    """A configuration of the Llama kind."""
    block = BlockConfig(
        mixer=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, rope=RopeConfig(dim=8)),
        feed_forward=FeedForwardConfig(size=24),
    )
    config = TransformerConfig(
        family="llama",
        vocab_size=VOCABULARY,
        width=16,
        blocks=(block, block),
        norm=NormConfig(),
        max_positions=POSITIONS,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)


def test_learned_positions_refuse_a_limit_of_distances() -> None:
    model = Transformer(small(learned_positions=POSITIONS), RandomParameters(0))
    with pytest.raises(
        IncompatibleError, match=r"lm-infinite limits distances .* a row for each of \d+ positions"
    ):
        model.new_past(MemoryPlan.parse("lm-infinite"))


@given(configs(), st.lists(st.integers(1, 11), min_size=1, max_size=4), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_pieces_through_memory_equal_the_parallel_form(
    config: TransformerConfig, sizes: list[int], seed: int
) -> None:
    model = Transformer(config, RandomParameters(seed)).eval()
    ids = random_ids(min(sum(sizes), POSITIONS), seed)
    sizes[-1] -= sum(sizes) - len(ids)
    close(through_memory(model, ids, sizes), at_once(model, ids))


@given(configs(), st.lists(st.integers(0, 9), min_size=2, max_size=4), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_packed_sequences_do_not_see_each_other(
    config: TransformerConfig, lengths: list[int], seed: int
) -> None:
    """Several sequences in one pass, each with a past of its own, as if each were alone."""
    model = Transformer(config, RandomParameters(seed)).eval()
    texts = [random_ids(5 + length, seed + place) for place, length in enumerate(lengths)]
    with torch.inference_mode():
        pasts = [model.new_past(MemoryPlan()) for _ in texts]
        for text, past in zip(texts, pasts, strict=True):
            model(text[:5], Rows([(5, 0)]), [past])
            past.commit()
        hidden = model(
            torch.cat([text[5:] for text in texts]), Rows([(length, 5) for length in lengths]), pasts
        )
        packed = model(torch.cat(texts), Rows([(len(text), 0) for text in texts]))
        at_once_logits, later_logits = model.logits(packed), model.logits(hidden)
    alone = [at_once(model, text) for text in texts]
    close(at_once_logits, torch.cat(alone))
    close(later_logits, torch.cat([logits[5:] for logits in alone]))


@given(configs())
@settings(max_examples=40, deadline=None)
def test_every_configuration_survives_json(config: TransformerConfig) -> None:
    assert TransformerConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@given(configs())
@settings(max_examples=20, deadline=None)
def test_gradients_reach_every_parameter(config: TransformerConfig) -> None:
    """The parallel form trains: nothing is cut off, and nothing is made but not used."""
    config = replace(config, logit_softcap=None)
    model = Transformer(config, RandomParameters(1))
    ids = random_ids(9)
    logits = model.logits(model(ids, Rows([(9, 0)])))
    (logits * torch.randn(logits.shape)).sum().backward()
    untouched = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert untouched == []


def test_equal_seeds_make_equal_models() -> None:
    ids = random_ids(8)
    first, second, other = (Transformer(small(), RandomParameters(seed)) for seed in (3, 3, 4))
    assert torch.equal(at_once(first, ids), at_once(second, ids))
    assert not torch.allclose(at_once(first, ids), at_once(other, ids))


def test_tied_head_is_the_embedding_itself() -> None:
    tied = Transformer(small(tied_head=True), RandomParameters())
    assert tied.head.weight is tied.embedding.weight
    free = Transformer(small(), RandomParameters())
    difference = sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in tied.parameters())
    assert difference == VOCABULARY * 16


def test_logits_are_scaled_then_capped() -> None:
    plain = Transformer(small(), RandomParameters())
    changed = Transformer(small(logit_scale=20.0, logit_softcap=5.0), RandomParameters())
    hidden = torch.randn(3, 16)
    wanted = 5 * torch.tanh(20 * plain.logits(hidden) / 5)
    torch.testing.assert_close(changed.logits(hidden), wanted)
    assert wanted.abs().max() > 4


def test_rows_may_come_as_embeddings() -> None:
    model = Transformer(small(embedding_width=6, embedding_scale=3.0), RandomParameters())
    ids, rows = random_ids(7), Rows([(7, 0)])
    embedded = model.embed(ids)
    assert embedded.shape == (7, 6)
    torch.testing.assert_close(embedded, 3 * model.embedding(ids))
    assert torch.equal(model(None, rows, embeddings=embedded), model(ids, rows))
    with pytest.raises(ConfigError, match="tokens or embeddings"):
        model(None, rows)


@pytest.mark.parametrize("bad", [-1, VOCABULARY, 1 << 40])
def test_ids_outside_the_vocabulary(bad: int) -> None:
    model = Transformer(small(), RandomParameters())
    with pytest.raises(ConfigError, match=rf"\[0, {VOCABULARY}\). Got {bad}"):
        model(torch.tensor([1, bad, 2]), Rows([(3, 0)]))


def test_learned_positions_end() -> None:
    config = small(learned_positions=10, position_shift=2)
    model = Transformer(config, RandomParameters())
    model(random_ids(8), Rows([(8, 0)]))
    model(random_ids(3), Rows([(3, 5)]))
    for length, first in ((9, 0), (3, 6)):
        with pytest.raises(CapacityError, match="positions for 8 tokens"):
            model(random_ids(length), Rows([(length, first)]))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_heads": 3},
        {"num_heads": 0},
        {"softcap": 0.0},
        {"rope": RopeConfig(dim=10)},
        {"window": 0},
        {"head_dim": "8"},
    ],
)
def test_attention_that_cannot_be(changes: dict[str, object]) -> None:
    good = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8)
    with pytest.raises(ConfigError, match=next(iter(changes))):
        replace(good, **changes)
