"""The GGUF reader against files written by the gguf package, and against the real model."""

from __future__ import annotations

import gc
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFValueType

from plait.errors import ModelFileError
from plait.nn.checkpoints import GGUFCheckpoint, open_checkpoint
from plait.weights import Blocks, Dense
from plait.weights.ggml import BLOCK_FORMATS

PLAIN = {
    "F32": np.float32,
    "F16": np.float16,
    "F64": np.float64,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
}
Write = Callable[[gguf.GGUFWriter], None]


def write(path: Path, *steps: Write, **options: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama", **options)
    for step in steps:
        step(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensor(name: str, values: np.ndarray[Any, Any], type: str | None = None) -> Write:
    kind = None if type is None else GGMLQuantizationType[type]
    return lambda writer: writer.add_tensor(name, values, raw_dtype=kind)


def blocks(type: str, rows: int, num_blocks: int) -> np.ndarray[Any, Any]:
    nbytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[type]][1]
    # Without the exponents that make a scale NaN or infinite.
    return np.random.default_rng(7).integers(0, 256, (rows, num_blocks * nbytes), dtype=np.uint8) & 0x3B


def assert_equal_to_package(checkpoint: GGUFCheckpoint) -> None:
    """Metadata and every tensor, bit for bit."""
    reader = gguf.GGUFReader(checkpoint.path)
    # The package lists version and counts as the first three fields.
    fields = list(reader.fields.values())[3:]
    assert list(checkpoint.metadata) == [field.name for field in fields]
    for field in fields:
        value = checkpoint.metadata[field.name]
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()
    assert list(checkpoint.tensors()) == [tensor.name for tensor in reader.tensors]
    for expected in reader.tensors:
        info = checkpoint.tensors()[expected.name]
        assert info.format == expected.tensor_type.name.lower()
        assert info.nbytes == expected.n_bytes
        assert info.shape == tuple(reversed(expected.shape.tolist()))
        loaded = checkpoint.load(expected.name)
        plain = PLAIN.get(expected.tensor_type.name)
        if plain is not None:
            values = expected.data.view(plain)
        else:
            values = gguf.quants.dequantize(expected.data, expected.tensor_type)
        assert tuple(loaded.shape) == info.shape == values.shape
        assert loaded.float().numpy().tobytes() == values.astype(np.float32).tobytes()


@pytest.mark.model
def test_every_tensor_of_a_real_model_equals_the_gguf_package_bit_for_bit(smollm2_gguf: Path) -> None:
    with GGUFCheckpoint(smollm2_gguf) as checkpoint:
        assert len(checkpoint.tensors()) == 272
        assert_equal_to_package(checkpoint)


@pytest.mark.model
def test_matrices_of_a_real_model_stay_in_the_file(smollm2_gguf: Path) -> None:
    with GGUFCheckpoint(smollm2_gguf) as checkpoint:
        for name, info in checkpoint.tensors().items():
            if len(info.shape) == 2:
                packed = checkpoint.load_packed(name)
                assert isinstance(packed, Blocks)
                assert (packed.shape, packed.format, packed.nbytes()) == (
                    info.shape,
                    info.format,
                    info.nbytes,
                )
        embedding = checkpoint.load_packed("token_embd.weight")
        ids = torch.tensor([[0, 49151], [17, 17]])
        assert torch.equal(embedding.unpack_rows(ids), checkpoint.load("token_embd.weight")[ids])


@pytest.mark.model
def test_the_header_of_a_real_model_is_read_quickly(smollm2_gguf: Path) -> None:
    # 0.05 s where this was written; the limit is for a slow and busy machine.
    assert fastest(smollm2_gguf) < 0.5


def test_a_vocabulary_of_262144_tokens_is_read_quickly(tmp_path: Path) -> None:
    tokens = [f"token{i}" for i in range(262_144)]
    path = write(tmp_path / "m.gguf", lambda writer: writer.add_token_list(tokens))
    assert GGUFCheckpoint(path).metadata["tokenizer.ggml.tokens"] == tokens
    # 0.13 s where this was written.
    assert fastest(path) < 1.0


def fastest(path: Path) -> float:
    times = []
    for _ in range(3):
        start = time.process_time()
        GGUFCheckpoint(path).close()
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_every_block_format_loads_as_the_gguf_package_reads_it(name: str, tmp_path: Path) -> None:
    type = name.upper()
    first, second = blocks(type, 5, 6), blocks(type, 3, 512)
    dtype = PLAIN.get(type, np.uint8)
    path = write(
        tmp_path / "m.gguf",
        tensor("first.weight", first.view(dtype), type),
        tensor("second.weight", second.view(dtype), type),
    )
    with GGUFCheckpoint(path) as checkpoint:
        assert_equal_to_package(checkpoint)
        packed = checkpoint.load_packed("second.weight")
        assert isinstance(packed, Dense if name in ("f32", "f16", "bf16") else Blocks)
        assert torch.equal(packed.unpack(), checkpoint.load("second.weight"))
        assert packed.nbytes() == second.nbytes


@pytest.mark.parametrize("type", PLAIN)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4), (2, 3, 4, 5)])
def test_plain_tensors_load_as_stored_in_row_major_order(
    type: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    values = np.arange(np.prod(shape)).reshape(shape).astype(PLAIN[type])
    path = write(tmp_path / "m.gguf", tensor("t", values))
    with GGUFCheckpoint(path) as checkpoint:
        assert checkpoint.tensors()["t"] == ("t", shape, type.lower(), values.nbytes)
        np.testing.assert_array_equal(checkpoint.load("t").numpy(), values, strict=True)


def test_quantised_tensors_of_three_dimensions_load(tmp_path: Path) -> None:
    values = blocks("Q8_0", 6, 2).reshape(2, 3, -1)
    path = write(tmp_path / "m.gguf", tensor("experts", values, "Q8_0"))
    with GGUFCheckpoint(path) as checkpoint:
        assert checkpoint.tensors()["experts"].shape == (2, 3, 64)
        assert_equal_to_package(checkpoint)
        with pytest.raises(ModelFileError, match="only a matrix can be loaded packed"):
            checkpoint.load_packed("experts")


SCALARS = [
    (GGUFValueType.UINT8, 255),
    (GGUFValueType.INT8, -128),
    (GGUFValueType.UINT16, 65535),
    (GGUFValueType.INT16, -32768),
    (GGUFValueType.UINT32, 2**32 - 1),
    (GGUFValueType.INT32, -(2**31)),
    (GGUFValueType.UINT64, 2**64 - 1),
    (GGUFValueType.INT64, -(2**63)),
    (GGUFValueType.FLOAT32, 0.1),
    (GGUFValueType.FLOAT64, 0.1),
    (GGUFValueType.BOOL, True),
    (GGUFValueType.STRING, "naïve \N{SNOWMAN} \N{GRINNING FACE}"),
    (GGUFValueType.STRING, ""),
]


@pytest.mark.parametrize(("type", "value"), SCALARS)
def test_metadata_of_every_type_is_read(type: GGUFValueType, value: Any, tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.gguf",
        lambda writer: writer.add_key_value("one", value, type),
        lambda writer: writer.add_key_value("many", [value, value], GGUFValueType.ARRAY, sub_type=type),
        lambda writer: writer.add_key_value("last", "end", GGUFValueType.STRING),
    )
    metadata = GGUFCheckpoint(path).metadata
    expected = float(np.float32(value)) if type == GGUFValueType.FLOAT32 else value
    assert metadata["one"] == expected
    assert metadata["one"].__class__ is value.__class__
    assert list(metadata["many"]) == [expected, expected]
    assert metadata["last"] == "end"
    if type != GGUFValueType.STRING:
        assert isinstance(metadata["many"], np.ndarray)
        with pytest.raises(ValueError, match="read-only"):
            metadata["many"][0] = value


def test_arrays_of_arrays_are_lists(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", lambda writer: writer.add_array("nested", [[1, 2], [3]]))
    nested = GGUFCheckpoint(path).metadata["nested"]
    assert [part.tolist() for part in nested] == [[1, 2], [3]]


def test_text_that_is_not_utf8_keeps_its_bytes(tmp_path: Path) -> None:
    raw = b"ok \xff\xfe\x80 \xe2\x98"
    path = write(
        tmp_path / "m.gguf",
        lambda writer: writer.add_key_value("one", raw, GGUFValueType.STRING),
        lambda writer: writer.add_array("many", [raw, b"plain"]),
    )
    metadata = GGUFCheckpoint(path).metadata
    assert metadata["one"].encode("utf-8", "surrogateescape") == raw
    assert [text.encode("utf-8", "surrogateescape") for text in metadata["many"]] == [raw, b"plain"]


def test_a_custom_alignment_is_followed(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.gguf",
        lambda writer: writer.add_custom_alignment(4096),
        tensor("a", np.ones(3, np.float32)),
        tensor("b", np.arange(5, dtype=np.float32)),
    )
    with GGUFCheckpoint(path) as checkpoint:
        assert checkpoint.load("b").tolist() == [0, 1, 2, 3, 4]
        assert_equal_to_package(checkpoint)


def test_version_two_is_read_like_version_three(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", tensor("t", np.ones((2, 2), np.float32)))
    raw = bytearray(path.read_bytes())
    raw[4:8] = struct.pack("<I", 2)
    path.write_bytes(raw)
    assert GGUFCheckpoint(path).load("t").tolist() == [[1, 1], [1, 1]]


def test_tensors_outlive_the_checkpoint_and_never_change_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", tensor("t", np.ones((64, 64), np.float32)))
    before = path.read_bytes()
    with GGUFCheckpoint(path) as checkpoint:
        loaded, again = checkpoint.load("t"), checkpoint.load("t")
        assert loaded.data_ptr() == again.data_ptr()
    with pytest.raises(ModelFileError, match="closed"):
        checkpoint.load("t")
    del checkpoint, again
    gc.collect()
    loaded.mul_(2)
    assert loaded.sum() == 2 * 64 * 64
    del loaded
    gc.collect()
    assert path.read_bytes() == before


def test_a_format_that_is_not_read_is_an_error_only_for_its_tensors(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.gguf",
        tensor("known", np.ones(8, np.float32)),
        tensor("exotic", blocks("IQ4_XS", 2, 1), "IQ4_XS"),
        tensor("also_known", np.ones(8, np.float32)),
    )
    with GGUFCheckpoint(path) as checkpoint:
        info = checkpoint.tensors()["exotic"]
        assert (info.shape, info.format) == ((2, 256), "iq4_xs")
        # Its own size is not known, only the room up to the next tensor.
        assert 2 * 136 <= info.nbytes < 2 * 136 + 32
        assert checkpoint.load("also_known").tolist() == [1] * 8
        for load in (checkpoint.load, checkpoint.load_packed):
            with pytest.raises(ModelFileError, match="'exotic' is stored as iq4_xs, which is not read"):
                load("exotic")


def test_names_of_formats_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    # As many bytes as any format needs for 512 values.
    path = write(tmp_path / "m.gguf", tensor("t", np.zeros(512)))
    raw = path.read_bytes()
    # The type follows the name, the number of dimensions and the one dimension.
    at = raw.index(b"t" + struct.pack("<IQ", 1, 512)) + 1 + 4 + 8
    expected = {type.value: type.name.lower() for type in GGMLQuantizationType}
    for type in [*expected, 1000, 2**32 - 1]:
        path.write_bytes(raw[:at] + struct.pack("<I", type) + raw[at + 4 :])
        assert GGUFCheckpoint(path).tensors()["t"].format == expected.get(type, f"type-{type}")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", tensor("t", np.ones(2, np.float32)))
    with GGUFCheckpoint(path) as checkpoint:
        for load in (checkpoint.load, checkpoint.load_packed):
            with pytest.raises(ModelFileError, match=r"m\.gguf has no tensor 'u' among its 1\."):
                load("u")


def test_a_big_endian_file_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", tensor("t", np.ones(2, np.float32)), endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(ModelFileError, match="big-endian"):
        GGUFCheckpoint(path)


def test_one_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", lambda writer: writer.add_uint16("split.count", 3))
    with pytest.raises(ModelFileError, match="one of 3 parts"):
        GGUFCheckpoint(path)


def test_a_gguf_file_is_opened_by_its_content_or_by_its_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "weights.bin", tensor("t", np.ones(2, np.float32)))
    assert isinstance(open_checkpoint(str(path)), GGUFCheckpoint)
    path.rename(tmp_path / "a.gguf")
    assert open_checkpoint(tmp_path).path == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes((tmp_path / "a.gguf").read_bytes())
    with pytest.raises(ModelFileError, match=r"2 GGUF files \(a\.gguf, b\.gguf\)"):
        open_checkpoint(tmp_path)
