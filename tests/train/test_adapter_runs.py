"""Adapters trained beside packed weights: exact to resume, the model untouched, and merged at the end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import plait
from plait.cli.main import app
from plait.errors import ConfigError
from plait.train import (
    Corpus,
    ModelShape,
    Trainer,
    Training,
    adapter,
    changed,
    encoded,
    finish,
    language_model,
    resume,
    train_new,
    tune_adapter,
)
from plait.weights import FORMATS, Linear
from plait.weights.adapters import ADAPTERS

LINES = "one two three four five six seven eight nine ten\n" * 60
OTHER = "ten nine eight seven six five four three two one\n" * 60
TRAINING = "steps=6,rows=96,context=32,learning_rate=2e-2,warmup=1,save_every=100,evaluate_every=3"


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that counts up, of widths that packed formats take."""
    folder = tmp_path_factory.mktemp("counting") / "model"
    shape = ModelShape(width=32, blocks=2, heads=2, kv_heads=1, inner=64, vocab_size=300, context=64)
    training = Training(steps=20, rows=96, context=32, learning_rate=1e-2, warmup=2)
    recipe = replace(language_model(), shape=shape, training=training)
    finish(train_new(recipe, Corpus([LINES], [], "counting"), folder), folder)
    return folder


def new_run(
    counting: Path,
    out: Path,
    method: str = "lora:rank=4",
    weights: str = "bitmod:bits=4,group=32",
    original: str = "",
) -> Trainer:
    recipe = adapter()
    recipe = replace(recipe, training=changed(recipe.training, TRAINING))
    return tune_adapter(
        ADAPTERS.parse(method),
        str(counting),
        lambda tokenizer: (encoded([OTHER], tokenizer), encoded([OTHER[:300]], tokenizer)),
        out,
        weights=weights,
        original=original,
        recipe=recipe,
    )


@pytest.mark.parametrize("format", ["bitmod:bits=4,group=32", "q8_0", "uniform:bits=3,group=16"])
def test_gradients_pass_packed_weights_as_they_pass_dense_ones(format: str) -> None:
    weight, x = torch.randn(40, 64), torch.randn(5, 64, requires_grad=True)
    with torch.no_grad():
        packed = FORMATS.parse(format).pack(weight)
        linear = Linear(packed)
    linear(x).square().sum().backward()
    assert x.grad is not None
    product = x.detach() @ packed.unpack().T
    torch.testing.assert_close(x.grad, 2 * product @ packed.unpack(), atol=2e-2, rtol=2e-3)


@pytest.mark.parametrize(
    "method", ["lora:rank=4,dropout=0.2,up_rate=4", "adalora:first_rank=4,rank=2,every=1"]
)
def test_a_run_that_was_left_goes_on_to_the_same_bytes(method: str, counting: Path, tmp_path: Path) -> None:
    whole = new_run(counting, tmp_path / "whole", method)
    frozen = {name: buffer.clone() for name, buffer in whole.model.named_buffers()}
    result = finish(whole, tmp_path / "whole")
    assert result.held_out is not None
    assert result.held_out_before is not None
    assert result.held_out < result.held_out_before
    assert all(torch.equal(frozen[name], buffer) for name, buffer in whole.model.named_buffers())
    assert all(parameter.grad is None for parameter in whole.model.parameters())
    left = new_run(counting, tmp_path / "left", method)
    left._evaluate()
    for _ in range(2):
        left.losses.append(left._update())
        left.step += 1
    left.save()
    finish(resume(tmp_path / "left"), tmp_path / "left")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "left"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "method",
    [
        "dora:rank=2",
        "vera:rank=16",
        "ia3",
        "bitfit",
        "prefix:tokens=4",
        "prompt:tokens=4",
        "serial:size=4",
        "parallel:size=4",
    ],
)
def test_every_method_learns(method: str, counting: Path, tmp_path: Path) -> None:
    trainer = new_run(counting, tmp_path, method)
    result = trainer.run()
    assert result.held_out[-1][1] < result.held_out[0][1]


