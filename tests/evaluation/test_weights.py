"""Formats of one model side by side: numbers against their definitions, and the command that prints them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from plait.cli.main import app
from plait.engine import load, quantize
from plait.engine.weight_quality import Quality, WeightJudge
from plait.errors import ConfigError, IncompatibleError
from plait.evaluation.weights import WeightRow, compare_weights, held_bytes, pareto
from plait.memory import Rows
from plait.nn import Transformer, save_transformer
from plait.nn.mixers import AttentionConfig
from plait.nn.rotary import RopeConfig
from plait.text import Tokenizer
from small_models import small_transformer

TEXT = "The sea is wide, and what lies behind it nobody knows. " * 12
FORMATS = ["file", "uniform:bits=4,group=32", "gptq:bits=3,group=32", "bitstack:blocks=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a tokenizer of bytes, as Transformers keeps it."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    path = tmp_path_factory.mktemp("model")
    backend = Backend(
        models.BPE({piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    mixer = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, rope=RopeConfig(theta=1e4, dim=16))
    model = small_transformer(mixer, mixer, seed=3, vocab_size=256, width=64, inner=96, max_positions=512)
    save_transformer(model, path)
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def rows(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[WeightRow]:
    return list(
        compare_weights(
            folder, FORMATS, folder=tmp_path_factory.mktemp("made"), text=TEXT, calibration=TEXT[::-1],
            windows=2, window_tokens=96, samples=1, sizes=5, speed_tokens=3,
        )
    )  # fmt: skip


def laws(model: Transformer, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(torch.tensor(ids), Rows([(len(ids), 0)]))).double().log_softmax(dim=-1)


@pytest.mark.parametrize("plot", ["plot.gif", "missing/plot.svg"])
def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_measured(
    plot: str, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    given = ["eval", "weights", "no-such-model", "--work", str(work), "--plot", str(tmp_path / plot)]
    done = CliRunner().invoke(app, given, env={"NO_COLOR": "1"})
    assert done.exit_code == 1
    assert "no-such-model" not in done.stderr
    assert ("plot.gif" if plot == "plot.gif" else "no folder") in done.stderr.replace("\n", " ")


def test_numbers_are_those_of_their_definitions(folder: Path) -> None:
    exact, rough = (load(folder, weights=form) for form in ("fp32", "uniform:bits=3,group=32"))
    ids = exact.tokenizer.encode(TEXT)
    windows = [ids[:200], ids[200:330]]
    judge = WeightJudge(exact.model, windows)
    truth, law = ([laws(lm.model, window)[:-1] for window in windows] for lm in (exact, rough))
    following = torch.tensor([token for window in windows for token in window[1:]])
    truth_law, rough_law = torch.cat(truth), torch.cat(law)
    found = judge.quality(rough.model)
    assert found.tokens == 328
    # Native activations have 15 bits.
    assert found.nats == pytest.approx(float(-rough_law.gather(1, following[:, None]).mean()), rel=1e-4)
    wanted = (truth_law.exp() * (truth_law - rough_law)).sum(dim=1).mean()
    assert found.divergence == pytest.approx(float(wanted), rel=1e-3)
    agreeing = (truth_law.argmax(dim=1) == rough_law.argmax(dim=1)).double().mean()
    assert found.agreement == pytest.approx(float(agreeing), abs=0.01)
    own = judge.quality()
    assert (own.divergence, own.agreement) == (0.0, 1.0)
    assert own.perplexity == pytest.approx(
        float((-truth_law.gather(1, following[:, None]).mean()).exp()), rel=1e-4
    )


def test_rows_count_what_is_there(rows: list[WeightRow]) -> None:
    names = [row.name for row in rows]
    assert names[:3] == FORMATS[:3]
    assert len(names) == 8
    stack = rows[3:]
    assert [row.held_bytes for row in stack] == sorted({row.held_bytes for row in stack})
    for row in rows[1:]:
        # The file has a header beside its tensors.
        assert 0 <= row.file_bytes - row.held_bytes <= 16_000
        assert row.tokens_per_second is not None
        assert row.tokens_per_second > 0
    assert rows[0].quality.divergence < 1e-4
    assert rows[1].bits_per_weight == pytest.approx(5.0)
    assert stack[-1].quality.divergence < stack[0].quality.divergence


def test_the_front_is_what_nothing_beats() -> None:
    def row(name: str, nbytes: int, divergence: float) -> WeightRow:
        return WeightRow(name, Quality(1.0, divergence, 1.0, 1), nbytes, nbytes, 1.0)

    rows = [row("a", 3, 0.1), row("b", 1, 0.5), row("c", 2, 0.6), row("d", 3, 0.05), row("e", 4, 0.05)]
    assert [one.name for one in pareto(rows)] == ["b", "d"]


def test_bytes_held_are_those_of_every_parameter_once(folder: Path) -> None:
    model = load(folder, weights="fp32").model
    assert held_bytes(model) == 4 * sum(parameter.numel() for parameter in model.parameters())


def test_the_command_prints_and_draws(folder: Path, tmp_path: Path) -> None:
    text, plot = tmp_path / "text.txt", tmp_path / "plot.svg"
    text.write_text(TEXT)
    arguments = [
        "eval", "weights", str(folder), "-f", "file", "-f", "uniform:bits=4,group=32", "-t", str(text),
        "--windows", "1", "--window-tokens", "64", "--work", str(tmp_path / "work"), "--plot", str(plot),
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "* file" in result.stdout
    assert "<svg" in plot.read_text()
    assert (tmp_path / "work" / "uniform-group=32" / "plait.safetensors").exists()
    facts = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert [one["name"] for one in facts] == ["file", "uniform:bits=4,group=32"]
    assert facts[0]["on_front"]


def test_what_cannot_be_compared_is_refused(folder: Path, tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    model = load(folder, weights="fp32").model
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        WeightJudge(model, [[1]])
    with pytest.raises(ConfigError, match="Leave out budget"):
        list(compare_weights(folder, ["bitstack:bits=3.0"], folder=tmp_path, text=TEXT))
    mixer = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16)
    other = small_transformer(mixer, seed=0, vocab_size=99, width=64, inner=96, max_positions=64)
    with pytest.raises(IncompatibleError, match="99 and 256"):
        WeightJudge(model, [[1, 2]]).quality(other)


def test_a_stack_is_loaded_up_to_a_budget_and_resized_while_sessions_live(
    folder: Path, tmp_path: Path
) -> None:
    quantize(folder, "bitstack:blocks=4", tmp_path, calibration=TEXT, samples=1)
    whole = load(tmp_path)
    sizes = whole.weights.sizes()
    small = load(tmp_path, weights=f"bitstack:budget={sizes[5]}")
    assert small.weights.nbytes() == sizes[5] < whole.weights.nbytes() == sizes[-1]
    assert load(tmp_path, weights="bitstack:bits=3.0").weights.file.bits(0) <= 3.0
    wanted = whole.generate("The sea", max_new_tokens=6, ignore_end=True).tokens
    with small.session() as session:
        session.read("The sea is")
        assert len(session.generate(max_new_tokens=3, ignore_end=True).tokens) == 3
        assert small.weights.resize().nbytes == sizes[-1]
        # What was read stays; the session goes on with the larger model.
        assert len(session.generate(max_new_tokens=3, ignore_end=True).tokens) == 3
    assert small.generate("The sea", max_new_tokens=6, ignore_end=True).tokens == wanted
    with pytest.raises(IncompatibleError, match="size is fixed"):
        _ = load(folder).weights
    with pytest.raises(ConfigError, match="holds none"):
        load(folder, weights="bitstack:bits=3.0")
