"""Tasks that need what was read long ago, made of Python's own manual and library, or of a user's text.

A task makes cases: tokens to read, tokens to read behind them, apart, as the question of a conversation would be, and
texts that may come next, of which the first is right. Everything is drawn from a seed.
"""

from __future__ import annotations

import io
import random
import re
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from plait.claims.reading import FILLER, PASS_KEY_BEGIN, PASS_KEY_QUESTION, pass_key_said
from plait.claims.texts import chapters
from plait.errors import ConfigError, UnknownNameError, suggestion
from plait.text import Tokenizer

__all__ = ["TASKS", "Case", "Material", "Task", "find_tasks"]

_PEOPLE = (
    "Alice",
    "Boris",
    "Chiara",
    "Dmitri",
    "Elena",
    "Farid",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Kenji",
    "Lucia",
)
_SURNAMES = (
    "Abbott",
    "Brandt",
    "Castell",
    "Duval",
    "Eriksen",
    "Fischer",
    "Grant",
    "Hollis",
    "Ibsen",
    "Jordan",
)
_THINGS = (
    "violin",
    "telescope",
    "passport",
    "typewriter",
    "compass",
    "necklace",
    "map",
    "lantern",
    "diary",
    "globe",
)
_PLACES = (
    "attic",
    "garage",
    "library",
    "kitchen",
    "greenhouse",
    "cellar",
    "lighthouse",
    "bakery",
    "museum",
    "harbour",
)

_DEFINITION = re.compile(r"^(?:def|class) ([A-Za-z]\w{5,})", re.MULTILINE)

_BINDS = re.compile(r" *(?:class|def|from|import|@)\b")

# Packages whose modules use each other.
_PACKAGES = (
    "asyncio",
    "concurrent.futures",
    "email",
    "http",
    "importlib",
    "json",
    "logging",
    "unittest",
    "xml.dom",
)


class Case(NamedTuple):
    """Something to read and what may come next.

    Attributes:
        read: ids to read first.
        asked: ids to read behind them, apart.
        answers: texts that may come next; the first is right.
        depth: where in what is read that which is needed stands, from 0 (its beginning) to 1.
    """

    read: list[int]
    asked: list[int]
    answers: tuple[str, ...]
    depth: float


@dataclass(frozen=True)
class Material:
    """What cases are made of.

    Attributes:
        tokenizer: of the model.
        texts: passages of prose with a name each, to hide things in.
        packages: modules of code, by package and file name.
    """

    tokenizer: Tokenizer
    texts: dict[str, str] = field(default_factory=chapters)
    packages: dict[str, dict[str, str]] = field(default_factory=lambda: _library())

    @classmethod
    def of_files(cls, tokenizer: Tokenizer, files: Sequence[Path]) -> Material:
        """A user's own files: Python sources are code, in the package of their folder; all others are prose.

        Raises:
            ConfigError: a file cannot be read as UTF-8 text.
        """
        texts: dict[str, str] = {}
        packages: dict[str, dict[str, str]] = {}
        for file in files:
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{file} could not be read as UTF-8 text: {error}.") from None
            if file.suffix == ".py":
                packages.setdefault(str(file.parent), {})[file.name] = text
            else:
                texts[str(file)] = text
        if texts and not any(text.strip() for text in texts.values()):
            raise ConfigError(
                f"There is no text in {', '.join(texts)}. Give files with text, or none at all."
            )
        return cls(tokenizer, texts or chapters(), packages or _library())

    def prose(self, draw: random.Random, length: int) -> list[int]:
        """At least so many ids of passages in random order, beginning over where there are too few."""
        names = [name for name in self.texts if self.texts[name].strip()]
        draw.shuffle(names)
        ids: list[int] = []
        while len(ids) < length:
            for name in names:
                ids += self.tokenizer.encode(f"{self.texts[name].strip()}\n\n")
                if len(ids) >= length:
                    break
        return ids


