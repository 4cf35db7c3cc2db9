"""WordNet's own files: the senses of a word, and the words that share a sense.

Format: the manual pages wndb(5) and senseidx(5) of WordNet 3.1. The index files are sorted, so a word is found
by bisection in the mapped file and nothing is read before it is asked for.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from plait.errors import ModelFileError

__all__ = ["PARTS", "Synset", "WordNet"]

PARTS: Mapping[str, str] = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
"""Parts of speech and the ends of the names of their files."""

# The longest line of WordNet 3.1 has 15 KB; a longer one is another kind of file.
_MAX_LINE = 1 << 17
_MAX_FILE = 1 << 28
# In the index of senses, the part of speech that follows the `%`; 5 is an adjective that belongs to a head.
_SENSE_PARTS = {b"1": "n", b"2": "v", b"3": "a", b"5": "a", b"4": "r"}


class Synset(NamedTuple):
    """One sense.

    Attributes:
        words: lemmas that have this sense, single words only, as WordNet spells them.
        similar: for adjectives, where in the same file the senses that are similar to this one are.
    """

    words: tuple[str, ...]
    similar: tuple[int, ...]


class WordNet:
    """A folder with `index.noun`, `data.noun` and so on, and `index.sense`.

    Args:
        folder: where the nine files are.

    Raises:
        ModelFileError: a file is missing, empty or too large; later, a line that is not what the format says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        names = [f"{kind}.{part}" for kind in ("index", "data") for part in PARTS.values()]
        self._files = {name: self._mapped(name) for name in [*names, "index.sense"]}

    def _mapped(self, name: str) -> mmap.mmap:
        path = self.folder / name
        try:
            with path.open("rb") as stream:
                size = path.stat().st_size
                if not 0 < size <= _MAX_FILE:
                    raise ModelFileError(
                        f"{path} has {size} bytes; a file of WordNet has from 1 to {_MAX_FILE}."
                    )
                return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelFileError(
                f"{path} cannot be read: {error.strerror or error}. Give the folder of WordNet's dict files."
            ) from error

    def senses(self, lemma: str, part: str) -> tuple[int, ...]:
        """Places of a lemma's senses in its data file, the most frequent first; none if it is not listed.

        Args:
            lemma: lower-case, with `_` between words.
            part: a key of `PARTS`.
        """
        if not lemma or " " in lemma:
            return ()
        line = self._find(f"index.{PARTS[part]}", lemma.encode() + b" ")
        if line is None:
            return ()
        name = f"index.{PARTS[part]}"
        fields = line.split()
        try:
            count, pointers = int(fields[2]), int(fields[3])
            places = tuple(int(field) for field in fields[6 + pointers :])
        except (ValueError, IndexError):
            raise self._damaged(name, line) from None
        if len(places) != count:
            raise self._damaged(name, line)
        return places

    def synset(self, part: str, place: int) -> Synset:
        """The sense at a place of a data file.

        Raises:
            ModelFileError: no sense is there.
        """
        name = f"data.{PARTS[part]}"
        data = self._files[name]
        if not 0 <= place < len(data):
            raise ModelFileError(
                f"{self.folder / name} has no byte {place}. The files are of different versions."
            )
        end = data.find(b"\n", place, place + _MAX_LINE)
        line = data[place : end if end >= 0 else len(data)][:_MAX_LINE]
        fields = line.partition(b" | ")[0].split()
        try:
            if int(fields[0]) != place:
                raise self._damaged(name, line)
            count = int(fields[3], 16)
            words = [fields[4 + 2 * index].decode("ascii") for index in range(count)]
            pointers = int(fields[4 + 2 * count])
            first = 5 + 2 * count
            similar = tuple(
                int(fields[first + 4 * index + 1])
                for index in range(pointers)
                if fields[first + 4 * index] == b"&"
            )
        except (ValueError, IndexError):
            raise self._damaged(name, line) from None
        # An adjective may carry a mark of where it stands, such as `afraid(p)`.
        bare = [word.partition("(")[0] for word in words]
        return Synset(tuple(word for word in bare if word.isalpha()), similar)

    def uses(self, lemma: str) -> dict[str, int]:
        """How often a lemma was met as each part of speech in the texts that WordNet's makers tagged."""
        found: dict[str, int] = {}
        if not lemma:
            return found
        name, prefix = "index.sense", lemma.encode() + b"%"
        data, place = self._files[name], self._place(name, prefix)
        while data[place : place + len(prefix)] == prefix:
            end = data.find(b"\n", place, place + _MAX_LINE)
            line = data[place : end if end >= 0 else len(data)]
            fields = line.split()
            part = _SENSE_PARTS.get(line[len(prefix) : len(prefix) + 1])
            if len(fields) != 4 or part is None or not fields[3].isdigit():
                raise self._damaged(name, line)
            found[part] = found.get(part, 0) + int(fields[3])
            place += len(line) + 1
        return found

    def _find(self, name: str, prefix: bytes) -> bytes | None:
        data, place = self._files[name], self._place(name, prefix)
        if data[place : place + len(prefix)] != prefix:
            return None
        end = data.find(b"\n", place, place + _MAX_LINE)
        return data[place : end if end >= 0 else len(data)]

    def _place(self, name: str, prefix: bytes) -> int:
        """Where the first line begins that is not below `prefix`, by bisection over bytes."""
        data = self._files[name]
        low, high = 0, len(data)
        while low < high:
            middle = (low + high) // 2
            start = data.rfind(b"\n", max(0, middle - _MAX_LINE), middle) + 1
            end = data.find(b"\n", middle, middle + _MAX_LINE)
            if start == 0 and middle >= _MAX_LINE:
                raise self._damaged(name, data[middle : middle + 40])
            end = len(data) if end < 0 else end
            if data[start : start + len(prefix)] < prefix:
                low = end + 1
            else:
                high = start
        return min(low, len(data))

    def _damaged(self, name: str, line: bytes) -> ModelFileError:
        shown = line[:60].decode("ascii", "replace")
        return ModelFileError(
            f"{self.folder / name} has a line that is not WordNet's: {shown!r}. Fetch it again."
        )
