"""GGUF files of every architecture that has them, against the Transformers models they were made from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_gguf import ARCHITECTURES, write_gguf
from tiny_models import CASES, Case, at_once, make, random_ids

from plait.errors import ModelFileError
from plait.nn import describe, load_transformer
from plait.nn.checkpoints.gguf import GGUFCheckpoint
from plait.nn.families import FAMILIES
from plait.nn.mixers import AttentionConfig
from plait.weights.ggml import FP32

TOLERANCE = 1e-4


@dataclass(frozen=True)
class File:
    """A model as a GGUF file, with further metadata."""

    case: Case
    extra: dict[str, Any] = field(default_factory=dict)


def like(name: str, **changes: Any) -> Case:
    """One of `CASES`, with settings changed to what GGUF can express."""
    (case,) = (case for case in CASES if case.name == name)
    return replace(case, settings=case.settings | changes)


def rope(name: str, **local: Any) -> dict[str, Any]:
    """The rotary settings of a Gemma 3 case, with those of its local blocks changed."""
    given = like(name).settings["rope_parameters"]
    return {"rope_parameters": given | {"sliding_attention": given["sliding_attention"] | local}}


FILES = [
    File(like("llama")),
    File(like("llama-gqa-tied")),
    File(like("llama-biases")),
    File(like("llama-mqa-head-size")),
    File(like("llama-linear")),
    File(like("llama-linear"), {"rope.scaling.type": None}),
    File(
        like("llama-linear"),
        {"rope.scaling.type": None, "rope.scaling.factor": None, "rope.scale_linear": 3.5},
    ),
    File(like("llama-yarn")),
    File(like("llama-yarn", **like("llama-yarn-all").settings | {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 500.0, "factor": 2.0, "beta_fast": 8.0, "beta_slow": 2.0,
        "original_max_position_embeddings": 32,
    }})),
    File(like("llama3")),
    File(like("mistral-window"), {"attention.sliding_window": 8}),
    File(like("mistral-no-window")),
    File(like("qwen2"), {"vocab_size": 101, "rope.scaling.finetuned": True, "expert_count": 0}),
    File(like("qwen2-tied-mha")),
    File(like("qwen3")),
    File(
        like("qwen3-biases-window"),
        {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True, True]},
    ),
    File(like("gemma2", query_pre_attn_scalar=12)),
    File(like("gemma2", query_pre_attn_scalar=8, num_hidden_layers=46)),
    File(
        like("gemma3", query_pre_attn_scalar=12, **rope("gemma3", rope_theta=300.0)),
        {"rope.freq_base_swa": 300.0},
    ),
    File(like("gemma3", query_pre_attn_scalar=12, **rope("gemma3", rope_theta=10000.0))),
    File(like("gemma3-pattern", query_pre_attn_scalar=12), {"attention.sliding_window_pattern": 2}),
    File(
        like("gemma3-pattern", query_pre_attn_scalar=8, num_hidden_layers=62),
        {"attention.sliding_window_pattern": [True, False] * 31},
    ),
    File(like("phi3")),
    File(like("phi3-window")),
    File(like("phi3-partial")),
    File(like("phi3-longrope")),
    File(like("phi3-longrope"), {"rope.scaling.attn_factor": None}),
    File(like("gpt2", n_inner=40)),
    File(like("gpt2", tie_word_embeddings=False)),
    File(like("starcoder2"), {"attention.sliding_window": 8}),
    File(like("starcoder2-no-biases", hidden_act="gelu_pytorch_tanh")),
]  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.case.name)
def test_logits_equal_the_model_that_was_converted(file: File, tmp_path: Path) -> None:
    theirs = make(file.case)
    write_gguf(theirs, tmp_path / "model.gguf", file.extra)
    with GGUFCheckpoint(tmp_path / "model.gguf") as checkpoint:
        ours = load_transformer(checkpoint, FP32())
    for length in (7, 50):
        ids = random_ids(length, seed=length)
        with torch.inference_mode():
            wanted = theirs(ids[None]).logits[0]
        torch.testing.assert_close(at_once(ours, ids), wanted, atol=TOLERANCE, rtol=0)


def test_every_architecture_is_tried() -> None:
    tried = {gguf.MODEL_ARCH_NAMES[ARCHITECTURES[file.case.model_type]] for file in FILES}
    assert tried == {name for family in FAMILIES for name in family.architectures}


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_low_bit_rows_are_chosen_without_unpacking(name: str, tmp_path: Path) -> None:
    """Reordered and fused rows, kept in the blocks of the file."""
    theirs = make(like(name, intermediate_size=64))
    kind = gguf.GGMLQuantizationType.Q8_0
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 2:
                blocks = gguf.quants.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(blocks, kind))))
    write_gguf(theirs, tmp_path / "model.gguf", dtype=kind)
    with GGUFCheckpoint(tmp_path / "model.gguf") as checkpoint:
        ours = load_transformer(checkpoint, None)
    formats = {module.format for module in ours.modules() if hasattr(module, "format")}
    assert formats == {"q8_0"}
    ids = random_ids(30)
    with torch.inference_mode():
        wanted = theirs(ids[None]).logits[0]
    torch.testing.assert_close(at_once(ours, ids), wanted, atol=TOLERANCE, rtol=0)


def test_a_pattern_puts_windows_where_it_says(tmp_path: Path) -> None:
    case = like("gemma3-pattern", num_hidden_layers=4)
    extra = {"attention.sliding_window_pattern": [False, True, True, False]}
    write_gguf(make(case), tmp_path / "model.gguf", extra)
    with GGUFCheckpoint(tmp_path / "model.gguf") as checkpoint:
        blocks = describe(checkpoint).config.blocks
    windows = [block.mixer.window for block in blocks if isinstance(block.mixer, AttentionConfig)]
    assert windows == [None, 8, 8, None]


@pytest.mark.parametrize(
    ("name", "extra", "message"),
    [
        ("llama", {"expert_count": 8}, r"llama.expert_count to 8"),
        ("llama", {"attention.scale": 0.5}, r"llama.attention.scale to 0.5"),
        ("llama", {"logit_scale": 2.0}, r"llama.logit_scale to 2.0"),
        ("llama", {"attention.causal": False}, r"llama.attention.causal to False"),
        ("llama", {"attention.value_length": 4}, r"llama.attention.value_length to 4"),
        ("llama", {"attn_logit_softcapping": 5.0}, r"attn_logit_softcapping to 5.0"),
        ("llama", {"attention.head_count_kv": [2, 2]}, r"num_key_value_heads to \[2, 2\]"),
        ("llama", {"attention.head_count_kv": 3}, r"num_kv_heads must divide"),
        ("llama", {"rope.scaling.type": "ntk", "rope.scaling.factor": 2.0}, r"rope_type to 'ntk'"),
        ("llama", {"rope.scaling.type": "linear"}, r"need factor"),
        ("llama", {"rope.scaling.type": "longrope"}, r"need short_factor"),
        ("llama-yarn", {"rope.scaling.attn_factor": 0.5}, r"attn_factor to 0.5"),
        ("llama-yarn", {"rope.scaling.yarn_log_multiplier": 0.1}, r"yarn_log_multiplier"),
        ("llama3", {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, r"divisors .* 'linear'"),
        ("llama", {"attention.sliding_window_pattern": 2}, r"sliding_window_pattern to 2"),
        ("llama", {"attention.sliding_window_pattern": [True]}, r"layer_types .* each of 2 blocks"),
        ("llama", {"attention.head_count": 5}, r"5 attention heads, which do not divide the width 32"),
        ("llama", {"embedding_length": "wide"}, r"hidden_size to 'wide'"),
        ("llama", {"block_count": 4_000_000_000}, r"4000000000 blocks"),
        ("llama", {"block_count": 0}, r"num_hidden_layers to 0"),
        ("llama", {"context_length": None, "rope.freq_base": float("nan")}, r"rope_theta to nan"),
        ("llama", {"rope.dimension_count": 12}, r"rotates 12 channels of heads of 8"),
        ("qwen2", {"attention.sliding_window": 8}, r"which blocks"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping to 50.0"),
        ("gemma2", {"rope.freq_base_swa": 50.0}, r"rope_local_base_freq to 50.0"),
        ("gpt2", {"rope.dimension_count": 8}, r"rotary_dim to 8"),
    ],
)
def test_what_is_not_implemented_is_refused(
    name: str, extra: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_gguf(make(like(name)), tmp_path / "model.gguf", extra)
    with (
        GGUFCheckpoint(tmp_path / "model.gguf") as checkpoint,
        pytest.raises(ModelFileError, match=message) as failure,
    ):
        load_transformer(checkpoint, FP32())
    assert "model.gguf" in str(failure.value)


@pytest.mark.parametrize("missing", ["token_embd.weight", "blk.1.attn_q.weight", "output_norm.weight"])
def test_tensors_that_are_missing(missing: str, tmp_path: Path) -> None:
    write_gguf(make(like("llama")), tmp_path / "model.gguf")
    with GGUFCheckpoint(tmp_path / "model.gguf") as checkpoint:
        tensors = {name: info for name, info in checkpoint.tensors().items() if name != missing}
        checkpoint._tensors = tensors
        with pytest.raises(ModelFileError, match=missing):
            load_transformer(checkpoint, FP32())


def test_divisors_that_do_not_fit_the_heads(tmp_path: Path) -> None:
    write_gguf(make(like("llama3")), tmp_path / "model.gguf", {"rope.dimension_count": 8})
    with (
        GGUFCheckpoint(tmp_path / "model.gguf") as checkpoint,
        pytest.raises(ModelFileError, match="must have 4 numbers"),
    ):
        describe(checkpoint)
