"""Real edits: what changed between two versions of a file of a package, passage by passage."""

from __future__ import annotations

import difflib
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from plait.claims.claim import MeasurementError
from plait.hub.aliases import Wheel

if TYPE_CHECKING:
    from plait.engine import Edit
    from plait.text import Tokenizer

__all__ = ["EditedPassage", "edited_passages"]


def _wheel(version: str, nbytes: int, sha256: str, member_nbytes: int, member_sha256: str) -> Wheel:
    return Wheel(
        project="click",
        filename=f"click-{version}-py3-none-any.whl",
        nbytes=nbytes,
        sha256=sha256,
        member="click/core.py",
        member_nbytes=member_nbytes,
        member_sha256=member_sha256,
    )


_OLD = _wheel(
    "8.2.1", 102_215, "61a3265b914e850b85317d0b3109c7f8cd35a670f963866005d6ef1d5175a12b",
    117_343, "814869352f5c14119d1175dd8ac1951be791bc67f8f514f215a831ba5ab0745c",
)  # fmt: skip
_NEW = _wheel(
    "8.3.0", 107_295, "9b9f285302c6e3064f4330c05f05b81945b2a39544279343e6e7c5f27a9baddc",
    128_855, "d40e53f14a005e494818f4c9f37fc325b562df97a1b494b615390fff043b7acd",
)  # fmt: skip


class EditedPassage(NamedTuple):
    """A passage of a file and what a new version of the file did to it.

    Attributes:
        text: the passage in the old version, whole lines.
        edits: what makes it the passage in the new version; in characters of `text`, in order.
        following: what stands behind it in the new version.
    """

    text: str
    edits: list[Edit]
    following: str


def edited_passages(tokenizer: Tokenizer, tokens: int, following: int, count: int) -> list[EditedPassage]:
    """Passages of click/core.py that version 8.3.0 changed, as edits of 8.2.1; the two wheels are brought once.

    The first change of a passage stands at about one quarter of it. Passages do not overlap.

    Args:
        tokens: of a passage, about; it is made of whole lines and ends outside changes.
        following: tokens that must stand behind it.
        count: passages, taken at even distances from those that there are.

    Raises:
        DownloadError: a wheel is not to be had.
        MeasurementError: fewer than `count` passages were changed.
    """
    from plait.hub.wheels import member_path

    old, new = (member_path(wheel).read_text("utf-8").splitlines(keepends=True) for wheel in (_OLD, _NEW))
    found = _passages(tokenizer, old, new, tokens, following)
    if len(found) < count:
        raise MeasurementError(f"{len(found)} passages of {tokens} tokens were changed; {count} are needed.")
    return [found[number * len(found) // count] for number in range(count)]


def _passages(
    tokenizer: Tokenizer, old: list[str], new: list[str], tokens: int, following: int
) -> list[EditedPassage]:
    """Every passage that can be cut from two versions, given as lines; see `edited_passages`."""
    from plait.engine import Edit

    # Of all tokens before each line; lines are tokenised apart, which is near enough for lengths.
    before = [0, *accumulate(len(tokenizer.encode(line)) for line in old)]
    changes = [
        change[1:]
        for change in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        if change[0] != "equal"
    ]
    found: list[EditedPassage] = []
    free = 0
    while changes:
        first_change = changes[0][0]
        start = first_change
        while start > free and before[first_change] - before[start] < tokens // 4:
            start -= 1
        stop = next((line for line in range(start, len(old)) if before[line] - before[start] >= tokens), None)
        if stop is None:
            break
        inside = []
        while changes and changes[0][0] < stop:
            change = changes.pop(0)
            inside.append(change)
            stop = max(stop, change[1])
        free = stop
        behind = "".join(new[stop + inside[-1][3] - inside[-1][1] :])
        if len(tokenizer.encode(behind[: 20 * following])) < following:
            break
        text = "".join(old[start:stop])
        place = [0, *accumulate(map(len, old[start:stop]))]
        edits = [
            Edit(place[low - start], place[high - start], "".join(new[new_low:new_high]))
            for low, high, new_low, new_high in inside
        ]
        found.append(EditedPassage(text, edits, behind))
    return found
