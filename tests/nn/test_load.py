"""What a configuration or a checkpoint can get wrong ends in one clear error, soon."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import CASES, at_once, make, random_ids

from plait.errors import ModelFileError
from plait.nn import Transformer, describe, load_transformer
from plait.nn.checkpoints.safetensors import SafetensorsCheckpoint
from plait.nn.mixers import AttentionConfig
from plait.weights.ggml import FP32

# One model of each family, with as many of its features as there are.
NAMES = (
    "llama-yarn",
    "mistral-window",
    "qwen2-window",
    "qwen3-biases-window",
    "gemma2",
    "gemma3",
    "phi3-longrope",
    "gpt2",
    "starcoder2",
    "opt-350m",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved model for each of `NAMES`."""
    saved = {}
    for case in CASES:
        if case.name in NAMES:
            saved[case.name] = tmp_path_factory.mktemp(case.name)
            make(case).save_pretrained(saved[case.name])
    return saved


def load(folder: Path, changes: dict[str, Any] | None = None) -> Transformer:
    """Load a model whose configuration has these changes."""
    with SafetensorsCheckpoint(folder) as checkpoint:
        checkpoint.metadata = dict(checkpoint.metadata) | (changes or {})
        return load_transformer(checkpoint, FP32())


def rewritten(
    folder: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> Path:
    """A copy of a model with other tensors."""
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, to / "model.safetensors")
    return to


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("llama-yarn", {"model_type": "lama"}, "model_type 'lama'. Did you mean 'llama'"),
    ("llama-yarn", {"model_type": None}, "model_type None"),
    ("llama-yarn", {"model_type": ["llama"]}, r"model_type \['llama'\]"),
    ("llama-yarn", {"hidden_act": "quick_gelu"}, "hidden_act to 'quick_gelu'"),
    ("llama-yarn", {"hidden_act": ["silu"]}, r"hidden_act to \['silu'\]"),
    ("llama-yarn", {"num_hidden_layers": 10**12}, "1000000000000 blocks"),
    ("llama-yarn", {"num_hidden_layers": 4}, "4 blocks"),
    ("llama-yarn", {"num_hidden_layers": 3}, "layers.2"),
    ("llama-yarn", {"num_hidden_layers": 1}, "has no place"),
    ("llama-yarn", {"num_hidden_layers": "2"}, "num_hidden_layers to '2'"),
    ("llama-yarn", {"num_hidden_layers": 2.0}, "num_hidden_layers to 2.0"),
    ("llama-yarn", {"num_hidden_layers": True}, "num_hidden_layers to True"),
    ("llama-yarn", {"num_attention_heads": 0}, "num_attention_heads to 0"),
    ("llama-yarn", {"num_attention_heads": 5, "head_dim": None}, "5 attention heads, which do not divide"),
    ("llama-yarn", {"num_key_value_heads": 3}, "num_kv_heads must divide num_heads 4. Got 3"),
    ("llama-yarn", {"num_key_value_heads": 4}, r"key.weight has shape \(16, 32\)"),
    ("llama-yarn", {"head_dim": 7}, "RopeConfig.dim"),
    ("llama-yarn", {"head_dim": 10**12}, "query.weight has shape"),
    ("llama-yarn", {"hidden_size": 10**30}, "hidden_size to 1000000000000000000000000000000"),
    ("llama-yarn", {"hidden_size": None}, "no hidden_size"),
    ("llama-yarn", {"vocab_size": -5}, "vocab_size to -5"),
    ("llama-yarn", {"vocab_size": 10**12}, "embedding.weight has shape"),
    ("llama-yarn", {"rms_norm_eps": math.nan}, "rms_norm_eps to nan"),
    ("llama-yarn", {"rms_norm_eps": "1e-5"}, "rms_norm_eps to '1e-5'"),
    ("llama-yarn", {"tie_word_embeddings": "yes"}, "tie_word_embeddings to 'yes'"),
    ("llama-yarn", {"attention_bias": True}, "query.bias is missing"),
    ("llama-yarn", {"max_position_embeddings": 1.5}, "max_position_embeddings to 1.5"),
    ("llama-yarn", {"rope_parameters": "yarn"}, "rope_parameters to 'yarn'"),
    ("llama-yarn", {"rope_parameters": {"rope_type": "mrope"}}, "rope_type to 'mrope'"),
    ("llama-yarn", {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1]}}, "mrope_section"),
    ("llama-yarn", {"rope_parameters": {"type": "linear"}}, "need factor"),
    ("llama-yarn", {"rope_parameters": {"type": "linear", "factor": "8"}}, "LinearScaling.factor"),
    ("llama-yarn", {"rope_parameters": {"type": "linear", "factor": -8}}, "LinearScaling.factor"),
    ("llama-yarn", {"rope_parameters": {"rope_theta": 0}}, "rope_theta to 0"),
    ("llama-yarn", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "full_attention"),
    ("llama-yarn", {"partial_rotary_factor": 1.5}, "rotates 12 channels of heads of 8"),
    ("llama-yarn", {"partial_rotary_factor": 1e300}, "rotates 16 channels of heads of 8"),
    ("llama-yarn", {"layer_types": ["chunked_attention"] * 2}, "'chunked_attention'"),
    ("llama-yarn", {"layer_types": ["sliding_attention"] * 2}, "no sliding_window"),
    ("llama-yarn", {"layer_types": ["full_attention"] * 3}, "each of 2 blocks"),
    ("llama-yarn", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("llama-yarn", {"num_local_experts": 8}, "num_local_experts to 8"),
    ("llama-yarn", {"final_logit_softcapping": 30.0}, "final_logit_softcapping to 30.0"),
    ("llama-yarn", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("mistral-window", {"sliding_window": 0}, "sliding_window to 0"),
    ("mistral-window", {"sliding_window": "wide"}, "sliding_window to 'wide'"),
    ("qwen2-window", {"max_window_layers": -1}, "max_window_layers to -1"),
    ("qwen2-window", {"use_sliding_window": 1}, "use_sliding_window to 1"),
    ("gemma2", {"query_pre_attn_scalar": -4}, "query_pre_attn_scalar to -4"),
    ("gemma2", {"final_logit_softcapping": 0}, "final_logit_softcapping to 0"),
    ("gemma2", {"attn_logit_softcapping": math.inf}, "attn_logit_softcapping to inf"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping to 50.0"),
    ("gemma3", {"rope_parameters": {"full_attention": 3}}, "rope_parameters to 3"),
    ("gemma3", {"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern to 0"),
    ("phi3-longrope", {"intermediate_size": 47}, "feed_forward.up.weight has shape"),
    ("phi3-longrope", {"original_max_position_embeddings": 1}, "original_max_position_embeddings"),
    ("phi3-longrope", {"lm_head_bias": True}, "lm_head_bias"),
    ("gpt2", {"activation_function": "tanh"}, "activation_function to 'tanh'"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("gpt2", {"n_positions": 10**9}, "positions.weight has shape"),
    ("gpt2", {"n_head": 5}, "5 attention heads"),
    ("gpt2", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
    ("starcoder2", {"use_bias": False}, "has no place"),
    ("starcoder2", {"norm_epsilon": None, "num_key_value_heads": [2]}, r"num_key_value_heads to \[2\]"),
    ("opt-350m", {"word_embed_proj_dim": None}, "embedding.weight has shape"),
    ("opt-350m", {"do_layer_norm_before": True}, "final_layer_norm"),
    ("opt-350m", {"ffn_dim": None}, "no ffn_dim"),
]


@pytest.mark.parametrize(("name", "changes", "message"), WRONG)
def test_configurations_that_are_refused(
    folders: dict[str, Path], name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelFileError, match=message) as failure:
        load(folders[name], changes)
    assert str(folders[name]) in str(failure.value)
    assert len(str(failure.value)) < 600


values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 7, 48, 10**9, 10**40, 0.5, -0.5, 1e300, math.nan, math.inf]),
    st.sampled_from(["", "x", "gelu", "full_attention", "linear"]),
    st.sampled_from([[], {}, [1], [[]], {"rope_type": "yarn"}, {"type": "llama3", "factor": 2}]),
    st.lists(st.sampled_from(["full_attention", "sliding_attention", 1, None]), max_size=7),
    st.dictionaries(
        st.sampled_from(["rope_type", "factor", "rope_theta", "short_factor", "full_attention"]),
        st.sampled_from(["dynamic", "longrope", 2.0, -1, [1.0, 2.0], {}, None]),
        max_size=4,
    ),
)


def load_or_refuse(folder: Path, metadata: dict[str, Any]) -> Transformer | ModelFileError:
    """A model, or why there is none; any other error is a fault."""
    with SafetensorsCheckpoint(folder) as checkpoint:
        checkpoint.metadata = metadata
        try:
            return load_transformer(checkpoint, FP32())
        except ModelFileError as error:
            return error


@given(st.sampled_from(NAMES), st.data())
@settings(max_examples=250, deadline=5000)
def test_any_configuration_ends_in_a_model_or_one_error(
    folders: dict[str, Path], name: str, data: st.DataObject
) -> None:
    original = json.loads((folders[name] / "config.json").read_text())
    extra = ["rope_scaling", "rope_theta", "head_dim", "layer_types", "sliding_window", "n_inner"]
    keys = st.sampled_from(sorted({*original, *extra} - {"architectures", "transformers_version"}))
    changes = data.draw(st.dictionaries(keys, values, min_size=1, max_size=3))
    result = load_or_refuse(folders[name], original | changes)
    if isinstance(result, Transformer):
        assert at_once(result, random_ids(3)).shape[0] == 3
    else:
        assert str(folders[name]) in str(result)


@given(st.sampled_from(NAMES), st.data())
@settings(max_examples=60, deadline=5000)
def test_any_missing_setting_ends_in_a_model_or_one_error(
    folders: dict[str, Path], name: str, data: st.DataObject
) -> None:
    original = json.loads((folders[name] / "config.json").read_text())
    missing = data.draw(st.sets(st.sampled_from(sorted(original)), min_size=1, max_size=4))
    result = load_or_refuse(folders[name], {k: v for k, v in original.items() if k not in missing})
    assert isinstance(result, Transformer) or str(folders[name]) in str(result)


def test_an_empty_configuration(folders: dict[str, Path]) -> None:
    with SafetensorsCheckpoint(folders["gpt2"]) as checkpoint:
        checkpoint.metadata = {}
        with pytest.raises(ModelFileError, match="model_type None"):
            describe(checkpoint)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_needed_and_none_is_superfluous(
    folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    first = sorted(load_file(folders[name] / "model.safetensors"))[-1]
    folder = rewritten(folders[name], tmp_path, lambda tensors: tensors | {f"{first}.more": torch.ones(3)})
    with pytest.raises(ModelFileError, match=r"\.more' has no place"):
        load(folder)
    rewritten(folders[name], tmp_path, lambda tensors: {k: v for k, v in tensors.items() if k != first})
    with pytest.raises(ModelFileError, match=first):
        load(folder)


def test_fused_rows_must_come_out_even(folders: dict[str, Path], tmp_path: Path) -> None:
    name = "transformer.h.1.attn.c_attn.weight"
    folder = rewritten(
        folders["gpt2"], tmp_path, lambda t: t | {name: torch.cat([t[name], t[name][:, :4]], 1)}
    )
    with pytest.raises(ModelFileError, match=r"blocks.1.mixer.value.weight has shape \(36, 32\)"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_formats(folders: dict[str, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    def convert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(torch.bfloat16).to(dtype) for name, tensor in tensors.items()}

    folder = rewritten(folders["gemma3"], tmp_path, convert)
    (tmp_path / "plain").mkdir()
    plain = rewritten(folder, tmp_path / "plain", lambda t: {k: v.float() for k, v in t.items()})
    ids = random_ids(9)
    assert torch.equal(at_once(load(folder), ids), at_once(load(plain), ids))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_numbers_without_their_scales(folders: dict[str, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    """Low-bit weights mean nothing without the scales that some other tensor holds."""
    name = "model.layers.0.mlp.down_proj.weight"
    folder = rewritten(folders["llama-yarn"], tmp_path, lambda t: t | {name: t[name].to(dtype)})
    for format in (FP32(), None):
        with (
            SafetensorsCheckpoint(folder) as checkpoint,
            pytest.raises(ModelFileError, match=str(dtype).removeprefix("torch.")),
        ):
            load_transformer(checkpoint, format)


@pytest.mark.parametrize("name", ["gpt2", "opt-350m", "llama-yarn"])
def test_checkpoints_of_the_bare_model(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    """Saved without the head, tensor names lose their first part."""
    prefix = "transformer." if name == "gpt2" else "model."
    folder = rewritten(
        folders[name], tmp_path, lambda t: {key.removeprefix(prefix): tensor for key, tensor in t.items()}
    )
    ids = random_ids(12)
    assert torch.equal(at_once(load(folder), ids), at_once(load(folders[name]), ids))


def test_leftovers_that_mean_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    """Old checkpoints keep the causal mask, and heads that equal the embedding."""

    def add(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {
            "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64),
            "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
            "lm_head.weight": tensors["transformer.wte.weight"].clone(),
        }

    model = load(rewritten(folders["gpt2"], tmp_path, add))
    assert model.config.tied_head
    ids = random_ids(5)
    assert torch.equal(at_once(model, ids), at_once(load(folders["gpt2"]), ids))


def test_a_head_of_its_own_is_used_though_the_configuration_ties_it(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """As in Transformers 5."""
    wte = "transformer.wte.weight"
    folder = rewritten(folders["gpt2"], tmp_path, lambda t: t | {"lm_head.weight": 2 * t[wte]})
    model = load(folder)
    assert not model.config.tied_head
    ids = random_ids(5)
    assert torch.equal(at_once(model, ids), 2 * at_once(load(folders["gpt2"]), ids))


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_angles_reach_every_layer(folders: dict[str, Path], name: str) -> None:
    with SafetensorsCheckpoint(folders[name]) as checkpoint:
        for angles in ("fp64", "fp32"):
            model = load_transformer(checkpoint, FP32(), angles=angles)
            ropes = [
                block.mixer.rope for block in model.config.blocks if isinstance(block.mixer, AttentionConfig)
            ]
            assert {rope.angles for rope in ropes if rope is not None} == (
                {angles} if name == "gemma3" else set()
            )
