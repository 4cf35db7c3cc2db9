"""Models that are written: what is read back, by Plait and by Transformers, is the same model."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plait.errors import ConfigError
from plait.memory import Rows
from plait.nn import RandomParameters, Transformer, TransformerConfig, load_transformer, save_transformer
from plait.nn.checkpoints import open_checkpoint
from plait.nn.mixers import AttentionConfig
from plait.nn.rotary import LinearScaling, RopeConfig
from plait.nn.save import GivenParameters, named_tensors
from plait.weights.ggml import FP32, Q8_0
from small_models import small_transformer

IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
# Transformers forms rotary angles in fp32.
AS_TRANSFORMERS = 1e-5


def small(**settings: object) -> Transformer:
    mixer = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, rope=RopeConfig(theta=500.0, dim=8))
    sizes = {"vocab_size": 40, "width": 32, "inner": 64, "max_positions": 64}
    return small_transformer(mixer, mixer, seed=2, **(sizes | settings))  # type: ignore[arg-type]


def logits(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(IDS, Rows([(len(IDS), 0)])))


@pytest.mark.parametrize("settings", [{}, {"tied_head": True}, {"placeholder": 7, "tied_head": True}])
def test_a_written_model_is_read_back_bit_for_bit(tmp_path: Path, settings: dict[str, object]) -> None:
    model = small(**settings)
    save_transformer(model, tmp_path, eos_token_id=[0])
    with open_checkpoint(tmp_path) as checkpoint:
        again = load_transformer(checkpoint, FP32())
    assert again.config == model.config
    assert torch.equal(logits(again), logits(model))
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == [0]


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_it(tmp_path: Path, tied: bool) -> None:
    import transformers

    model = small(tied_head=tied)
    save_transformer(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert (theirs(IDS[None]).logits[0] - logits(model)).abs().max() < AS_TRANSFORMERS


def test_packed_matrices_are_written_as_what_they_stand_for(tmp_path: Path) -> None:
    save_transformer(small(), tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        packed = load_transformer(checkpoint, Q8_0())
    (tmp_path / "again").mkdir()
    save_transformer(packed, tmp_path / "again")
    with open_checkpoint(tmp_path / "again") as checkpoint:
        again = load_transformer(checkpoint, FP32())
    assert torch.allclose(logits(again), logits(packed), atol=1e-5)
    assert not torch.equal(logits(again), logits(small()))


def test_names_are_the_architectures_and_copies_are_trainable() -> None:
    model = small(tied_head=True)
    tensors = named_tensors(model)
    assert set(tensors) >= {"embedding.weight", "norm.weight", "blocks.1.mixer.query.weight"}
    assert not any(re.search("qkv|head", name) for name in tensors)
    assert tensors["blocks.0.mixer.key.weight"].shape == (16, 32)
    copy = Transformer(model.config, GivenParameters(tensors))
    assert torch.equal(logits(copy), logits(model))
    with torch.no_grad():
        next(copy.parameters()).zero_()
    assert not torch.equal(logits(copy), logits(model))
    assert all(parameter.requires_grad for parameter in copy.parameters())


def config_with(change: str) -> TransformerConfig:
    config = small().config
    block = config.blocks[0]
    assert isinstance(block.mixer, AttentionConfig)
    if change == "unequal blocks":
        other = replace(block, feed_forward=replace(block.feed_forward, size=32))
        return replace(config, blocks=(block, other))
    if change == "scaled positions":
        rope = RopeConfig(dim=8, scaling=LinearScaling(factor=2.0))
        return replace(config, blocks=(replace(block, mixer=replace(block.mixer, rope=rope)),) * 2)
    if change == "soft cap":
        return replace(config, logit_softcap=30.0)
    return replace(config, family="gpt2")


@pytest.mark.parametrize("change", ["unequal blocks", "scaled positions", "soft cap", "other family"])
def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path: Path, change: str) -> None:
    model = Transformer(config_with(change), RandomParameters())
    with pytest.raises(ConfigError, match=r"cannot describe this model|not written"):
        save_transformer(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
