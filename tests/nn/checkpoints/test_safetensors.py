"""Safetensors folders as Hugging Face lays them out, and everything that is refused."""

from __future__ import annotations

import gc
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from plait.errors import ModelFileError
from plait.nn.checkpoints import SafetensorsCheckpoint, open_checkpoint
from plait.weights import Dense

CONFIG = {"model_type": "llama", "rope_scaling": {"factor": 2.0}, "limit": [0.0, float("inf")]}
FIRST = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
SECOND = {"c": torch.full((3, 2), 0.5, dtype=torch.float16), "d": torch.arange(3), "e": torch.empty(0, 2)}


def single(folder: Path) -> Path:
    save_file(FIRST | SECOND, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def sharded(folder: Path, weight_map: dict[str, Any] | None = None) -> Path:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, tensors in zip(names, (FIRST, SECOND), strict=True):
        save_file(tensors, folder / name)
    if weight_map is None:
        weight_map = dict.fromkeys(FIRST, names[0]) | dict.fromkeys(SECOND, names[1])
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def raw_file(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def assert_same(loaded: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(loaded, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", [single, sharded])
def test_a_folder_loads_every_tensor_as_stored(layout: Any, tmp_path: Path) -> None:
    with open_checkpoint(layout(tmp_path)) as checkpoint:
        assert isinstance(checkpoint, SafetensorsCheckpoint)
        assert checkpoint.metadata == CONFIG
        expected = FIRST | SECOND
        assert set(checkpoint.tensors()) == set(expected)
        for name, tensor in expected.items():
            info = checkpoint.tensors()[name]
            assert info.name == name
            assert info.shape == tuple(tensor.shape)
            assert info.nbytes == tensor.nbytes
            assert_same(checkpoint.load(name), tensor)
        formats = {name: info.format for name, info in checkpoint.tensors().items()}
        assert formats == {"a": "f32", "b": "bf16", "c": "f16", "d": "i64", "e": "f32"}


def test_a_single_file_is_opened_with_the_config_beside_it(tmp_path: Path) -> None:
    path = single(tmp_path) / "model.safetensors"
    assert open_checkpoint(path).metadata == CONFIG
    (tmp_path / "config.json").unlink()
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata == {}
        assert_same(checkpoint.load("a"), FIRST["a"])


def test_a_matrix_loads_packed_as_dense(tmp_path: Path) -> None:
    with open_checkpoint(single(tmp_path)) as checkpoint:
        packed = checkpoint.load_packed("c")
        assert isinstance(packed, Dense)
        assert_same(packed.unpack().detach(), SECOND["c"])
        with pytest.raises(ModelFileError, match="only a matrix can be loaded packed"):
            checkpoint.load_packed("d")


def test_tensors_are_mapped_outlive_the_checkpoint_and_never_change_the_file(tmp_path: Path) -> None:
    path = single(tmp_path) / "model.safetensors"
    before = path.read_bytes()
    with open_checkpoint(path) as checkpoint:
        loaded = checkpoint.load("a")
        assert loaded.data_ptr() == checkpoint.load("a").data_ptr()
    with pytest.raises(ModelFileError, match="closed"):
        checkpoint.load("a")
    del checkpoint
    gc.collect()
    loaded.mul_(2)
    assert_same(loaded, 2 * FIRST["a"])
    del loaded
    gc.collect()
    assert path.read_bytes() == before


def test_the_index_decides_which_tensors_there_are(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "model-00001-of-00002.safetensors"})
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors()) == ["a"]
        with pytest.raises(ModelFileError, match="has no tensor 'c' among its 1"):
            checkpoint.load("c")


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/outside.safetensors",
        "inside/model.safetensors",
        "..\\outside.safetensors",
        "C:outside.safetensors",
        "..",
        "",
        "model.bin",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_a_shard_outside_the_folder_is_refused(shard: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(FIRST, tmp_path / "outside.safetensors")
    sharded(folder, {"a": shard})
    with pytest.raises(ModelFileError, match=r"tensor 'a' is in .*, not a \.safetensors file name"):
        open_checkpoint(folder)


def test_a_missing_shard_and_a_missing_tensor_are_named(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "gone.safetensors"})
    with pytest.raises(ModelFileError, match=r"gone\.safetensors does not exist"):
        open_checkpoint(tmp_path)
    sharded(tmp_path, {"a": "model-00002-of-00002.safetensors"})
    with pytest.raises(
        ModelFileError, match=r"00002\.safetensors: the index puts tensor 'a' here, but it is not"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", "does not hold valid JSON"),
        ("[1]", "not an object"),
        ("[" * 100_000, "does not hold valid JSON"),
        ('{"a": ' + "9" * 10_000 + "}", "does not hold valid JSON"),
        ('{"a": 1, "a": 2}', "a key is given twice"),
        ("\udcff", "does not hold valid JSON"),
        ('{"a": "' + "x" * (4 << 20) + '"}', "above the 4 MiB"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ],
)
def test_a_config_that_is_not_a_small_json_object_is_refused(text: str, message: str, tmp_path: Path) -> None:
    single(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelFileError, match=rf"config\.json.*{message}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("weight_map", [{}, [], "a", None])
def test_an_index_without_a_weight_map_is_refused(weight_map: Any, tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelFileError, match="it has no weight_map object"):
        open_checkpoint(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    (single(tmp_path) / "config.json").unlink()
    with pytest.raises(ModelFileError, match=r"config\.json does not exist"):
        open_checkpoint(tmp_path)


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "m.pt", "m.pth", "m.ckpt", "m.pkl", "M.PT", "disguised", "m.gguf"]
)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5, "zip"])
def test_pickles_are_refused_with_the_reason_and_never_read(
    name: str, protocol: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    if protocol == "zip":
        torch.save({"bomb": Bomb()}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(), protocol=int(protocol)))
    reason = "is a pickle, and reading one can run any code inside it.*safetensors"
    with pytest.raises(ModelFileError, match=re.escape(name) + f" {reason}"):
        open_checkpoint(path)
    if path.suffix.lower() in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        with pytest.raises(ModelFileError, match=reason):
            open_checkpoint(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_safetensors_beside_a_pickle_are_used(tmp_path: Path) -> None:
    (single(tmp_path) / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert set(open_checkpoint(tmp_path).tensors()) == set(FIRST | SECOND)


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "page.gguf").write_text("<!DOCTYPE html> a secret")
    (tmp_path / "pointer.gguf").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    (tmp_path / "folder").mkdir()
    for name, message in {
        "missing.gguf": "does not exist",
        "nul\0name": "cannot be read",
        "x" * 5000: "cannot be read",
        "empty.safetensors": "is empty",
        "page.gguf": "neither a GGUF nor a safetensors file",
        "pointer.gguf": "is a Git LFS pointer",
        "folder": r"has neither model\.safetensors nor model\.safetensors\.index\.json",
    }.items():
        with pytest.raises(ModelFileError, match=message) as caught:
            open_checkpoint(tmp_path / name)
        # A path may come from another person than the one who reads the error.
        assert "secret" not in str(caught.value)
    with pytest.raises(ModelFileError, match="not a regular file"):
        open_checkpoint("/dev/null")
    for reader in (SafetensorsCheckpoint, open_checkpoint):
        with pytest.raises(ModelFileError, match="does not exist"):
            reader(tmp_path / "missing")


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry("F32", [4], 0, 12)}, "not a valid safetensors file"),
        ({"a": entry("F32", [4], 0, 16), "b": entry("F32", [4], 0, 16)}, "not a valid safetensors file"),
        ({"a": entry("F32", [2], 8, 16)}, "not a valid safetensors file"),
        ({"a": entry("F32", [8], 0, 32)}, "not a valid safetensors file"),
        ({"a": entry("F32", [2**63, 2], 0, 16)}, "not a valid safetensors file"),
        ({"a": entry("F33", [4], 0, 16)}, "not a valid safetensors file"),
        ({"a": entry("F32", [-4], 0, 16)}, "not a valid safetensors file"),
        ({"a": {"dtype": "F32", "shape": [4]}}, "does not describe tensors"),
        ({"a": 3}, "does not describe tensors"),
        ({"a": entry("F32", [4], 0, 16), "__metadata__": {"x": 1}}, "not a valid safetensors file"),
    ],
)
def test_a_header_that_lies_is_refused(header: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = raw_file(tmp_path / "m.safetensors", json.dumps(header).encode(), bytes(16))
    with pytest.raises(ModelFileError, match=message):
        open_checkpoint(path)


def test_a_tensor_named_twice_is_refused(tmp_path: Path) -> None:
    header = f'{{"a": {json.dumps(entry("F32", [4], 0, 16))}, "a": {json.dumps(entry("I32", [4], 0, 16))}}}'
    path = raw_file(tmp_path / "m.safetensors", header.encode(), bytes(16))
    with pytest.raises(ModelFileError, match="a key is given twice"):
        open_checkpoint(path)


def test_a_header_length_is_checked_against_the_file_and_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for length, message in (
        (100, "but the file has 2 left"),
        (17 << 20, "above 16 MiB"),
        (2**64 - 1, "above 16 MiB"),
    ):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(ModelFileError, match=message):
            open_checkpoint(path)


def test_a_tensor_that_torch_cannot_hold_is_an_error_only_when_loaded(tmp_path: Path) -> None:
    header = {
        "wide": entry("F32", [0, 2**64 - 1], 0, 0),
        "odd": entry("F6_E2M3", [16], 0, 12),
        "a": entry("U8", [4], 12, 16),
    }
    path = raw_file(tmp_path / "m.safetensors", json.dumps(header).encode(), bytes(range(16)))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.load("a").tolist() == [12, 13, 14, 15]
        for name in ("wide", "odd"):
            with pytest.raises(ModelFileError, match=f"tensor '{name}'.*cannot be held in torch"):
                checkpoint.load(name)


def test_control_characters_of_a_file_do_not_reach_a_message(tmp_path: Path) -> None:
    header = {"a": entry("\x1b[31m" + "y" * 10_000, [4], 0, 16)}
    path = raw_file(tmp_path / "m.safetensors", json.dumps(header).encode(), bytes(16))
    with pytest.raises(ModelFileError) as caught:
        open_checkpoint(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400
