"""Models in Plait's own files: what is read back, what a kill leaves, what a damaged file does."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from plait.errors import ConfigError, ModelFileError
from plait.memory import Rows
from plait.nn import Transformer, load_transformer, lower, quantize_checkpoint
from plait.nn import quantize as quantizing
from plait.nn.checkpoints import PackedCheckpoint, SafetensorsCheckpoint, open_checkpoint
from plait.nn.checkpoints.packed import PACKED_NAME
from plait.weights import FORMATS, Blocks, Coded

TEXTS = [[3, 1, 4, 1, 5, 9, 2, 6] * 4, [2, 7, 1, 8, 2, 8] * 5]
# What must come out whole of any damage: 300 files, as users are promised.
MUTATIONS = 300


def quantized(source: Path, output: Path, spec: str, **options: object) -> Path:
    with open_checkpoint(source) as checkpoint:
        made = quantize_checkpoint(checkpoint, output, FORMATS.parse(spec), calibration=TEXTS, **options)  # type: ignore[arg-type]
    assert not (output / "parts").exists()
    return made.path


def answers(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        ids = torch.tensor(TEXTS[0])
        return model.logits(model(ids, Rows([(len(ids), 0)])))


def opened(folder: Path) -> Transformer:
    with open_checkpoint(folder) as checkpoint:
        return load_transformer(checkpoint, None)


@pytest.mark.parametrize("spec", ["uniform:bits=8", "bitmod:bits=4,group=32", "nf4:group=32", "hqq:bits=4", "gptq:bits=4", "awq:bits=4", "decoupleq:bits=4,epochs=1"])  # fmt: skip
def test_a_model_answers_from_its_file_nearly_as_before(source: Path, tmp_path: Path, spec: str) -> None:
    quantized(source, tmp_path, spec)
    model = opened(tmp_path)
    assert all(isinstance(p, Coded) for p in model.blocks[0].mixer.qkv.weight.pieces())  # type: ignore[union-attr]
    assert isinstance(model.embedding.weight, Blocks)
    assert model.head.weight is model.embedding.weight
    before = answers(opened(source))
    difference = (answers(model) - before).square().mean().sqrt() / before.std()
    assert float(difference) < (0.02 if "=8" in spec else 0.25)


@pytest.mark.parametrize("spec", ["bitmod:bits=3,group=32", "db-llm:group=32", "vq:group=4,start=calibrated,rounds=1"])  # fmt: skip
def test_native_and_torch_agree_on_a_packed_model(source: Path, tmp_path: Path, spec: str) -> None:
    quantized(source, tmp_path, spec)
    plain, fast = answers(opened(tmp_path)), opened(tmp_path)
    assert lower(fast)
    from plait.memory import MemoryPlan

    ids = torch.tensor(TEXTS[0])
    with torch.no_grad():
        past = fast.new_past(MemoryPlan.parse("full"))
        logits = fast.answer(ids, Rows([(len(ids), 0)]), [past], wanted=torch.arange(len(ids)))
    torch.testing.assert_close(logits, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "spec", ["db-llm:start=calibrated", "decoupleq:bits=2,rounds=2,epochs=1", "bitstack:blocks=2"]
)
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, spec: str, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantized(source, tmp_path / "whole", spec).read_bytes()
    write, done = quantizing.write_packed, []

    def killed(path: Path, *arguments: object) -> None:
        if len(done) > stop:
            raise KeyboardInterrupt
        done.append(path)
        write(path, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(quantizing, "write_packed", killed)
        with pytest.raises(KeyboardInterrupt):
            quantized(source, tmp_path / "killed", spec)
    assert not (tmp_path / "killed" / PACKED_NAME).exists()
    lines: list[str] = []
    assert quantized(source, tmp_path / "killed", spec, progress=lines.append).read_bytes() == whole
    assert sum("made before" in line for line in lines) == stop
    assert len(lines) == 3


def test_parts_of_another_run_are_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizing._Job, "finish", lambda job, path: pytest.fail("never"))
    with pytest.raises(pytest.fail.Exception):
        quantized(source, tmp_path, "bitmod:bits=3")
    with pytest.raises(ModelFileError, match="other settings"):
        quantized(source, tmp_path, "bitmod:bits=4")


def test_a_folder_with_another_model_or_other_files_keeps_them(source: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "mine.txt").write_text("not of this run")
    # What a kill in the middle of a write leaves.
    left = [tmp_path / f".{PACKED_NAME}.abc.tmp", parts / ".blocks.1.safetensors.abc.tmp"]
    for path in left:
        path.write_bytes(b"half")
    with open_checkpoint(source) as checkpoint:
        path = quantize_checkpoint(checkpoint, tmp_path, FORMATS.parse("bitmod:bits=3")).path
    assert [file.name for file in parts.iterdir()] == ["mine.txt"]
    assert not any(path.exists() for path in left)
    whole, prepared = path.read_bytes(), []
    for folder, spec in ((tmp_path, "bitmod:bits=4"), (source, "bitmod:bits=3")):
        with (
            open_checkpoint(source) as checkpoint,
            pytest.raises(ModelFileError, match="another output folder"),
        ):
            quantize_checkpoint(
                checkpoint, folder, FORMATS.parse(spec), prepare=lambda: prepared.append("files")
            )
    assert not prepared
    assert path.read_bytes() == whole
    assert not (source / "parts").exists()
    (parts / "mine.txt").unlink()
    parts.rmdir()
    assert quantized(source, tmp_path, "bitmod:bits=3").read_bytes() == whole


def test_calibration_is_asked_for_and_checked(source: Path, tmp_path: Path) -> None:
    with open_checkpoint(source) as checkpoint, pytest.raises(ConfigError, match="--calibration"):
        quantize_checkpoint(checkpoint, tmp_path, FORMATS.parse("gptq"))
    broken = tmp_path / "broken"
    broken.mkdir()
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors")
    (broken / "config.json").write_bytes((source / "config.json").read_bytes())
    for spec in ("bitmod", "gptq"):
        with pytest.raises(ConfigError, match=r"blocks\.1\.feed_forward\.(up|down)\.weight"):
            quantized(broken, tmp_path / f"out-{spec}", spec)


def test_the_head_may_have_a_format_of_its_own(source: Path, tmp_path: Path) -> None:
    quantized(source, tmp_path, "uniform:bits=2", head=FORMATS.parse("bitmod:bits=4"))
    model = opened(tmp_path)
    assert model.embedding.weight.format == "bitmod4"
    assert model.blocks[0].feed_forward.down.weight.format == "uniform2"  # type: ignore[union-attr]


def test_bytes_of_the_file_are_those_of_the_matrices(source: Path, tmp_path: Path) -> None:
    path = quantized(source, tmp_path, "bitmod:bits=3")
    model = opened(tmp_path)
    held = sum({id(m): m.nbytes() for m in [model.embedding.weight, *(
        linear.weight for block in model.blocks for linear in quantizing._linears(block)  # type: ignore[arg-type]
    )]}.values())  # fmt: skip
    with SafetensorsCheckpoint(path) as file:
        stored = sum(info.nbytes for info in file.tensors().values())
    assert stored - held == sum(4 * p.numel() for name, p in model.named_parameters() if "norm" in name)


@pytest.mark.parametrize(
    "spec", ["bitmod:bits=3,group=32", "nf4:group=32", "bitstack:blocks=3", "db-llm:group=32", "vq:books=1"]
)
def test_a_mutated_file_is_a_model_or_one_error(source: Path, tmp_path: Path, spec: str) -> None:
    path = quantized(source, tmp_path / "whole", spec)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    randomness = random.Random(0)
    folder = tmp_path / "mutated"
    folder.mkdir()
    refused = 0
    for number in range(MUTATIONS):
        data = bytearray(whole)
        if number % 3 == 0:
            del data[randomness.randrange(len(data)) :]
        else:
            # Most damage is done where the file says what it holds.
            end = 8 + length if number % 3 == 1 else len(data)
            for _ in range(randomness.randrange(1, 4)):
                data[randomness.randrange(end)] = randomness.randrange(256)
        (folder / PACKED_NAME).write_bytes(data)
        try:
            model = opened(folder)
            assert model.config.vocab_size == 48 or model.embedding.weight.shape[0] == model.config.vocab_size
        except ModelFileError:
            refused += 1
    assert refused >= MUTATIONS // 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'version\\":1', b'version\\":2', "version 2"),
        (b'\\"kind\\":\\"coded\\"', b'\\"kind\\":\\"codex\\"', "known kind"),
        (b"bitmod3", b"bitmod4", "codes"),
        (b"plait.weights", b"plait.neights", "no plait.weights"),
    ],
)
def test_a_file_that_lies_says_where(
    source: Path, tmp_path: Path, old: bytes, new: bytes, message: str
) -> None:
    path = quantized(source, tmp_path, "bitmod:bits=3,group=32")
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    with pytest.raises(ModelFileError, match=message):
        opened(tmp_path)


def test_a_packed_checkpoint_lists_matrices_by_our_names(source: Path, tmp_path: Path) -> None:
    quantized(source, tmp_path, "bitmod:bits=3")
    with PackedCheckpoint(tmp_path) as checkpoint:
        info = checkpoint.tensors()["blocks.1.feed_forward.up.weight"]
        assert (info.shape, info.format) == ((96, 64), "bitmod:bits=3")
        assert torch.equal(checkpoint.load(info.name), checkpoint.load_packed(info.name).unpack())
        with pytest.raises(ModelFileError, match="no matrix"):
            checkpoint.load_packed("nothing")