def test_a_run_starts_from_what_packing_lost(counting: Path, tmp_path: Path) -> None:
    packed = "loftq:bits=2,group=32,rank=4"
    method = "lora:rank=4,start=loftq"
    near = new_run(counting, tmp_path / "near", method, packed, str(counting))
    assert near.adapter is not None
    ups = [parameter for name, parameter in near.adapter.named_parameters() if name.endswith("up")]
    assert all(float(up.detach().norm()) > 0 for up in ups)
    near.save()
    again = resume(tmp_path / "near")
    assert all(
        torch.equal(mine, other)
        for mine, other in zip(near.adapter.parameters(), again.adapter.parameters(), strict=True)  # type: ignore[union-attr]
    )
    finish(again, tmp_path / "near")
    with pytest.raises(ConfigError, match="--original"):
        new_run(counting, tmp_path / "none", method, packed)
    with pytest.raises(ConfigError, match="start=loftq"):
        new_run(counting, tmp_path / "superfluous", "lora:rank=4", packed, str(counting))


def test_a_run_is_bound_to_its_model(counting: Path, tmp_path: Path) -> None:
    trainer = new_run(counting, tmp_path / "run")
    trainer.save()
    with pytest.raises(ConfigError, match="holds a run"):
        new_run(counting, tmp_path / "run")
    weights = counting / "model.safetensors"
    before = weights.read_bytes()
    tensors = load_file(weights)
    try:
        from safetensors.torch import save_file

        save_file({k: v * (1.5 if k == "model.norm.weight" else 1) for k, v in tensors.items()}, weights)
        with pytest.raises(ConfigError, match="not the model that the run started from"):
            resume(tmp_path / "run")
    finally:
        weights.write_bytes(before)


def test_the_commands_train_tell_answer_and_merge(counting: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments), env={"NO_COLOR": "1", "TERM": "dumb"})
        assert result.exit_code == 0, result.stderr
        return result.stdout

    (tmp_path / "a.txt").write_text(OTHER)
    (tmp_path / "b.txt").write_text(OTHER[:400])
    out, model, texts = str(tmp_path / "down"), str(counting), [str(tmp_path / f"{n}.txt") for n in "ab"]
    told = json.loads(
        run("train", "adapter", *texts, "--out", out, "--model", model, "--method", "lora:rank=4",
            "--training", TRAINING, "--json")
    )  # fmt: skip
    assert told["held_out"] < told["held_out_before"]
    facts = json.loads(run("adapters", "info", out, "--json"))
    assert facts["base"] == model
    assert facts["parameters"] == told["parameters"]
    assert facts["matrices"] == 14
    text = str(tmp_path / "b.txt")
    plain = json.loads(run("score", text, "--model", model, "--json"))["nats"]
    adapted = json.loads(run("score", text, "--model", model, "--adapter", out, "--json"))["nats"]
    assert adapted < plain
    merged = str(tmp_path / "merged")
    assert json.loads(run("adapters", "merge", out, "--model", model, "--output", merged, "--json")) == {
        "path": merged
    }
    assert json.loads(run("score", text, "--model", merged, "--json"))["nats"] == pytest.approx(
        adapted, rel=1e-4
    )
    answer = plait.load(model, adapter=out).generate("ten nine", max_new_tokens=5).text
    assert plait.load(merged).generate("ten nine", max_new_tokens=5).text == answer
    again = CliRunner().invoke(app, ["adapters", "merge", out, "--model", model, "--output", merged])
    assert again.exit_code == 1
    assert "holds a model" in again.stderr
    packed = str(tmp_path / "packed")
    run("quantize", model, "--output", packed, "--format", "uniform:group=32")
    again = CliRunner().invoke(app, ["adapters", "merge", out, "--model", model, "--output", packed])
    assert "holds a model" in again.stderr