@dataclass(frozen=True)
class Task:
    """A way to make cases.

    Attributes:
        name: how it is asked for.
        measures: what is counted beside nats: "found" (the answer generated), "chosen" (the right text is the
            likeliest a token), "completed" (similarity of the generated line), or "" for a text read through.
        title: one line for people.
        cases: (material, random source, length in tokens, count) to cases.
    """

    name: str
    measures: str
    title: str
    cases: Callable[[Material, random.Random, int, int], Iterator[Case]]


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks by name; all of them without names.

    Raises:
        UnknownNameError: a name that is none.
    """
    for name in names:
        if name not in TASKS:
            known = ", ".join(TASKS)
            raise UnknownNameError(f"Unknown task {name!r}.{suggestion(name, TASKS)} Known: {known}.")
    return [TASKS[name] for name in names] if names else list(TASKS.values())


def _depths(draw: random.Random, count: int) -> list[float]:
    """One depth in each of `count` equal parts, so that every region is tried."""
    return [(part + draw.random()) / count for part in range(count)]


def _hidden(
    material: Material, before: str, around: list[int], said: str, question: str, length: int, depth: float
) -> tuple[list[int], list[int], float]:
    """Ids with something said at a depth, the question's ids, and the depth it got."""
    encode = material.tokenizer.encode
    head, middle, asked = encode(before), encode(said), encode(question)
    room = length - len(head) - len(middle) - len(asked)
    if room < 0:
        raise ConfigError(f"A case needs at least {length - room} tokens. Got a length of {length}.")
    first = int(room * depth)
    return [*head, *around[:first], *middle, *around[first:room]], asked, first / max(room, 1)


