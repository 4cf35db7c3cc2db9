"""Models whose attention has a bias by distance: as data, in files, packed, and never in a program that ignores it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import at_once, through_memory
from torch import Tensor

from plait.errors import ConfigError, ModelFileError
from plait.nn import Transformer, load_transformer, lower, save_transformer
from plait.nn.checkpoints import open_checkpoint
from plait.nn.distance_bias import BIASES, DistanceBiasConfig, Harmonic, Linear
from plait.nn.lowered import obstacle
from plait.nn.mixers import AttentionConfig
from plait.nn.mixers.attention import Attention
from plait.nn.rotary import RopeConfig
from plait.nn.save import GivenParameters, named_tensors
from plait.train import ModelShape
from plait.weights.ggml import FP32, Q8_0
from small_models import small_transformer

IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3])
PLAIN = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, rope=RopeConfig(dim=8))
MIXERS = {
    "rotary and harmonic": replace(PLAIN, distance_bias=Harmonic(limit=5)),
    "harmonic alone": replace(PLAIN, rope=None, distance_bias=Harmonic(slopes="alibi", weight=3.0)),
    "alibi": replace(PLAIN, rope=None, distance_bias=Linear()),
    "weighted": replace(PLAIN, distance_bias=Linear(weight=0.5, product=1.25)),
}
each_mixer = pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)


def small(*mixers: AttentionConfig, **settings: Any) -> Transformer:
    sizes = {"vocab_size": 40, "width": 32, "inner": 64, "max_positions": 64}
    with torch.no_grad():
        model = small_transformer(*mixers, seed=2, **(sizes | settings))  # type: ignore[arg-type]
    # So that scores differ by as much as those of trained models.
    for parameter in model.parameters():
        parameter.data *= 2
    return model


def with_mixer(model: Transformer, mixer: AttentionConfig, family: str = "plait") -> Transformer:
    """The same parameters with other attention in every block."""
    blocks = tuple(replace(block, mixer=mixer) for block in model.config.blocks)
    return Transformer(
        replace(model.config, blocks=blocks, family=family), GivenParameters(named_tensors(model))
    ).eval()


def logits(model: Transformer) -> Tensor:
    return at_once(model, IDS)


def test_a_weight_of_zero_is_plain_attention_bit_for_bit() -> None:
    model = small(PLAIN, PLAIN)
    for bias in (Harmonic(weight=0), Linear(weight=0, slopes="harmonic")):
        assert torch.equal(logits(with_mixer(model, replace(PLAIN, distance_bias=bias))), logits(model))
    biased = with_mixer(model, replace(PLAIN, distance_bias=Harmonic()))
    assert (logits(biased) - logits(model)).abs().max() > 1e-2


def test_weights_scale_what_they_say() -> None:
    wide = replace(PLAIN, distance_bias=Harmonic(product=3.0, weight=0))
    scaled = replace(PLAIN, scale=3.0 * 8**-0.5)
    model = small(PLAIN)
    assert torch.equal(logits(with_mixer(model, wide)), logits(with_mixer(model, scaled)))
    mixer = small(replace(PLAIN, distance_bias=Linear(weight=2.0))).blocks[0].mixer  # type: ignore[union-attr]
    assert isinstance(mixer, Attention)
    assert mixer.heads.bias is not None
    assert mixer.heads.bias.slopes.tolist() == [2 * 2.0 ** (-2 * h) for h in range(1, 5)]


@each_mixer
@pytest.mark.parametrize("sizes", [[16], [1] * 16, [7, 2, 7]], ids=str)
def test_a_prompt_in_chunks_equals_the_parallel_form(mixer: AttentionConfig, sizes: list[int]) -> None:
    model = small(mixer, mixer)
    torch.testing.assert_close(through_memory(model, IDS, sizes), logits(model), atol=2e-4, rtol=2e-4)


@each_mixer
def test_a_written_model_is_read_back_bit_for_bit(tmp_path: Path, mixer: AttentionConfig) -> None:
    model = small(mixer, mixer, tied_head=True)
    model.config = replace(model.config, family="plait")
    save_transformer(model, tmp_path, eos_token_id=[0])
    with open_checkpoint(tmp_path) as checkpoint:
        again = load_transformer(checkpoint, FP32())
    assert again.config == model.config
    assert torch.equal(logits(again), logits(model))


def test_files_of_the_family_hold_any_attention(tmp_path: Path) -> None:
    other = replace(
        PLAIN, num_heads=2, softcap=9.0, window=4, qk_norm=True, qkv_bias=True, distance_bias=Harmonic()
    )
    model = small(MIXERS["alibi"], other, logit_softcap=5.0)
    model.config = replace(model.config, family="plait")
    save_transformer(model, tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        again = load_transformer(checkpoint, FP32())
    assert torch.equal(logits(again), logits(model))


def test_a_llama_file_cannot_say_it_and_nothing_else_opens_ours(tmp_path: Path) -> None:
    import transformers

    model = small(MIXERS["rotary and harmonic"])
    with pytest.raises(ConfigError, match=r"family llama cannot describe .* its family to plait"):
        save_transformer(model, tmp_path / "llama")
    assert not (tmp_path / "llama").exists()
    model.config = replace(model.config, family="plait")
    save_transformer(model, tmp_path)
    with pytest.raises(ValueError, match="plait"):
        transformers.AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "a model as Plait writes it"),
        ({"blocks": 3}, "blocks"),
        ({"blocks": [{"mixer": {"name": "linear-attention", "num_heads": 2}}]}, "."),
        ({"vocab_size": -1}, "vocab_size"),
        ({"nonsense": 1}, "no setting 'nonsense'"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: dict[str, Any] | None, message: str) -> None:
    model = small(MIXERS["alibi"])
    model.config = replace(model.config, family="plait")
    save_transformer(model, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["transformer"] = None if change is None else written["transformer"] | change
    (tmp_path / "config.json").write_text(json.dumps(written))
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(ModelFileError, match=message):
        load_transformer(checkpoint, FP32())


def test_a_program_of_packed_matrices_keeps_to_the_bias() -> None:
    mixer = replace(PLAIN, head_dim=16, rope=RopeConfig(dim=16))
    sizes = {"vocab_size": 64, "width": 64, "inner": 96, "max_positions": 64, "format": Q8_0()}
    with torch.no_grad():
        plain = small_transformer(mixer, seed=2, **sizes)  # type: ignore[arg-type]
        biased = small_transformer(replace(mixer, distance_bias=Harmonic(weight=4.0)), seed=2, **sizes)  # type: ignore[arg-type]
        zero = small_transformer(replace(mixer, distance_bias=Harmonic(weight=0.0)), seed=2, **sizes)  # type: ignore[arg-type]
    assert obstacle(biased) == obstacle(zero) == obstacle(plain) is None
    before = logits(biased)
    assert lower(biased)
    found = through_memory(biased, IDS, [9, 7])
    # Rounding activations moves logits by less than the bias does.
    assert (found - before).norm() <= 0.03 * before.norm()
    assert (logits(zero) - before).norm() > 0.1 * before.norm()
    with torch.no_grad():
        mixed = small_transformer(
            replace(mixer, distance_bias=Harmonic()),
            replace(mixer, distance_bias=Linear()),
            seed=2,
            **sizes,  # type: ignore[arg-type]
        )
    assert "differ in the kind of their biases" in (obstacle(mixed) or "")


def test_configurations_are_specs() -> None:
    for config in (Harmonic(slopes="alibi", limit=7), Linear(weight=0.5)):
        assert BIASES.parse(str(config)) == config
        assert DistanceBiasConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    shape = ModelShape.from_text('distance_bias={"name":"linear","limit":64},rotary=false')
    assert shape.distance_bias == Linear(limit=64)
    assert ModelShape.from_text("distance_bias=harmonic").distance_bias == Harmonic()
    assert ModelShape.from_text("distance_bias=none").distance_bias is None
    assert shape.transformer(300, None).family == "plait"
    assert ModelShape().transformer(300, None).family == "llama"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Harmonic(weight=-1.0), r"Harmonic.weight must be a number in \[0, 1000000.0\]. Got -1.0"),
        (lambda: Linear(limit=0), r"Linear.limit must be a whole number in \[1, inf\) or none. Got 0"),
        (lambda: Linear(slopes="steep"), r"Linear.slopes must be alibi or harmonic. Got 'steep'"),  # type: ignore[arg-type]
        (lambda: Harmonic(product=float("nan")), "Harmonic.product must be"),
        (lambda: ModelShape.from_text("distance_bias=harmonc"), "Unknown distance bias 'harmonc'. Did you mean 'harmonic'"),
        (lambda: replace(PLAIN, distance_bias=DistanceBiasConfig()), "distance_bias must be one of harmonic, linear"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
