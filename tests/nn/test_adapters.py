"""Adapters against the `peft` package: same files, same logits, same gradients, both ways."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CASES, Pair, at_once, pair, random_ids, through_memory
from torch import Tensor

from plait.errors import ConfigError, IncompatibleError, ModelFileError
from plait.nn import Transformer
from plait.nn.adapter_files import CONFIG_NAME, WEIGHTS_NAME, inspect_adapter, load_adapter, save_adapter
from plait.nn.adapters import Adapter, new_adapter
from plait.weights.adapters import ADAPTERS

# Two libraries that add the same fp32 numbers in other orders.
_TOLERANCE = 2e-5

_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Kind:
    """A kind of adapter that `peft` makes."""

    name: str
    config: Callable[[], Any]
    model: str = "llama-biases"


KINDS = [
    Kind("lora", lambda: peft.LoraConfig(r=3, lora_alpha=7, target_modules=_LINEARS)),
    Kind("rslora", lambda: peft.LoraConfig(r=4, use_rslora=True, target_modules=["q_proj", "v_proj"])),
    Kind("dora", lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=_LINEARS)),
    Kind("vera", lambda: peft.VeraConfig(r=16, target_modules=["q_proj", "k_proj", "down_proj"])),
    Kind("adalora", lambda: peft.AdaLoraConfig(init_r=5, total_step=9, target_modules=_LINEARS)),
    Kind(
        "ia3",
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    ),
    Kind("lora-fused", lambda: peft.LoraConfig(r=3, target_modules=["c_attn", "c_proj"]), "gpt2"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    wanted = {kind.model for kind in KINDS}
    return {case.name: pair(case, tmp_path_factory.mktemp(case.name)) for case in CASES if case.name in wanted}


def made_by_peft(found: Pair, kind: Kind, folder: Path, ids: Tensor) -> Tensor:
    """Save an adapter with random numbers, and return what the adapted model says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(found.theirs, kind.config())
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "ranknum" not in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            model.eval()
            logits: Tensor = model(ids[None]).logits[0]
        model.save_pretrained(str(folder))
        model.unload()
    return logits


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_reads_what_peft_wrote(kind: Kind, models: dict[str, Pair], tmp_path: Path) -> None:
    found, ids = models[kind.model], random_ids(11)
    theirs = made_by_peft(found, kind, tmp_path, ids)
    plain = at_once(found.ours, ids)
    found.ours.use(load_adapter(tmp_path, found.ours))
    try:
        torch.testing.assert_close(at_once(found.ours, ids), theirs, atol=_TOLERANCE, rtol=_TOLERANCE)
        torch.testing.assert_close(
            through_memory(found.ours, ids, [4, 1, 6]), theirs, atol=_TOLERANCE, rtol=_TOLERANCE
        )
        assert (theirs - plain).abs().max() > 0.01
    finally:
        found.ours.use(None)
    assert torch.equal(at_once(found.ours, ids), plain)
