"""From texts to a folder that opens, through the commands: what is trained, tuned, resumed and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import plait
from plait.cli.main import app
from plait.engine import LanguageModel
from plait.errors import ConfigError
from plait.memory import Rows
from plait.nn.mixers import AttentionConfig
from plait.train import (
    Corpus,
    Distillation,
    ModelShape,
    Recipe,
    TokenData,
    Training,
    changed,
    encoded,
    finish,
    language_model,
    open_start,
    own_text,
    prompts_from,
    python_corpus,
    resume,
    train_new,
    tune,
)
from plait.train.runs import spread

SHAPE = "width=32,blocks=3,heads=2,kv_heads=1,inner=48,vocab_size=300,context=64"
TRAINING = "steps=30,rows=128,context=32,learning_rate=1e-2,warmup=3,save_every=10,evaluate_every=15"
LINES = "one two three four five six seven eight nine ten\n" * 60


@pytest.fixture
def run() -> Callable[..., Result]:
    def call(*arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments), env={"NO_COLOR": "1", "TERM": "dumb"})

    return call


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained by the command on lines that count to ten."""
    folder = tmp_path_factory.mktemp("counting")
    (folder / "a.txt").write_text(LINES)
    (folder / "b.txt").write_text(LINES[:400])
    texts = [str(folder / "a.txt"), str(folder / "b.txt")]
    out = str(folder / "model")
    result = CliRunner().invoke(
        app, ["train", "lm", *texts, "--out", out, "--shape", SHAPE, "--training", TRAINING, "--json"]
    )
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["steps"], told["tokens"]) == (30, 30 * 128)
    assert told["held_out"] < told["held_out_before"]
    return folder / "model"


def test_the_command_makes_a_model_that_opens(counting: Path) -> None:
    lm = plait.load(counting)
    assert lm.model.config.placeholder == lm.tokenizer.id_of("<|placeholder|>") == 1
    held = json.loads((counting / "training" / "result.json").read_text())["held_out"]
    score = lm.score(LINES[:400])
    # Measured on other cuts of the text, so only near.
    assert score.nats / score.tokens == pytest.approx(held, abs=0.5)


