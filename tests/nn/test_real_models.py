"""Real models against Transformers, on real text.

Transformers forms rotary angles in fp32, which moves logits by several 1e-4 after a thousand tokens.
So the comparison is threefold: with angles rounded as Transformers does, both agree; with exact angles,
both agree when Transformers is given exact angles too; and exact angles are nearer to the same model
computed in float64 than Transformers is.
"""

from __future__ import annotations

import copy
import pydoc_data.topics
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from plait.memory import MemoryPlan, Rows
from plait.nn import Transformer, load_transformer
from plait.nn.checkpoints.gguf import GGUFCheckpoint
from plait.text import Tokenizer
from plait.weights import Blocks
from plait.weights.ggml import FP32

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]

TEXTS = {
    "greeting": "Bonjour! Ça va? Grüße aus Zürich, привет, 你好 - 2 + 2 = 4 😀",
    "prose": pydoc_data.topics.topics["assert"][:250],
    "code": "\n".join(f"def square_of_{i}(x): return {i} * x ** {i}  # grows" for i in range(8)),
    "reference": pydoc_data.topics.topics["class"][:2200],
    "long": pydoc_data.topics.topics["assignment"] + pydoc_data.topics.topics["typesseq"],
}
LONGEST = 2000


class Models:
    """One file, read by Plait with exact angles and with those of Transformers, and by Transformers."""

    def __init__(self, path: Path, lean: Path) -> None:
        with GGUFCheckpoint(path) as checkpoint:
            tokenizer = Tokenizer.from_gguf(checkpoint.metadata)
            write_without_tokenizer(checkpoint, lean)
            self.exact = load_transformer(checkpoint, FP32())
            self.rounded = load_transformer(checkpoint, FP32(), angles="fp32")
        self.texts = {
            name: torch.tensor(tokenizer.encode(text, add_special=True)[:LONGEST])
            for name, text in TEXTS.items()
        }
        self.theirs = load_theirs(lean)
        self.head = self.theirs.lm_head.weight
        # Gemma's last norm multiplies by up to 145, and every rounding with it.
        self.tolerance = 1e-4 if self.theirs.config.model_type == "llama" else 2e-4


