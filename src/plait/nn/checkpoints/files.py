"""The first look at a model file: what it is, and the files that can never be one."""

from __future__ import annotations

import stat
from pathlib import Path

from plait.errors import ModelFileError

__all__ = [
    "GGUF_MAGIC",
    "PICKLE_SUFFIXES",
    "counted",
    "damaged",
    "file_start",
    "folder_files",
    "pickle_error",
    "shown",
]

GGUF_MAGIC = b"GGUF"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})

_LFS_POINTER = b"version https://git-lfs"
_ZIP = b"PK\x03\x04"
# Opcode and version that start a pickle of protocol 2 to 5.
_PICKLES = tuple(b"\x80" + bytes([protocol]) for protocol in (2, 3, 4, 5))


def file_start(path: Path, length: int = 64) -> bytes:
    """The first `length` bytes of a model file, or fewer if it is shorter; never none.

    Raises:
        ModelFileError: it is missing, unreadable, not a regular file, empty, a Git LFS pointer, or
            holds pickled Python objects.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(f"{path} is not a regular file. Give the path of a model file.")
        if status.st_size == 0:
            raise ModelFileError(f"{path} is empty. Download it again.")
        with path.open("rb") as file:
            start = file.read(min(max(length, 64), status.st_size))
    except FileNotFoundError as error:
        raise ModelFileError(f"{path} does not exist. Check the path, or download the model.") from error
    # A name with a null byte is a ValueError.
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read: {error}.") from error
    if start.startswith(_LFS_POINTER):
        raise ModelFileError(
            f"{path} is a Git LFS pointer, not the file it points to."
            " Run git lfs pull in its folder, or download it again."
        )
    is_pickle = start.startswith((_ZIP, *_PICKLES)) or path.suffix.lower() in PICKLE_SUFFIXES
    if is_pickle and not start.startswith(GGUF_MAGIC):
        raise pickle_error(path)
    return start[:length]


def folder_files(folder: Path) -> dict[str, Path]:
    """What is in a folder, by name, sorted.

    Raises:
        ModelFileError: the folder is missing or unreadable.
    """
    try:
        return {path.name: path for path in sorted(folder.iterdir())}
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{folder} cannot be read: {error}.") from error


def pickle_error(path: Path) -> ModelFileError:
    """Why a file of pickled Python objects is refused."""
    return ModelFileError(
        f"{path} is a pickle, and reading one can run any code inside it, so it is not loaded."
        " Use the model's safetensors files, or convert it to safetensors where you trust it."
    )


def damaged(path: Path, what: str) -> ModelFileError:
    """An error about the contents of a file; `what` is a clause such as `"the header ends early"`."""
    return ModelFileError(f"{path.name}: {what}. The file is damaged or hostile; download it again.")


def counted(number: int) -> str:
    """A count from a file; hostile ones are cut to three digits."""
    return str(number) if number < 10**9 else f"{number:.3g}"


def shown(name: str) -> str:
    """A name from a file, quoted, made printable and cut to a length that fits in a message."""
    return repr(name if len(name) <= 80 else name[:77] + "...")
