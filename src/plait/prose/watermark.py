"""Marking a finished text so that a secret key finds it again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Literal, NamedTuple

from plait.decode.watermark import Detection, Option, Slot, check_key, choose_words, count_bits
from plait.errors import ConfigError
from plait.prose.thesaurus import Candidates, Proposal, ThesaurusCandidates
from plait.text.words import Lexicon, Word, matched_case, needs_an, split_words

if TYPE_CHECKING:
    from plait.engine import LanguageModel

__all__ = ["Marked", "Mode", "Replacement", "Watermark"]

Mode = Literal["fast", "precise"]

# What one more one may cost, in nats, from the most careful on: a text is changed no more than its strength needs.
_NATS_PER_ONE = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


class Replacement(NamedTuple):
    """A word that was replaced.

    Attributes:
        start: where it stood in the original, in characters.
        original, word: what stood there, and what stands there now.
        nats: how much less likely the model finds the text with it.
    """

    start: int
    original: str
    word: str
    nats: float


class Marked(NamedTuple):
    """A text with its watermark.

    Attributes:
        text: the marked text; all but the replaced words, and articles before them, is as it was.
        replaced: what was replaced, in order; articles are not listed.
        detection: what the fast detector says of the marked text.
        words: number of words of the text.
    """

    text: str
    replaced: tuple[Replacement, ...]
    detection: Detection
    words: int

    @property
    def z(self) -> float:
        """The fast detector's score."""
        return self.detection.z


