"""A WordNet of a few senses, written as WordNet's own files are."""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_wordnet"]

_TYPES = {"noun": ("n", 1), "verb": ("v", 2), "adj": ("a", 3), "adv": ("r", 4)}
SENSES = {
    "noun": [
        (("dog", "hound"), 9),
        (("car", "auto", "automobile"), 8),
        (("child", "kid"), 7),
        (("apple",), 5),
    ],
    "verb": [(("begin", "start", "commence"), 9), (("buy", "purchase"), 8), (("help", "aid", "assist"), 7)],
    "adj": [(("big", "large"), 9), (("quick", "fast"), 6), (("enormous", "huge"), 3)],
    "adv": [(("quickly", "rapidly"), 9), (("often", "frequently"), 8)],
}
SIMILAR = {"big": "enormous", "enormous": "big"}
"""Of adjectives, the first words of senses that are similar."""


def write_wordnet(folder: Path) -> Path:
    """Write the nine files; every count and place in them is right."""
    folder.mkdir(parents=True, exist_ok=True)
    senses: list[str] = []
    for part, synsets in SENSES.items():
        letter, number = _TYPES[part]
        head = "  1 This is a notice.  \n"
        # Places have eight digits, so lines keep their lengths when the right ones are filled in.
        places = [0] * len(synsets)
        for _ in range(2):
            lines, at = [], len(head)
            for index, (words, _count) in enumerate(synsets):
                near = SIMILAR.get(words[0])
                target = next((i for i, (others, _) in enumerate(synsets) if others[0] == near), None)
                pointers = "000" if target is None else f"001 & {places[target]:08d} a 0000"
                listed = " ".join(f"{word} 0" for word in words)
                line = (
                    f"{at:08d} 00 {letter} {len(words):02x} {listed} {pointers} | a gloss; with | a bar  \n"
                )
                lines.append(line)
                places[index] = at
                at += len(line)
        (folder / f"data.{part}").write_text(head + "".join(lines), encoding="ascii")
        index_lines = []
        for place, (words, count) in zip(places, synsets, strict=True):
            for word in words:
                index_lines.append(f"{word} {letter} 1 1 @ 1 1 {place:08d}  \n")
                senses.append(f"{word}%{number}:00:00:: {place:08d} 1 {count}\n")
        (folder / f"index.{part}").write_text(head + "".join(sorted(index_lines)), encoding="ascii")
    (folder / "index.sense").write_text("".join(sorted(senses)), encoding="ascii")
    return folder