def test_it_opens_in_transformers_with_the_same_logits(counting: Path) -> None:
    import transformers

    ids = torch.tensor(plait.load(counting).encode("one two three"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(counting, dtype=torch.float32)
    ours = plait.load(counting, weights="fp32").model
    with torch.no_grad():
        wanted = theirs(ids[None]).logits[0]
        found = ours.logits(ours(ids, Rows([(len(ids), 0)])))
    assert (wanted - found)[:, 2:].abs().max() < 1e-4


def test_resuming_what_is_finished_changes_nothing(counting: Path, run: Callable[..., Result]) -> None:
    before = (counting / "model.safetensors").read_bytes()
    result = run("train", "lm", "--out", str(counting), "--resume")
    assert result.exit_code == 0, result.stderr
    assert (counting / "model.safetensors").read_bytes() == before
    assert "plait run" in result.stderr


def test_a_folder_with_a_run_is_not_overwritten(counting: Path, run: Callable[..., Result]) -> None:
    text = str(counting.parent / "a.txt")
    refused = run("train", "lm", text, "--out", str(counting), "--shape", SHAPE, "--training", "context=32")
    assert refused.exit_code == 1
    assert "holds a run" in refused.stderr
    both = run("train", "lm", text, "--out", str(counting), "--resume")
    assert both.exit_code == 2
    assert run("train", "lm", "--out", str(counting.parent / "new")).exit_code == 2


def test_a_folder_with_a_model_is_not_written_over(
    counting: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    text, model = str(counting.parent / "a.txt"), tmp_path / "model"
    shutil.copytree(counting, model, ignore=shutil.ignore_patterns("training"))
    packed = tmp_path / "packed"
    assert run("quantize", str(model), "--format", "db-llm:group=32", "-o", str(packed)).exit_code == 0
    before = {path: path.read_bytes() for path in (*model.iterdir(), *packed.iterdir())}
    shape = ["--shape", SHAPE, "--training", "context=32,steps=1"]
    for command in (
        ["train", "lm", text, "--out", str(model), *shape],
        ["train", "lm", text, "--out", str(packed), *shape],
        ["train", "draft", "--model", str(model), "--out", str(model), "--blocks", "1"],
        ["train", "weights", text, "--packed", str(packed), "--teacher", str(model), "--out", str(packed)],
        ["quantize", str(model), "--output", str(model)],
        ["quantize", str(model), "--output", str(packed)],
    ):
        refused = run(*command)
        assert refused.exit_code == 1, command
        assert "another" in refused.stderr
        assert {path: path.read_bytes() for path in (*model.iterdir(), *packed.iterdir())} == before


def test_tuning_on_units_keeps_the_model_and_makes_it_answer_placeholders(
    counting: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    out = tmp_path / "lud"
    result = run(
        "train", "lud", str(counting.parent / "a.txt"), "--model", str(counting), "--out", str(out),
        "--objective", "alpha=0.3,share=0.5", "--training", "steps=12,rows=96,context=32,warmup=2", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    plain = plait.load(out, weights="fp32")
    guessing = plait.load(out, weights="fp32", draft="lud:beta=0.2")
    wanted = plain.generate("one two", max_new_tokens=20, ignore_end=True)
    assert guessing.generate("one two", max_new_tokens=20, ignore_end=True).tokens == wanted.tokens
    assert resume(out).config.start == str(counting)


def test_a_draft_learns_to_say_what_its_model_says(counting: Path, tmp_path: Path) -> None:
    base, tokenizer, _ = open_start(str(counting))
    writer = plait.load(counting)
    data = own_text(writer, [writer.encode("one two"), writer.encode("six seven")], 30).counting_all()
    training = "steps=25,rows=32,context=32,learning_rate=5e-3,warmup=2,save_every=25,evaluate_every=25"
    recipe = Recipe(objective=Distillation(top=8), training=changed(Training(), training), blocks=2)
    trainer = tune(recipe, "counting", base, tokenizer, data, data, tmp_path / "draft", corpus="its own")
    assert len(trainer.config.model.blocks) == 2

    result = finish(trainer, tmp_path / "draft")
    assert result.held_out is not None
    assert result.held_out_before is not None
    # Both are the cross-entropy under the teacher's law, mostly; the least there is is its entropy.
    assert result.held_out < result.held_out_before
    guessing = plait.load(counting, weights="fp32", draft="chain", draft_model=tmp_path / "draft")
    plain = plait.load(counting, weights="fp32")
    wanted = plain.generate("one two", max_new_tokens=20, ignore_end=True).tokens
    assert guessing.generate("one two", max_new_tokens=20, ignore_end=True).tokens == wanted


def test_its_own_text_counts_answers_and_not_prompts(counting: Path) -> None:
    lm = plait.load(counting)
    prompts = [lm.encode("one two"), lm.encode("nine")]
    data = own_text(lm, prompts, 10)
    assert [int(w) for w in data.weights[: data.lengths[0]]] == [0] * len(prompts[0]) + [1] * (
        data.lengths[0] - len(prompts[0])
    )
    assert data.ids[: len(prompts[0])].tolist() == prompts[0]


def test_prompts_are_drawn_from_the_texts_by_their_seed(counting: Path) -> None:
    lm: LanguageModel = plait.load(counting)
    first = prompts_from(lm, [LINES], 4, seed=1)
    assert first == prompts_from(lm, [LINES], 4, seed=1)
    assert first != prompts_from(lm, [LINES], 4, seed=2)
    assert all(lm.tokenizer.decode(prompt) in LINES for prompt in first)
    assert prompts_from(lm, ["short"], 4) == []


def test_what_is_held_out_is_not_learned() -> None:
    corpus = python_corpus(code=0.02)
    assert not set(corpus.learned) & set(corpus.held_out)
    assert all(len(text) > 0 for text in corpus.learned)
    assert python_corpus(code=0.02) == corpus


def test_blocks_are_spread_over_the_model() -> None:
    assert spread(6, 30) == [0, 6, 12, 17, 23, 29]
    assert spread(1, 4) == [0]
    assert spread(4, 4) == [0, 1, 2, 3]


def test_what_cannot_be_started_is_said(counting: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a shape"):
        train_new(
            Recipe(objective=language_model().objective, training=Training()), Corpus(["x"], [], ""), tmp_path
        )
    with pytest.raises(ConfigError, match=r"heads must cut"):
        ModelShape(width=30, heads=4)
    base, tokenizer, _ = open_start(str(counting))
    recipe = Recipe(objective=Distillation(), training=Training(), blocks=9)
    with pytest.raises(ConfigError, match=r"from 1 to the model's 3"):
        tune(recipe, "x", base, tokenizer, TokenData.of([[1]]), None, tmp_path / "x", corpus="")
    with pytest.raises(ConfigError, match="no setting 'step'"):
        changed(Training(), "step=3")
    assert encoded(["one"], tokenizer).ids[-1] == 0


@pytest.mark.model
def test_a_token_that_cannot_be_spared_is_refused(smollm2_gguf: Path) -> None:
    for name in ("<|im_end|>", "the", "nothing of that name"):
        with pytest.raises(ConfigError, match="can spare"):
            open_start(str(smollm2_gguf), placeholder=name)
    model, tokenizer, template = open_start(str(smollm2_gguf), placeholder="<empty_output>")
    assert model.config.placeholder == tokenizer.id_of("<empty_output>")
    assert template is not None


@pytest.mark.parametrize(
    "changes", ["distance_bias=harmonic", 'rotary=false,distance_bias={"name":"linear"}']
)
def test_a_model_with_a_bias_by_distance_is_trained_and_opens(
    tmp_path: Path, run: Callable[..., Result], changes: str
) -> None:
    text, out = tmp_path / "a.txt", tmp_path / "model"
    text.write_text(LINES)
    shape = f"{SHAPE},{changes}"
    result = run(
        "train", "lm", str(text), "--out", str(out), "--shape", shape, "--training", TRAINING, "--json"
    )
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    lm = plait.load(out)
    mixer = lm.model.config.blocks[0].mixer
    assert isinstance(mixer, AttentionConfig)
    assert mixer.distance_bias == changed(ModelShape(), changes).distance_bias
    assert (mixer.rope is None) == changes.startswith("rotary")
    score = lm.score(LINES[:400])
    assert score.nats / score.tokens == pytest.approx(told["loss"], abs=0.6)
    before = (out / "model.safetensors").read_bytes()
    assert run("train", "lm", "--out", str(out), "--resume").exit_code == 0
    assert (out / "model.safetensors").read_bytes() == before
