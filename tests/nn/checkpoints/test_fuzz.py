"""Any file, however malformed, ends in a checkpoint or in one ModelFileError, within bounded time and memory."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from plait.errors import ModelFileError
from plait.nn.checkpoints import Checkpoint, open_checkpoint

CORPUS = Path(__file__).parents[2] / "corpus"
MESSAGES: dict[str, str] = json.loads((CORPUS / "messages.json").read_text())
HOSTILE = [path for path in sorted(CORPUS.iterdir()) if path.name not in ("README.md", "messages.json")]

NUM_MUTATIONS = 500
SECONDS = 1.0
# What a reader may hold for any file, beside twice its size.
MEMORY_FLOOR = 64 << 20
# A file of a few kilobytes has no reason to take a megabyte.
SMALL_FILE_MEMORY = 1 << 20


def visit(path: Path) -> bool:
    """Open a file and load all of it in both forms; whether it opened."""
    try:
        checkpoint = open_checkpoint(path)
    except ModelFileError as error:
        message = str(error)
    else:
        load_all(checkpoint)
        return True
    assert message.isprintable()
    assert len(message) < 1000
    return False


def load_all(checkpoint: Checkpoint) -> None:
    with checkpoint:
        for name, info in checkpoint.tensors().items():
            for load in (checkpoint.load, checkpoint.load_packed):
                try:
                    loaded = load(name)
                except ModelFileError:
                    continue
                # A packed f4 tensor of torch holds two values in each element.
                assert tuple(loaded.shape) == info.shape or info.format == "f4"


def visit_within_limits(path: Path) -> bool:
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    start = time.process_time()
    opened = visit(path)
    assert time.process_time() - start < SECONDS
    assert tracemalloc.get_traced_memory()[1] - before < SMALL_FILE_MEMORY
    return opened


@pytest.fixture
def _traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def test_the_corpus_and_its_messages_name_the_same_files() -> None:
    assert [path.name for path in HOSTILE] == sorted(MESSAGES)
    assert (CORPUS / "array_of_2_63_strings.gguf").stat().st_size == 53


@pytest.mark.usefixtures("_traced")
@pytest.mark.parametrize("path", HOSTILE, ids=lambda path: path.name)
def test_a_hostile_file_is_refused_in_words(path: Path) -> None:
    assert not visit_within_limits(path)
    with pytest.raises(ModelFileError) as caught:
        open_checkpoint(path)
    assert path.name in str(caught.value)
    assert MESSAGES[path.name] in str(caught.value)


def gguf_seed(path: Path) -> None:
    """A small file with every kind of metadata and several formats."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_token_list(["<s>", "hello", "naïve", "\N{SNOWMAN}"])
    writer.add_token_types([3, 1, 1, 1])
    writer.add_array("flags", [True, False])
    writer.add_array("nested", [[1, 2], [3]])
    writer.add_custom_alignment(32)
    generator = np.random.default_rng(0)
    writer.add_tensor("token_embd.weight", generator.standard_normal((4, 8), np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", generator.standard_normal(8, np.float32).astype(np.float16))
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1):
        weight = generator.standard_normal((2, 32), np.float32)
        writer.add_tensor(f"blk.0.{kind.name}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def safetensors_seed(path: Path) -> None:
    tensors = {
        "embed.weight": torch.arange(32.0).view(4, 8),
        "norm.weight": torch.ones(8, dtype=torch.bfloat16),
        "ids": torch.arange(3),
    }
    save_file(tensors, path, metadata={"format": "pt"})


SEEDS = {"gguf": gguf_seed, "safetensors": safetensors_seed}
NASTY = [
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    255,
    2**16,
    2**31,
    2**32 - 1,
    2**32,
    2**61,
    2**62 + 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
MORE_NUMBERS = [b"9" * 20, b"-1", b"1e999", b"[[[[", b"}", b'"F64"', b'"BOOL"', b"null"]


def flip_bits(raw: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 8)):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)


def truncate(raw: bytearray, rng: random.Random) -> None:
    del raw[rng.randrange(len(raw)) :]


def splice(raw: bytearray, rng: random.Random) -> None:
    """Copy one stretch over another, so that whole fields land in the wrong place."""
    length = rng.randint(1, 40)
    source, target = rng.randrange(len(raw)), rng.randrange(len(raw))
    raw[target : target + length] = raw[source : source + length]


def set_integer(raw: bytearray, rng: random.Random) -> None:
    """A count, length, type or offset becomes an extreme one."""
    at, width = rng.randrange(len(raw)), rng.choice([4, 8])
    raw[at : at + width] = (rng.choice(NASTY) % 256**width).to_bytes(width, "little")


def insert(raw: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(raw))
    raw[at:at] = rng.choice([rng.randbytes(rng.randint(1, 16)), rng.choice(MORE_NUMBERS)])


def erase(raw: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(raw))
    del raw[at : at + rng.randint(1, 32)]


MUTATIONS: list[Callable[[bytearray, random.Random], None]] = [
    flip_bits,
    truncate,
    splice,
    set_integer,
    insert,
    erase,
]


def mutated(seed: bytes, header_size: int, rng: random.Random) -> bytes:
    """One to three mutations, most of them inside the header."""
    raw = bytearray(seed)
    for _ in range(rng.choice([1, 1, 2, 3])):
        if not raw:
            break
        mutation = rng.choice(MUTATIONS)
        if rng.random() < 0.6:
            head = raw[:header_size]
            mutation(head, rng)
            raw[:header_size] = head
        else:
            mutation(raw, rng)
    return bytes(raw)


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("_traced")
@pytest.mark.parametrize("kind", SEEDS)
def test_every_mutated_file_is_read_or_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"seed.{kind}"
    SEEDS[kind](path)
    seed = path.read_bytes()
    assert visit(path)
    with open_checkpoint(path) as checkpoint:
        header_size = len(seed) - sum(info.nbytes for info in checkpoint.tensors().values())
    rng = random.Random(20)
    outcomes = []
    for number in range(NUM_MUTATIONS):
        # A new file each time: earlier ones may still be mapped.
        victim = tmp_path / f"{number}.{kind}"
        victim.write_bytes(mutated(seed, header_size, rng))
        outcomes.append(visit_within_limits(victim))
    # Both ends are reached, or nothing was tested.
    assert 5 < sum(outcomes) < NUM_MUTATIONS - 5


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", SEEDS)
def test_every_truncated_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"seed.{kind}"
    SEEDS[kind](path)
    seed = path.read_bytes()
    # The last tensor of the GGUF seed is followed by padding.
    end = seed.rstrip(b"\0") if kind == "gguf" else seed
    for length in range(len(end)):
        victim = tmp_path / f"{length}.{kind}"
        victim.write_bytes(seed[:length])
        assert not visit(victim), length


def string(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def gguf_header(num_tensors: int, num_entries: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_entries)


def array(kind: int, count: int) -> bytes:
    """The only metadata entry, up to its elements."""
    return gguf_header(0, 1) + string(b"key") + struct.pack("<IIQ", 9, kind, count)


def numbered(count: int, tail: bytes) -> bytes:
    return b"".join(string(b"%07d" % i) + tail for i in range(count))


# Valid headers in which a few bytes of the file become many bytes of memory, or much work.
AMPLIFIERS: dict[str, Callable[[], bytes]] = {
    "short_strings": lambda: array(8, 1_500_000) + string(b"ab") * 1_500_000,
    "empty_strings": lambda: array(8, 4_000_000) + string(b"") * 4_000_000,
    "wide_string": lambda: array(8, 1) + string("\N{GRINNING FACE}".encode() + b"a" * 9_000_000),
    "wider_string": lambda: array(8, 1) + string("\N{GRINNING FACE}".encode() + b"a" * 40_000_000),
    "broken_string": lambda: array(8, 1) + string(b"\xff" * 9_000_000),
    "empty_arrays": lambda: array(9, 2_000_000) + struct.pack("<IQ", 4, 0) * 2_000_000,
    "many_entries": lambda: gguf_header(0, 700_000) + numbered(700_000, struct.pack("<IB", 7, 1)),
    "many_tensors": lambda: gguf_header(700_000, 0) + numbered(700_000, struct.pack("<IIQ", 0, 0, 0)),
    "many_numbers": lambda: array(12, 5_000_000) + bytes(40_000_000),
    "many_booleans": lambda: array(7, 40_000_000) + bytes(40_000_000),
}

GUARDED_READER = """
import resource, sys, time
from pathlib import Path
from plait.errors import ModelFileError
from plait.nn.checkpoints import Checkpoint, open_checkpoint

# Everything that is loaded once is loaded before the limit is set.
try:
    open_checkpoint(Path(sys.argv[1]))
except ModelFileError:
    pass
path, allowance, seconds = Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + allowance
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
start = time.process_time()
try:
    open_checkpoint(path)
    print("opened")
except ModelFileError:
    print("refused")
assert time.process_time() - start < seconds
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS is kept only by Linux")
@pytest.mark.parametrize("name", AMPLIFIERS)
def test_a_header_cannot_take_more_than_its_share_of_memory_and_time(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.gguf"
    path.write_bytes(AMPLIFIERS[name]())
    # The mapping itself counts as one size of the file.
    allowance = 3 * path.stat().st_size + MEMORY_FLOOR
    done = subprocess.run(
        [sys.executable, "-c", GUARDED_READER, HOSTILE[0], path, str(allowance), str(2 * SECONDS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    readable = {"wide_string", "broken_string", "many_numbers", "many_booleans"}
    assert done.stdout.strip() == ("opened" if name in readable else "refused")
