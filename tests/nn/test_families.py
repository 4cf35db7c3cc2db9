"""Every family against Transformers: the same weights give the same logits and the same continuation."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import (
    CASES,
    Pair,
    at_once,
    greedy,
    pair,
    random_ids,
    theirs_through_cache,
    through_memory,
)

from plait.nn import TransformerConfig, describe
from plait.nn.checkpoints.safetensors import SafetensorsCheckpoint

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair(request.param, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("length", [1, 7, 50])
def test_logits_equal_transformers(models: Pair, length: int) -> None:
    ids = random_ids(length, seed=length)
    with torch.inference_mode():
        wanted = models.theirs(ids[None]).logits[0]
    torch.testing.assert_close(at_once(models.ours, ids), wanted, atol=TOLERANCE, rtol=0)
    sizes = [length] if length < 7 else [3, 1, 1, length - 5]
    if models.case.by_length:
        wanted = theirs_through_cache(models.theirs, ids, sizes)
    torch.testing.assert_close(through_memory(models.ours, ids, sizes), wanted, atol=TOLERANCE, rtol=0)


def test_the_models_are_worth_comparing(models: Pair) -> None:
    """Logits are spread out, and depend on the order of the past, so that equality means something."""
    ids = random_ids(40)
    logits = at_once(models.ours, ids)
    assert logits.std() > 1
    moved = ids.clone()
    moved[[33, 34]] = ids[[34, 33]]
    assert (at_once(models.ours, moved)[-1] - logits[-1]).abs().max() > 100 * TOLERANCE


def test_greedy_continuation_equals_transformers(models: Pair) -> None:
    ids = random_ids(models.case.prompt, seed=5)
    wanted = models.theirs.generate(
        ids[None], max_new_tokens=20, do_sample=False, use_cache=True, attention_mask=torch.ones(1, len(ids))
    )[0, len(ids) :]
    assert greedy(models.ours, ids, 20) == wanted.tolist()


def test_configuration_survives_json(models: Pair) -> None:
    config = models.ours.config
    again = TransformerConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config
    assert again.blocks[0].mixer == config.blocks[0].mixer


def test_older_configurations_are_read(models: Pair) -> None:
    """Up to version 4 Transformers wrote `rope_theta` and `rope_scaling`."""
    with SafetensorsCheckpoint(models.folder) as checkpoint:
        rope = checkpoint.metadata.get("rope_parameters")
        if rope is None:
            assert models.case.model_type in ("gpt2", "opt")
            return
        older = {key: value for key, value in checkpoint.metadata.items() if key != "rope_parameters"}
        if "full_attention" in rope:
            older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            rope = rope["full_attention"]
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
        older["rope_theta"] = rope["rope_theta"]
        older["partial_rotary_factor"] = scaling.pop("partial_rotary_factor", 1.0)
        if rope["rope_type"] != "default":
            older["rope_scaling"] = {"type": rope["rope_type"], **scaling}
        wanted = describe(checkpoint).config
        checkpoint.metadata = older
        assert describe(checkpoint).config == wanted
