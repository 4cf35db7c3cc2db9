"""`plait.quantize`: from a model to a folder that holds it in fewer bits."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from plait.engine.loading import read_text_side
from plait.errors import CapacityError, ConfigError
from plait.files import write_bytes
from plait.hub import Progress, resolve
from plait.nn import Quantized, quantize_checkpoint
from plait.nn.checkpoints import Checkpoint, GGUFCheckpoint, open_checkpoint
from plait.nn.checkpoints.packed import TEXT_NAME
from plait.weights import FORMATS, WeightFormat

__all__ = ["copy_text_side", "quantize"]

# Files of a Hugging Face folder that turn text to ids and back.
_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    TEXT_NAME,
)


def quantize(
    name: str | Path,
    format: str,
    output: str | Path,
    *,
    head: str | None = None,
    calibration: str = "",
    samples: int = 16,
    sample_tokens: int = 512,
    offline: bool | None = None,
    download: Progress | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Quantized:
    """Pack the matrices of a model's blocks and write a folder that `plait.load` opens.

    Running it again after it was stopped goes on with the next block, and makes the same bytes.

    Args:
        name: an alias, a folder, a `.gguf` file or a hub id.
        format: a weight format such as `bitmod:bits=3`, `gptq:bits=4,group=192` or `decoupleq`.
        output: the folder to make.
        head: the format of embedding and head; left out, they stay in the codes that they have, or in q8_0.
        calibration: text like that which the model will read; formats that look at inputs need it.
        samples, sample_tokens: how many pieces of it are read, from its beginning, and tokens of each.
        download: told how a download goes.
        progress: told a line for each block.

    Returns:
        Where the file is, its bytes, and the bits of each weight.

    Raises:
        UnknownNameError: no model or format has that name.
        ConfigError: the format needs calibration text, or does not fit a matrix.
        ModelFileError: the model is damaged, or `output` holds another one.
        CapacityError: the disk is full.
    """
    chosen: WeightFormat = FORMATS.parse(format)
    head_format = None if head is None else FORMATS.parse(head)
    if samples < 1 or sample_tokens < 1:
        raise ConfigError(f"samples and sample_tokens must be at least 1. Got {samples} and {sample_tokens}.")
    if chosen.needs and not calibration:
        raise ConfigError(f"{chosen} needs calibration text. Give some with --calibration FILE.")
    path = resolve(str(name), progress=download, offline=offline)
    output = Path(output)
    with open_checkpoint(path) as checkpoint:
        texts: list[list[int]] = []
        if chosen.needs:
            ids = read_text_side(checkpoint)[0].encode(calibration)
            texts = [ids[at : at + sample_tokens] for at in range(0, len(ids), sample_tokens)][:samples]
        try:
            output.mkdir(parents=True, exist_ok=True)
            return quantize_checkpoint(
                checkpoint,
                output,
                chosen,
                head=head_format,
                calibration=texts,
                made={"source": Path(path).name, "sha256": _fingerprint(Path(path))},
                prepare=lambda: copy_text_side(checkpoint, output),
                progress=progress,
            )
        except OSError as error:
            raise CapacityError(
                f"{output} cannot be written: {error}. Make room, and run the same command again to go on."
            ) from error


def copy_text_side(checkpoint: Checkpoint, output: Path) -> None:
    """Put what turns text to ids beside the weights."""
    if isinstance(checkpoint, GGUFCheckpoint):
        write_bytes(output / TEXT_NAME, checkpoint.metadata_file())
        return
    folder = checkpoint.path if os.path.isdir(checkpoint.path) else checkpoint.path.parent
    for name in _TEXT_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, output / name)


def _fingerprint(path: Path) -> str:
    """SHA-256 of a model's file, or of its weight files in order."""
    files = sorted(path.glob("*.safetensors")) + sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while piece := opened.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