def _pass_keys(material: Material, draw: random.Random, length: int, count: int) -> Iterator[Case]:
    """A number in repeated sentences (Mohtashami and Jaggi 2023, arXiv:2305.16300)."""
    filler = material.tokenizer.encode(FILLER)
    around = filler * (length // len(filler) + 1)
    for depth in _depths(draw, count):
        key = str(draw.randrange(10_000, 100_000))
        read, asked, at = _hidden(
            material, PASS_KEY_BEGIN, around, pass_key_said(key), PASS_KEY_QUESTION, length, depth
        )
        yield Case(read, asked, (f" {key}",), at)


def _needles(material: Material, draw: random.Random, length: int, count: int) -> Iterator[Case]:
    """A sentence that belongs to nothing around it, in real prose."""
    for depth in _depths(draw, count):
        person, thing = draw.choice(_PEOPLE), draw.choice(_THINGS)
        places = draw.sample(_PLACES, 4)
        said = f"\n\n{person} keeps the old {thing} in the {places[0]}.\n\n"
        question = f"\n\nQuestion: Where does {person} keep the old {thing}?\nAnswer: {person} keeps the old {thing} in the"
        read, asked, at = _hidden(material, "", material.prose(draw, length), said, question, length, depth)
        yield Case(read, asked, tuple(f" {place}" for place in places), at)


def _documents(material: Material, draw: random.Random, length: int, count: int) -> Iterator[Case]:
    """Many documents that each name an editor; the question is for one of them."""
    encode = material.tokenizer.encode
    for depth in _depths(draw, count):
        names = [name for name, text in material.texts.items() if text.strip()]
        editors = [f"{first} {last}" for first in _PEOPLE for last in _SURNAMES]
        draw.shuffle(names)
        draw.shuffle(editors)
        question = "\n\nQuestion: Who is the editor of document {}?\nAnswer: The editor of document {} is"
        room = length - len(encode(question.format(10, 10)))
        read: list[int] = []
        starts: list[int] = []
        while len(starts) < len(editors):
            number = len(starts) + 1
            body = encode(material.texts[names[len(starts) % len(names)]].strip())[: min(300, length // 8)]
            page = [
                *encode(f"Document {number}. Editor: {editors[number - 1]}.\n\n"),
                *body,
                *encode("\n\n"),
            ]
            if starts and len(read) + len(page) > room:
                break
            starts.append(len(read))
            read += page
        if len(starts) < 2:
            raise ConfigError(f"Two documents need more than {length} tokens. Give a larger length.")
        right = min(int(depth * len(starts)), len(starts) - 1)
        others = [editors[i] for i in range(len(starts)) if i != right]
        answers = [editors[right], *draw.sample(others, min(7, len(others)))]
        yield Case(
            read,
            encode(question.format(right + 1, right + 1)),
            tuple(f" {answer}" for answer in answers),
            starts[right] / len(read),
        )


def _completions(material: Material, draw: random.Random, length: int, count: int) -> Iterator[Case]:
    """The rest of a line that uses a name which another file of its package defines.

    The file that defines it stands somewhere among others in front of the file with the line, of which only the
    last lines are read (as in RepoBench, Liu et al. 2023, arXiv:2306.03091).
    """
    encode = material.tokenizer.encode
    uses = list(_uses(material.packages))
    if not uses:
        raise ConfigError(
            "No file uses a name that another file of its package defines. Give more files of code."
        )
    for depth in _depths(draw, count):
        package, user, definer, at, begin, rest = draw.choice(uses)
        files = material.packages[package]
        near = encode(f"# {package}/{user}\n{begin}"[-1200:])
        near = near[-min(len(near), length // 2) :]
        room = length - len(near)
        # Where the whole file is too long, the part of it that holds the definition.
        text = files[definer]
        part = text[text.rfind("\n", 0, max(at - 400, 0)) + 1 :]
        wanted = encode(f"# {package}/{definer}\n{part}\n")[: max(room // 2, 1)]
        others = [name for name in files if name not in (user, definer)]
        draw.shuffle(others)
        around: list[int] = []
        for name in others:
            around += encode(f"# {package}/{name}\n{files[name]}\n")
        while len(around) < room:
            around += material.prose(draw, room)
        first = int((room - len(wanted)) * depth)
        read = [*around[:first], *wanted, *around[first : room - len(wanted)]]
        yield Case(read, near, (rest,), first / max(len(read), 1))


def _uses(packages: dict[str, dict[str, str]]) -> Iterator[tuple[str, str, str, int, str, str]]:
    """Package, using file, defining file, where that defines it, the text up to the use, and the rest of its line."""
    for package, files in sorted(packages.items()):
        defined: dict[str, tuple[str, int]] = {}
        for name, text in sorted(files.items()):
            for found in _DEFINITION.finditer(text):
                defined.setdefault(found[1], (name, found.start()))
        for user, text in sorted(files.items()):
            known = {found[1] for found in _DEFINITION.finditer(text)}
            for start, name in _names(text):
                definer, at = defined.get(name, (user, 0))
                line = text[text.rfind("\n", 0, start) + 1 : start]
                # What stands in front of the name on its line must be an expression that it belongs to.
                if definer == user or name in known or start < 600 or not line.strip() or _BINDS.match(line):
                    continue
                known.add(name)
                stop = text.find("\n", start)
                yield package, user, definer, at, text[:start], text[start : stop if stop >= 0 else len(text)]


def _names(text: str) -> Iterator[tuple[int, str]]:
    """Where names stand in a source, strings and comments left out; nothing of a file that is no Python."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME:
                yield starts[token.start[0] - 1] + token.start[1], token.string
    except (tokenize.TokenError, SyntaxError):
        return


def _stretches(material: Material, draw: random.Random, length: int, count: int) -> Iterator[Case]:
    """Long texts to be predicted token by token; what is counted is in what is read."""
    for _ in range(count):
        yield Case(material.prose(draw, length)[:length], [], (), 0.0)


def _library() -> dict[str, dict[str, str]]:
    """Packages of Python's standard library, by package and file name."""
    import importlib.util

    packages: dict[str, dict[str, str]] = {}
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            files = sorted(Path(folder).glob("*.py"))
            packages[name] = {file.name: file.read_text(encoding="utf-8") for file in files}
    return packages


TASKS = {
    task.name: task
    for task in (
        Task("passkey", "found", "A number hidden in repeated sentences", _pass_keys),
        Task("needle", "chosen", "A sentence hidden in real prose", _needles),
        Task("documents", "chosen", "One of many documents has the answer", _documents),
        Task("completion", "completed", "A line of code that uses a name of another file", _completions),
        Task("position", "", "Prediction of a text against position", _stretches),
    )
}