class Watermark:
    """Marks English text, from whatever source, and detects the mark.

    Paper: Yang et al. 2023, arXiv:2305.08883. Only words of `Lexicon.alternatives` count, which are known from
    the text alone; embedding replaces as few of them as the wanted strength needs, within its budgets.

    Args:
        key: 16 secret bytes or more; whoever has it can detect, and remove, the mark. None is the paper's
            own form, which anybody can.
        lexicon: the words and their alternatives; both sides need the same.
        candidates: which alternatives fit; needed to embed and for the precise mode. A model makes the
            default: `Watermark(key, lexicon, lm)`.
        language: `en`; others are refused.
        max_nats: most that one replacement may cost in likelihood.
        max_replaced: largest share of the words that is replaced, in (0, 1].
        target_z: strength at which embedding stops.
        alpha: rate at which unmarked texts are taken for marked.

    Raises:
        ConfigError: a short key, another language, or a number outside its range.
    """

    def __init__(
        self,
        key: bytes | None,
        lexicon: Lexicon,
        candidates: LanguageModel | Candidates | None = None,
        *,
        language: str = "en",
        max_nats: float = 12.0,
        max_replaced: float = 0.25,
        target_z: float = 6.0,
        alpha: float = 0.01,
    ) -> None:
        check_key(key)
        if language != "en":
            raise ConfigError(f"A watermark's language must be 'en'. Got {language!r}.")
        for name, value in (("max_nats", max_nats), ("target_z", target_z)):
            if not value > 0:
                raise ConfigError(f"Watermark.{name} must be above 0. Got {value}.")
        if not 0 < max_replaced <= 1:
            raise ConfigError(f"Watermark.max_replaced must be in (0, 1]. Got {max_replaced}.")
        if not 0 < alpha < 1:
            raise ConfigError(f"Watermark.alpha must be between 0 and 1. Got {alpha}.")
        self.key, self.lexicon = key, lexicon
        self.candidates: Candidates | None
        if candidates is None or isinstance(candidates, Candidates):
            self.candidates = candidates
        else:
            self.candidates = ThesaurusCandidates(candidates, lexicon)
        self.max_nats, self.max_replaced, self.target_z, self.alpha = max_nats, max_replaced, target_z, alpha

    def embed(self, text: str) -> Marked:
        """Replace words until the mark is strong enough, or a budget is used up. Deterministic.

        Raises:
            ConfigError: there is no source of candidates.
        """
        words = split_words(text)
        eligible = self._eligible(words)
        proposals = dict(zip(eligible, self._propose(text, words, eligible), strict=True))
        best = self._marked(text, words, proposals, {})
        for nats_per_one in _NATS_PER_ONE:
            if best.z >= self.target_z:
                break
            chosen = self._choose(words, proposals, nats_per_one)
            if len(chosen) > self.max_replaced * len(words):
                break
            best = self._marked(text, words, proposals, chosen)
        return best

    def detect(self, text: str, *, mode: Mode = "fast") -> Detection:
        """Test a text for the mark of this key.

        Args:
            mode: `fast` looks at every word that has an alternative in the lexicon, and needs no model.
                `precise` leaves out words whose alternatives the model finds unfit, as embedding did: fewer
                and cleaner bits.

        Raises:
            ConfigError: an unknown mode, or `precise` without a source of candidates.
        """
        if mode not in ("fast", "precise"):
            raise ConfigError(f"mode must be fast or precise. Got {mode!r}.")
        words = split_words(text)
        eligible = self._eligible(words)
        if mode == "precise":
            proposed = self._propose(text, words, eligible)
            eligible = [index for index, options in zip(eligible, proposed, strict=True) if options]
        return self._detection(words, eligible)

    def _eligible(self, words: Sequence[Word]) -> list[int]:
        return [
            index
            for index, word in enumerate(words)
            if word.is_free and self.lexicon.alternatives(word.text.lower())
        ]

    def _propose(self, text: str, words: Sequence[Word], wanted: Sequence[int]) -> list[list[Proposal]]:
        if self.candidates is None:
            raise ConfigError(
                "Embedding and the precise mode need a model. Give Watermark one as candidates."
            )
        found = self.candidates.propose(text, words, wanted)
        return [[one for one in proposals if one.nats <= self.max_nats] for proposals in found]

    def _detection(self, words: Sequence[Word], eligible: Sequence[int]) -> Detection:
        pairs = [(_previous(words, index), _hashed(words[index].text)) for index in _counted(words, eligible)]
        return count_bits(pairs, self.key, alpha=self.alpha)

    def _choose(
        self, words: Sequence[Word], proposals: dict[int, list[Proposal]], nats_per_one: float
    ) -> dict[int, Proposal]:
        chosen: dict[int, Proposal] = {}
        counted = set(_counted(words, list(proposals)))
        for sentence in _sentences(words):
            slots = [
                Slot(
                    (
                        Option(_hashed(words[index].text), 0.0),
                        *(Option(one.word, one.nats + _PER_CHANGE) for one in proposals.get(index, ())),
                    ),
                    index in counted,
                )
                for index in sentence
            ]
            for index, option in zip(sentence, choose_words(slots, self.key, nats_per_one), strict=True):
                if option:
                    chosen[index] = proposals[index][option - 1]
        return chosen

    def _marked(
        self,
        text: str,
        words: Sequence[Word],
        proposals: dict[int, list[Proposal]],
        chosen: dict[int, Proposal],
    ) -> Marked:
        pieces, stop = [], 0
        for index, word in enumerate(words):
            said = chosen[index].word if index in chosen else word.text
            if index + 1 in chosen and word.text.lower() in ("a", "an"):
                said = matched_case("an" if needs_an(chosen[index + 1].word) else "a", word.text)
            pieces += [text[stop : word.start], said]
            stop = word.stop
        marked = "".join([*pieces, text[stop:]])
        replaced = tuple(
            Replacement(words[index].start, words[index].text, one.word, one.nats)
            for index, one in sorted(chosen.items())
        )
        now = split_words(marked)
        return Marked(marked, replaced, self._detection(now, self._eligible(now)), len(words))


# Every change costs a little even where the model likes it, so that nothing is replaced for nothing.
_PER_CHANGE = 0.1


def _sentences(words: Sequence[Word]) -> Iterator[list[int]]:
    for _, group in groupby(range(len(words)), key=lambda index: words[index].sentence):
        yield list(group)


def _counted(words: Sequence[Word], eligible: Sequence[int]) -> list[int]:
    """The words whose bits a change of the eligible ones decides: these, and those right behind them."""
    behind = {
        index + 1
        for index in eligible
        if index + 1 < len(words) and words[index + 1].sentence == words[index].sentence
    }
    return sorted(behind | set(eligible))


def _previous(words: Sequence[Word], index: int) -> str:
    """The word before in the same sentence, as it is hashed; empty for the first."""
    if index == 0 or words[index - 1].sentence != words[index].sentence:
        return ""
    return _hashed(words[index - 1].text)


def _hashed(word: str) -> str:
    # An article follows the word behind it, so both forms are one for the mark.
    return word[:-1] if word.lower() == "an" else word