@pytest.fixture(scope="module", params=["smollm2_gguf", "gemma3_gguf"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    lean = tmp_path_factory.mktemp("lean") / "model.gguf"
    return Models(request.getfixturevalue(request.param), lean)


def write_without_tokenizer(checkpoint: GGUFCheckpoint, path: Path) -> None:
    """The same model without its tokens, over which Transformers would spend a minute."""
    architecture = checkpoint.metadata["general.architecture"]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in checkpoint.metadata.items():
        if not key.startswith(f"{architecture}.") or key == f"{architecture}.vocab_size":
            continue
        if isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_float32(key, value)
    writer.add_vocab_size(checkpoint.tensors()["token_embd.weight"].shape[0])
    for name, info in checkpoint.tensors().items():
        kind = gguf.GGMLQuantizationType[info.format.upper()]
        if len(info.shape) == 2:
            packed = checkpoint.load_packed(name)
            assert isinstance(packed, Blocks)
            writer.add_tensor(name, packed.blocks.numpy(), raw_dtype=kind)
        else:
            writer.add_tensor(name, checkpoint.load(name).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_theirs(path: Path) -> PreTrainedModel:
    # Transformers makes the same table of names for each of some hundred modules.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval()


@torch.inference_mode()
def hidden(model: Transformer, ids: Tensor, *, through_memory: bool = False) -> Tensor:
    """Final hidden rows (N, W)."""
    pasts = [model.new_past(MemoryPlan())] if through_memory else None
    return model(ids, Rows([(len(ids), 0)]), pasts)


@torch.inference_mode()
def theirs_hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The same by Transformers."""
    return getattr(model, "model", model)(ids[None]).last_hidden_state[0]


@torch.inference_mode()
def largest_difference(head: Tensor, first: Tensor, second: Tensor) -> float:
    """Of logits, over all rows of a short text and some of a long one; block by block."""
    rows = torch.arange(len(first))
    rows = rows[len(rows) // 200 :: len(rows) // 200 + 1]
    # Subtracted first, so that rows in float64 lose nothing to a head in float32.
    apart = (first[rows].double() - second[rows].double()).float()
    return max(float((part @ head.T).abs().max()) for part in apart.split(64))


@pytest.fixture
def exact_angles(monkeypatch: pytest.MonkeyPatch, models: Models) -> None:
    """Let Transformers form its rotary table in float64."""

    def forward(self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        prefix = "" if layer_type is None else f"{layer_type}_"
        speeds = getattr(self, f"{prefix}inv_freq").float().double()
        turn = position_ids[..., None].double() * speeds
        turn = torch.cat([turn, turn], dim=-1)
        return turn.cos().to(x.dtype), turn.sin().to(x.dtype)

    monkeypatch.setattr(type(models.theirs.model.rotary_emb), "forward", forward)


def test_their_configuration_is_that_of_the_model(models: Models) -> None:
    """What Transformers reads from the file is what is known of these models."""
    config = models.theirs.config
    if config.model_type == "llama":
        assert (config.num_hidden_layers, config.num_attention_heads, config.head_dim) == (30, 9, 64)
        assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
        return
    assert config.layer_types == (["sliding_attention"] * 5 + ["full_attention"]) * 3
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10000.0
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert (config.sliding_window, config.query_pre_attn_scalar) == (512, 256)
    assert config.tie_word_embeddings
    ours = [block.mixer for block in models.exact.config.blocks]
    assert [mixer.window for mixer in ours] == ([512] * 5 + [None]) * 3
    assert [mixer.rope.theta for mixer in ours] == ([1e4] * 5 + [1e6]) * 3
    assert {mixer.scale for mixer in ours} == {0.0625}


def test_texts_have_the_lengths_that_matter(models: Models) -> None:
    lengths = sorted(len(ids) for ids in models.texts.values())
    assert lengths[0] < 40
    assert lengths[-2] > 400
    assert lengths[-1] == LONGEST


@pytest.mark.parametrize("text", TEXTS)
def test_logits_equal_with_their_angles(models: Models, text: str) -> None:
    ids = models.texts[text]
    ours = hidden(models.rounded, ids, through_memory=True)
    theirs = theirs_hidden(models.theirs, ids)
    assert largest_difference(models.head, ours, theirs) < models.tolerance


@pytest.mark.usefixtures("exact_angles")
def test_logits_equal_with_exact_angles(models: Models) -> None:
    ids = models.texts["reference"]
    theirs = theirs_hidden(models.theirs, ids)
    assert largest_difference(models.head, hidden(models.exact, ids), theirs) < models.tolerance


def test_exact_angles_are_nearer_to_the_truth(models: Models, request: pytest.FixtureRequest) -> None:
    ids = models.texts["reference"]
    ours, theirs = hidden(models.exact, ids), theirs_hidden(models.theirs, ids)
    request.getfixturevalue("exact_angles")
    truth = theirs_hidden(copy.deepcopy(models.theirs.model).double(), ids)
    assert largest_difference(models.head, ours, truth) <= largest_difference(models.head, theirs, truth)


def test_head_and_embedding_are_theirs(models: Models) -> None:
    """What `largest_difference` takes for granted."""
    rows = hidden(models.exact, models.texts["greeting"])
    with torch.inference_mode():
        torch.testing.assert_close(
            models.exact.logits(rows), models.theirs.lm_head(rows), atol=models.tolerance, rtol=0
        )
    embedding = models.exact.embedding(torch.arange(1000, 1100))
    assert torch.equal(embedding, models.theirs.model.embed_tokens.weight[1000:1100])
