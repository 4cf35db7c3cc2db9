"""Passages of English prose, and what somebody may do to a text to lose its watermark."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

from plait.claims.claim import MeasurementError
from plait.claims.texts import chapters

if TYPE_CHECKING:
    from plait.engine import LanguageModel
    from plait.text.words import Lexicon

__all__ = [
    "HELD_OUT_SUBJECTS",
    "delete_words",
    "manual_passages",
    "model_passages",
    "shuffle_sentences",
    "substitute_words",
]

_SUBJECTS = (
    "how glass is blown",
    "the history of Egypt",
    "why the tides rise and fall",
    "how a sailing boat moves against the wind",
    "a day in the life of a nurse",
    "how the lungs work",
    "why people collect stamps",
    "how mountains are formed",
    "the invention of the telephone",
    "what makes a good neighbour",
    "how bees make honey",
    "life in a lighthouse",
    "why we dream",
    "how bridges carry their load",
    "the benefits of learning a language",
    "how libraries order their books",
    "the life of a star",
    "how to plant a vegetable garden",
    "what a judge does",
    "how whales talk to each other",
)


HELD_OUT_SUBJECTS = 5
"""So many subjects, the last ones, are for calibrating alone."""


def model_passages(
    lm: LanguageModel, count: int, *, tokens: int = 200, seed: int = 0, held_out: bool = False
) -> list[str]:
    """Answers of a chat model about everyday subjects, each of `tokens` tokens at temperature 0.8.

    Args:
        held_out: about the subjects that are for calibrating, and not about the others.
    """
    subjects = _SUBJECTS[-HELD_OUT_SUBJECTS:] if held_out else _SUBJECTS[:-HELD_OUT_SUBJECTS]
    ids = [lm.encode_chat(f"Write about {subject}.") for subject in subjects[:count]]
    if len(ids) < count:
        raise MeasurementError(f"There are {len(ids)} subjects; {count} passages are wanted.")
    engine = lm.new_engine()
    running = [
        engine.submit(
            lm.request(one, max_new_tokens=tokens, ignore_end=True, temperature=0.8, seed=seed + index)
        )
        for index, one in enumerate(ids)
    ]
    for _ in engine.run():
        pass
    return [sequence.result().text for sequence in running]


def manual_passages(
    lm: LanguageModel, count: int, *, tokens: int = 200, held_out: bool | None = None
) -> list[str]:
    """Passages of the prose of Python's manual, of `tokens` tokens, spread over its chapters.

    Args:
        held_out: of every second chapter, which are for calibrating; or of the others; of all when left out.
    """
    texts = list(chapters().values())
    if held_out is not None:
        texts = texts[1 if held_out else 0 :: 2]
    paragraphs = [paragraph for text in texts for paragraph in text.split("\n\n")]
    prose = [
        re.sub(r"\s+", " ", one).strip()
        for one in paragraphs
        if len(one) > 300 and ">>>" not in one and re.match(r"[A-Z]", one.strip())
    ]
    words = " ".join(prose).split(" ")
    step = len(words) // count
    if step < tokens:
        raise MeasurementError(f"The manual has no {count} passages of {tokens} tokens.")
    found = []
    for start in range(0, step * count, step):
        ids = lm.tokenizer.encode(" ".join(words[start : start + tokens]))[:tokens]
        found.append(lm.tokenizer.decode(ids))
    return found


def delete_words(text: str, share: float, rng: random.Random) -> str:
    """A text without some of its words, drawn at random."""
    words = text.split(" ")
    gone = set(rng.sample(range(len(words)), round(share * len(words))))
    return " ".join(word for index, word in enumerate(words) if index not in gone)


def substitute_words(text: str, share: float, rng: random.Random, lexicon: Lexicon) -> str:
    """A text in which a share of all words, drawn of those with synonyms, has become random synonyms."""
    from plait.text.words import matched_case, split_words

    words = split_words(text)
    able = [
        index for index, word in enumerate(words) if word.is_free and lexicon.alternatives(word.text.lower())
    ]
    chosen = set(rng.sample(able, min(len(able), round(share * len(words)))))
    pieces, stop = [], 0
    for index, word in enumerate(words):
        said = word.text
        if index in chosen:
            said = matched_case(rng.choice(lexicon.alternatives(word.text.lower())), word.text)
        pieces += [text[stop : word.start], said]
        stop = word.stop
    return "".join([*pieces, text[stop:]])


def shuffle_sentences(text: str, rng: random.Random) -> str:
    """The sentences of a text in another order."""
    sentences = re.split(r"(?<=[.!?])\s+", text)
    rng.shuffle(sentences)
    return " ".join(sentences)
