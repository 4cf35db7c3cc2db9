"""Weight formats of one model side by side: what each costs in bytes, and what it does to the model's laws."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from plait.engine.language_model import LanguageModel
from plait.engine.loading import load
from plait.engine.quantizing import quantize
from plait.engine.weight_quality import Quality, WeightJudge
from plait.errors import ConfigError
from plait.nn import Transformer
from plait.nn.checkpoints.packed import PACKED_NAME
from plait.weights import FORMATS, Elastic, Packed

__all__ = ["WeightRow", "compare_weights", "held_bytes", "pareto"]

_PROMPT = "The history of computing"


class WeightRow(NamedTuple):
    """One form of the model.

    Attributes:
        name: the format, the file, or the format and the size that was read of its stack.
        quality: on the text, against the model's own weights in fp32.
        file_bytes: of the weights' file, as far as it was read.
        held_bytes: of the weights in memory.
        bits_per_weight: of the matrices of the blocks, everything counted.
        tokens_per_second: of one sequence, decoding; None where it was not asked for.
    """

    name: str
    quality: Quality
    file_bytes: int
    held_bytes: int
    bits_per_weight: float
    tokens_per_second: float | None = None


def compare_weights(
    name: str | Path,
    formats: Sequence[str],
    *,
    folder: Path,
    text: str,
    calibration: str = "",
    windows: int = 5,
    window_tokens: int = 512,
    samples: int = 16,
    sizes: int = 8,
    speed_tokens: int = 0,
    offline: bool | None = None,
) -> Iterator[WeightRow]:
    """Measure forms of a model one after the other.

    Args:
        name: the model: an alias, a folder, a `.gguf` file or a hub id. Compared with its own weights in fp32.
        formats: weight formats to pack it in, `file` for what it is stored in, or paths of other files of the model,
            such as a peer's `.gguf`.
        folder: where packed models are written; those that are there are used.
        text: what is read, another than `calibration`; its first `windows` pieces of `window_tokens`.
        calibration: text for formats that look at inputs.
        samples: pieces of 512 tokens of it.
        sizes: of a stack of blocks, how many sizes from the smallest to the whole.
        speed_tokens: how many tokens are decoded to tell the speed; 0 to leave it out.
        offline: never touch the network.

    Raises:
        ConfigError: too little text, or a format without the calibration text that it needs.
        IncompatibleError: another vocabulary.
    """
    reference = load(name, weights="fp32", offline=offline)
    ids = reference.tokenizer.encode(text)
    starts = range(0, min(len(ids), windows * window_tokens), window_tokens)
    judge = WeightJudge(
        reference.model, [piece for at in starts if len(piece := ids[at : at + window_tokens]) > 1]
    )
    for format in formats:
        path = _made(name, format, folder, calibration, samples, offline)
        lm = load(path, weights="file", offline=offline)
        file_bytes = _file_bytes(path)
        if lm.model.elastic is None:
            yield _row(format, lm, judge, file_bytes, speed_tokens)
            continue
        all_sizes = lm.weights.sizes()
        steps = max(1, min(sizes, len(all_sizes)) - 1)
        for step in range(steps + 1):
            lm.weights.resize(all_sizes[(len(all_sizes) - 1) * step // steps])
            missing = all_sizes[-1] - lm.weights.nbytes()
            row = _row(format, lm, judge, file_bytes - missing, speed_tokens)
            yield row._replace(name=f"{format} at {lm.weights.nbytes() / 1e6:.1f} MB")


def pareto(rows: Sequence[WeightRow]) -> list[WeightRow]:
    """Those that no other row beats: in bytes held, and in divergence from the model's own weights."""
    best: list[WeightRow] = []
    for row in sorted(rows, key=lambda row: (row.held_bytes, row.quality.divergence)):
        if not best or row.quality.divergence < best[-1].quality.divergence:
            best.append(row)
    return best


def held_bytes(model: Transformer) -> int:
    """Bytes of a model's parameters as they are in memory, each counted once."""
    packed = {id(m): m for m in model.modules() if isinstance(m, Packed) and len(m.pieces()) == 1}
    inside = {id(p) for m in packed.values() for p in m.parameters()}
    others = {id(p): p for p in model.parameters() if id(p) not in inside}
    return sum(m.nbytes() for m in packed.values()) + sum(
        p.numel() * p.element_size() for p in others.values()
    )


def _block_bits(model: Transformer) -> float:
    matrices = [m for m in model.blocks.modules() if isinstance(m, Packed) and len(m.pieces()) == 1]
    count = sum(m.shape[0] * m.shape[1] for m in matrices)
    return 8 * sum(m.nbytes() for m in matrices) / max(1, count)


def _made(
    name: str | Path, format: str, folder: Path, calibration: str, samples: int, offline: bool | None
) -> str | Path:
    """What to load for a format: the model itself, another file, or what was packed of it."""
    if format == "file":
        return name
    if Path(format).exists():
        return Path(format)
    chosen = FORMATS.parse(format)
    output = folder / re.sub(r"[^A-Za-z0-9.=]+", "-", str(chosen))
    if not (output / PACKED_NAME).exists():
        if isinstance(chosen, Elastic) and (chosen.budget or chosen.bits is not None):
            raise ConfigError(f"{format} is measured at several sizes. Leave out budget and bits.")
        quantize(name, format, output, calibration=calibration, samples=samples, offline=offline)
    return output


def _file_bytes(path: str | Path) -> int:
    from plait.hub import resolve

    found = resolve(str(path), offline=True)
    if not found.is_dir():
        return found.stat().st_size
    return sum(file.stat().st_size for file in found.glob("*.safetensors"))


def _row(name: str, lm: LanguageModel, judge: WeightJudge, file_bytes: int, speed_tokens: int) -> WeightRow:
    return WeightRow(
        name,
        judge.quality(lm.model),
        file_bytes,
        held_bytes(lm.model),
        _block_bits(lm.model),
        _speed(lm, speed_tokens) if speed_tokens else None,
    )


def _speed(lm: LanguageModel, tokens: int) -> float:
    """Tokens a second of one greedy answer, the prompt left out; the better of two."""
    seconds = []
    for _ in range(2):
        stream = lm.stream(_PROMPT, max_new_tokens=tokens + 1, ignore_end=True)
        next(stream)
        start = time.perf_counter()
        for _ in stream:
            pass
        seconds.append(time.perf_counter() - start)
    return tokens / min(seconds)
