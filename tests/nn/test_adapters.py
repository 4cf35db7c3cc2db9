"""Adapters against the `peft` package: same files, same logits, same gradients, both ways."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CASES, Pair, at_once, pair, random_ids, through_memory
from torch import Tensor

from plait.errors import ConfigError, IncompatibleError, ModelFileError
from plait.memory import Rows
from plait.nn import RandomParameters, Transformer, TransformerConfig, load_transformer
from plait.nn.adapter_files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    inspect_adapter,
    load_adapter,
    save_adapter,
    written_names,
)
from plait.nn.adapters import Adapter, new_adapter
from plait.nn.checkpoints.safetensors import SafetensorsCheckpoint
from plait.train import ModelShape
from plait.weights import FORMATS
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
    Kind("prefix", lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    Kind("prompt", lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    Kind("lora-fused", lambda: peft.LoraConfig(r=3, target_modules=["c_attn", "c_proj"]), "gpt2"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    wanted = {kind.model for kind in KINDS}
    return {
        case.name: pair(case, tmp_path_factory.mktemp(case.name)) for case in CASES if case.name in wanted
    }


METHODS = [
    "lora:rank=3", "lora:rank=2,trains=up,targets=query+down", "dora:rank=2", "vera:rank=8",
    "adalora:first_rank=4,rank=2", "ia3", "bitfit",
]  # fmt: skip


def small_llama() -> TransformerConfig:
    shape = ModelShape(width=32, blocks=2, heads=2, kv_heads=1, inner=48, vocab_size=300, context=64)
    return shape.transformer(300, None)


def disturbed(spec: str, model: Transformer, seed: int = 0) -> Adapter:
    """An adapter whose parameters are random."""
    adapter = new_adapter(ADAPTERS.parse(spec), model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter.eval()


def adapted(model: Transformer, adapter: Adapter, ids: Tensor) -> Tensor:
    """Logits of the model with an adapter."""
    model.use(adapter)
    try:
        return at_once(model, ids)
    finally:
        model.use(None)


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
            # Where rows are put before the text, their logits are not wanted.
            logits: Tensor = model(ids[None]).logits[0, -len(ids) :]
        model.save_pretrained(str(folder))
        if isinstance(model.base_model, peft.tuners.tuners_utils.BaseTuner):
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


@pytest.mark.parametrize(
    "spec",
    [
        "lora:rank=3,scaling=root",
        "dora:rank=2",
        "vera:rank=8",
        "adalora:first_rank=4,rank=2",
        "ia3",
        "prefix:tokens=3",
        "prompt:tokens=3",
    ],
)
def test_peft_reads_what_plait_wrote(spec: str, models: dict[str, Pair], tmp_path: Path) -> None:
    found, ids = models["llama-biases"], random_ids(9)
    save_adapter(disturbed(spec, found.ours), found.ours, tmp_path, base="somewhere/model")
    loaded = load_adapter(tmp_path, found.ours)
    assert loaded.num_parameters == inspect_adapter(tmp_path).parameters - sum(
        tensor.numel() for tensor in loaded.shared.values()
    )
    ours = adapted(found.ours, loaded, ids)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(found.theirs, str(tmp_path))
        theirs = model.eval()(ids[None]).logits[0, -len(ids) :]
        if isinstance(model.base_model, peft.tuners.tuners_utils.BaseTuner):
            model.unload()
    torch.testing.assert_close(ours, theirs, atol=_TOLERANCE, rtol=_TOLERANCE)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]], ids=lambda kind: kind.name)
def test_gradients_are_those_of_peft(kind: Kind, models: dict[str, Pair], tmp_path: Path) -> None:
    found, ids = models[kind.model], random_ids(8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made_by_peft(found, kind, tmp_path, ids)
        theirs = peft.PeftModel.from_pretrained(found.theirs, str(tmp_path), is_trainable=True)
        theirs(ids[None], labels=ids[None]).loss.backward()
        gradients = {
            name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.requires_grad
        }
        theirs.unload()
    adapter = load_adapter(tmp_path, found.ours).train()
    found.ours.use(adapter)
    try:
        logits = found.ours.logits(found.ours(ids, Rows([(len(ids), 0)])))
        torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).backward()
    finally:
        found.ours.use(None)
    names = written_names(adapter, found.ours)
    for site, change in adapter.at.items():
        for ours, theirs_name in change.peft_names.items():
            wanted = next(
                gradient
                for name, gradient in gradients.items()
                if f"{names[site]}.{theirs_name.removesuffix('.weight')}" in name
            )
            torch.testing.assert_close(getattr(change, ours).grad, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("spec", METHODS)
def test_a_new_adapter_changes_nothing_and_merging_is_undone_to_the_bit(
    spec: str, models: dict[str, Pair]
) -> None:
    model, ids = models["llama-biases"].ours, random_ids(9)
    plain = at_once(model, ids)
    fresh = adapted(model, new_adapter(ADAPTERS.parse(spec), model).eval(), ids)
    # DoRA divides each row by its own length, which rounds.
    torch.testing.assert_close(fresh, plain, atol=3e-6, rtol=1e-5)
    adapter = disturbed(spec, model)
    wanted = adapted(model, adapter, ids)
    assert (wanted - plain).abs().max() > 1e-3
    before = [parameter.detach().clone() for parameter in model.parameters()]
    merged = adapter.merge()
    torch.testing.assert_close(at_once(model, ids), wanted, atol=1e-5, rtol=1e-5)
    merged.undo()
    merged.undo()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(at_once(model, ids), plain)


@pytest.mark.parametrize("spec", ["lora:rank=4,alpha=3,start=loftq", "dora:rank=4,start=loftq"])
def test_a_start_from_what_packing_lost_is_nearer_to_the_original(
    spec: str, models: dict[str, Pair], tmp_path: Path
) -> None:
    found, ids = models["llama-biases"], random_ids(20)
    with SafetensorsCheckpoint(found.folder) as checkpoint:
        packed = load_transformer(checkpoint, FORMATS.parse("loftq:bits=3,group=16,rank=4"))
    wanted = at_once(found.ours, ids)
    adapter = new_adapter(ADAPTERS.parse(spec), packed, original=found.ours).eval()
    near = adapted(packed, adapter, ids)
    assert (near - wanted).norm() < 0.8 * (at_once(packed, ids) - wanted).norm()
    # The files are those of any LoRA: what reads them need not know how it began.
    save_adapter(adapter, packed, tmp_path, base="somewhere/model")
    again = load_adapter(tmp_path, packed)
    torch.testing.assert_close(adapted(packed, again, ids), near, atol=1e-6, rtol=1e-6)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(found.theirs, str(tmp_path)).eval()
        logits = theirs(ids[None]).logits[0]
        theirs.unload()
    of_plain = adapted(found.ours, load_adapter(tmp_path, found.ours), ids)
    torch.testing.assert_close(of_plain, logits, atol=_TOLERANCE, rtol=_TOLERANCE)


def test_a_start_from_what_packing_lost_needs_the_right_original(models: dict[str, Pair]) -> None:
    found, config = models["llama-biases"], ADAPTERS.parse("lora:rank=2,start=loftq")
    with pytest.raises(ConfigError, match=r"original=model"):
        new_adapter(config, found.ours)
    small = Transformer(small_llama(), RandomParameters(1)).eval()
    with pytest.raises(IncompatibleError, match="not the model that this one was packed from"):
        new_adapter(config, found.ours, original=small)
    # Of the same shape and last norm, but with other matrices.
    with pytest.raises(ConfigError, match=r"blocks\.0\.mixer\.query differs .* awq"):
        new_adapter(config, small, original=Transformer(small_llama(), RandomParameters(2)).eval())


def test_merging_into_packed_weights_is_refused(models: dict[str, Pair]) -> None:
    with SafetensorsCheckpoint(models["llama-biases"].folder) as checkpoint:
        packed = load_transformer(checkpoint, FORMATS.parse("uniform:bits=4,group=16"))
    with pytest.raises(IncompatibleError, match="quantise it again"):
        disturbed("lora:rank=2", packed).merge()


def test_a_bias_cannot_be_merged_where_there_is_none() -> None:
    model = Transformer(small_llama(), RandomParameters(1)).eval()
    with pytest.raises(IncompatibleError, match=r"adds a bias to blocks\.0\.mixer\.query"):
        disturbed("bitfit", model).merge()


def test_a_beginning_cannot_be_merged() -> None:
    model = Transformer(small_llama(), RandomParameters(1)).eval()
    for spec in ("prefix:tokens=2", "prompt:tokens=2"):
        with pytest.raises(IncompatibleError, match="before every text"):
            disturbed(spec, model).merge()


BOTTLENECKS = ["serial:size=5", "parallel:size=4", "parallel:size=3,targets=output+down,activation=gelu"]


@pytest.mark.parametrize("spec", BOTTLENECKS)
def test_bottlenecks_are_what_the_papers_say(spec: str, models: dict[str, Pair]) -> None:
    """Houlsby et al. 2019, section 2.1, and He et al. 2022, table 1, computed on hooks of the original modules."""
    found, ids = models["llama-biases"], random_ids(9)
    plain = at_once(found.ours, ids)
    fresh = new_adapter(ADAPTERS.parse(spec), found.ours).eval()
    assert torch.equal(adapted(found.ours, fresh, ids), plain)
    adapter = disturbed(spec, found.ours)
    scale = 4.0 if spec.startswith("parallel") else 1.0
    f = torch.nn.functional.gelu if "gelu" in spec else torch.relu

    def add(name: str, y: Tensor, read: Tensor) -> Tensor:
        if name not in adapter.at:
            return y
        p = dict(adapter.at[name].named_parameters())
        z = y if spec.startswith("serial") else read
        return y + scale * (f(z @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"])

    def of_attention(name: str) -> Callable[..., Any]:
        return lambda _, args, kwargs, out: (add(name, out[0], kwargs["hidden_states"]), *out[1:])

    def of_feed_forward(name: str) -> Callable[..., Any]:
        return lambda _, args, out: add(name, out, args[0])

    handles = []
    for index, layer in enumerate(found.theirs.model.layers):
        hook = of_attention(f"blocks.{index}.mixer.output")
        handles.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
        handles.append(layer.mlp.register_forward_hook(of_feed_forward(f"blocks.{index}.feed_forward.down")))
    try:
        with torch.no_grad():
            wanted = found.theirs(ids[None]).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    assert (wanted - plain).abs().max() > 0.01
    torch.testing.assert_close(adapted(found.ours, adapter, ids), wanted, atol=_TOLERANCE, rtol=_TOLERANCE)


@pytest.mark.parametrize("spec", BOTTLENECKS)
def test_bottlenecks_come_back_from_files_and_are_not_merged(spec: str, tmp_path: Path) -> None:
    model, ids = Transformer(small_llama(), RandomParameters(1)).eval(), random_ids(7)
    adapter = disturbed(spec, model)
    save_adapter(adapter, model, tmp_path)
    assert inspect_adapter(tmp_path).matrices == len(adapter.at)
    again = load_adapter(tmp_path, model)
    assert torch.equal(adapted(model, again, ids), adapted(model, adapter, ids))
    with pytest.raises(IncompatibleError, match="activation inside"):
        adapter.merge()
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    name = next(name for name in tensors if name.endswith("adapter_up.bias"))
    save_file(tensors | {name: tensors[name][1:]}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ModelFileError, match=r"bias of .* has shape"):
        load_adapter(tmp_path, model)


def test_adalora_keeps_the_rank_of_its_budget() -> None:
    model = Transformer(small_llama(), RandomParameters(1)).eval()
    config = ADAPTERS.parse("adalora:first_rank=6,rank=2,every=1")
    adapter = new_adapter(config, model).train()
    steps, kept = 20, []
    for step in range(1, steps + 1):
        for change in adapter.at.values():
            for parameter in change.parameters():
                parameter.grad = torch.randn(parameter.shape)
                parameter.data.add_(0.1)
        config.after_backward(adapter.at)
        config.after_step(adapter.at, step, steps)
        kept.append(sum(int((change.values != 0).sum()) for change in adapter.at.values()))  # type: ignore[union-attr]
    count = len(adapter.at)
    assert kept[0] == 6 * count
    assert kept[13] == kept[-1] == 2 * count
    assert all(later <= earlier for earlier, later in pairwise(kept))


def broken(change: str) -> Callable[[Path], None]:
    """A way to spoil the files of an adapter."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / CONFIG_NAME).read_text())
        tensors = load_file(folder / WEIGHTS_NAME)
        first = next(name for name in tensors if name.endswith("q_proj.lora_A.weight"))
        if change == "unknown module":
            tensors = {name.replace("q_proj", "q_prj"): tensor for name, tensor in tensors.items()}
        elif change == "shape":
            tensors[first] = torch.zeros(2, 31)
        elif change == "nan":
            tensors[first][0, 0] = float("nan")
        elif change == "no rank":
            tensors[first] = torch.zeros(0, 32)
        elif change == "huge rank":
            tensors[first] = torch.zeros(4000, 32)
        elif change == "half":
            del tensors[first]
        elif change == "other kind":
            config["peft_type"] = "XLORA"
        elif change == "rank 0":
            config["r"] = 0
        elif change == "more":
            config["modules_to_save"] = ["lm_head"]
        elif change == "no json":
            (folder / CONFIG_NAME).write_text("[")
            return
        elif change == "pickle":
            (folder / WEIGHTS_NAME).rename(folder / "adapter_model.bin")
            return
        elif change == "nothing":
            (folder / WEIGHTS_NAME).unlink()
            return
        elif change == "cut":
            raw = (folder / WEIGHTS_NAME).read_bytes()
            (folder / WEIGHTS_NAME).write_bytes(raw[: len(raw) // 2])
            return
        save_file(tensors, folder / WEIGHTS_NAME)
        (folder / CONFIG_NAME).write_text(json.dumps(config))

    return spoil


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("unknown module", "q_prj.*does not have.*Did you mean"),
        ("shape", r"blocks.0.mixer.query has shape \(2, 31\).*32 x 32 needs \(2, 32\)"),
        ("nan", "blocks.0.mixer.query holds NaN"),
        ("no rank", "rank must be from 1 to 32. Got 0"),
        ("huge rank", "rank must be from 1 to 32. Got 4000"),
        ("half", "has no lora_A.weight"),
        ("other kind", "XLORA.*Read are ADALORA, IA3, LORA, PREFIX_TUNING"),
        ("rank 0", "rank must be"),
        ("more", "modules_to_save"),
        ("no json", "valid JSON"),
        ("pickle", "is a pickle"),
        ("nothing", "holds no adapter_model.safetensors"),
        ("cut", "adapter_model.safetensors"),
    ],
)
def test_bad_files_end_in_one_error(
    change: str, message: str, models: dict[str, Pair], tmp_path: Path
) -> None:
    model = models["llama-biases"].ours
    save_adapter(disturbed("lora:rank=2", model), model, tmp_path)
    broken(change)(tmp_path)
    with pytest.raises(ModelFileError, match=message):
        load_adapter(tmp_path, model)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    first, second = (Transformer(small_llama(), RandomParameters(1)).eval() for _ in range(2))
    with torch.no_grad():
        second.norm.weight.mul_(1.5)  # type: ignore[operator, union-attr]
    adapter = disturbed("lora:rank=2", first)
    save_adapter(adapter, first, tmp_path, base="first")
    with pytest.raises(IncompatibleError, match="made for another model"):
        load_adapter(tmp_path, second)
    with pytest.raises(IncompatibleError, match="made for another model"):
        second.use(adapter)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lora:rank=0", "LoRA.rank must be"),
        ("lora:rank=33", "rank must be from 1 to 32"),
        ("lora:targets=query+qkv", "names 'qkv'.*all, attention"),
        ("adalora:rank=9,first_rank=8", "at most first_rank"),
        ("serial:targets=query+down", "Serial.targets must be output, down.*Got query"),
        ("parallel:size=33", "Parallel.size must be at most the model's width, 32"),
        ("parallel:scale=0", "Parallel.scale must be"),
        ("serial:activation=tanh", "Serial.activation must be"),
        ("lorra", "Did you mean 'lora'"),
    ],
)
def test_bad_settings_are_named(spec: str, message: str) -> None:
    model = Transformer(small_llama(), RandomParameters(1)).eval()
    with pytest.raises(ConfigError, match=message):
        new_adapter(ADAPTERS.parse(spec), model)
