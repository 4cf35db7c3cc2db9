"""English words in a text: where they are, which may be changed, and by which others.

Nothing here looks at a word's neighbours to tell what it is, so whoever has only the text computes the same
words, the same parts of speech and the same alternatives as whoever changed it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import NamedTuple

from plait.errors import import_extra
from plait.text.wordnet import PARTS, WordNet

__all__ = ["Form", "Lexicon", "Word", "matched_case", "needs_an", "split_words"]

# Everything that a word of prose is not: code, addresses, quotations. Their words are left alone.
_PROTECTED = re.compile(
    r"```.*?(?:```|\Z)"  # fenced code
    r"|`[^`\n]*`"
    r"|(?:https?://|www\.)\S+"
    r"|\S+@\S+"
    r"|\"[^\"\n]*\"|\u201c[^\u201d\n]*\u201d|\xab[^\xbb\n]*\xbb"
    r"|(?<!\w)'[^'\n]*'(?!\w)|(?<!\w)\u2018[^\u2019\n]*\u2019(?!\w)"
    r"|^(?: {4}|\t)[^\n]*$",  # an indented line is code
    re.DOTALL | re.MULTILINE,
)
_WORD = re.compile(r"[^\W_]+(?:['\u2019_.\-/][^\W_]+)*|[^\W]+", re.UNICODE)
_SENTENCE_END = re.compile(r"[.!?\u2026:]['\")\]\u201d\u2019]*\s|\n\s*\n|\n\s*[-*#>|]")
_PLAIN = re.compile(r"[A-Z]?[a-z]{2,}\Z")
_TAGS = {
    "n": ("NN", "NNS"),
    "v": ("VB", "VBZ", "VBG", "VBD", "VBN"),
    "a": ("JJ", "JJR", "JJS"),
    "r": ("RB", "RBR", "RBS"),
}
_UPOS = {"NOUN": "n", "VERB": "v", "ADJ": "a", "ADV": "r"}
# Sounds, which the first letter does not always tell: an hour, a unit, a use, an uncle, a one.
_AN = re.compile(
    r"(?!eu|ewe|(?:one|ones|once)\b|uni(?![nm])|us[aeiu]|ut[aei]|ub[io]|uf|ur[aeo])[aeiou]|hour|hono|honest|heir",
    re.IGNORECASE,
)

_STOP_WORDS = frozenset(
    ["a", "about", "above", "across", "after", "against", "all", "also", "although", "am", "among", "an", "and", "another", "any", "anybody", "anyone", "anything", "anywhere", "are", "as", "at", "be", "because", "been", "before", "behind", "being", "below", "beside", "besides", "between", "beyond", "both", "but", "by", "can", "cannot", "could", "did", "do", "does", "doing", "done", "down", "dr", "during", "each", "eight", "either", "else", "enough", "even", "every", "everybody", "everyone", "everything", "everywhere", "few", "first", "five", "for", "four", "from", "further", "had", "has", "have", "having", "he", "hence", "her", "here", "hers", "herself", "him", "himself", "his", "how", "hundred", "i", "if", "in", "into", "is", "it", "its", "itself", "let", "may", "me", "might", "million", "mine", "more", "most", "mr", "mrs", "ms", "much", "must", "my", "myself", "near", "neither", "never", "nine", "no", "nobody", "none", "nor", "not", "nothing", "now", "nowhere", "of", "off", "oh", "ok", "okay", "on", "once", "one", "ones", "only", "onto", "or", "other", "others", "ought", "our", "ours", "ourselves", "out", "over", "own", "per", "s", "same", "second", "seven", "shall", "she", "should", "since", "six", "so", "some", "somebody", "someone", "something", "such", "t", "ten", "than", "that", "the", "their", "theirs", "them", "themselves", "then", "there", "these", "they", "third", "this", "those", "though", "thousand", "three", "through", "throughout", "thus", "till", "to", "too", "toward", "towards", "two", "under", "until", "up", "upon", "us", "very", "via", "was", "we", "well", "were", "what", "whatever", "when", "where", "whereas", "whether", "which", "while", "who", "whoever", "whom", "whose", "why", "will", "with", "within", "without", "would", "yes", "yet", "you", "your", "yours", "yourself", "yourselves"]
)  # fmt: skip


class Word(NamedTuple):
    """A word of a text.

    Attributes:
        text: as it stands.
        start, stop: where, in characters.
        sentence: number of its sentence, from 0 on.
        is_free: whether it may be changed: plain lower-case letters, or with a capital that only the start of
            its sentence explains, outside of quotations, code and addresses.
    """

    text: str
    start: int
    stop: int
    sentence: int
    is_free: bool


class Form(NamedTuple):
    """What a word is by itself: `lemma` in the dictionary, `part` of speech as in WordNet, `tag` of Penn Treebank."""

    lemma: str
    part: str
    tag: str


def split_words(text: str) -> list[Word]:
    """The words of a text in order; numbers, names and code are words that are not free."""
    protected = [match.span() for match in _PROTECTED.finditer(text)]
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    words: list[Word] = []
    sentence, span, is_first = 0, 0, True
    for match in _WORD.finditer(text):
        start, stop = match.span()
        while sentence < len(ends) and ends[sentence] <= start:
            sentence, is_first = sentence + 1, True
        while span < len(protected) and protected[span][1] <= start:
            span += 1
        is_outside = span == len(protected) or protected[span][0] >= stop
        said = match.group()
        is_free = is_outside and _PLAIN.match(said) is not None and (said.islower() or is_first)
        words.append(Word(said, start, stop, sentence, is_free))
        is_first = False
    return words


def needs_an(word: str) -> bool:
    """Whether the article before a word is `an`."""
    return _AN.match(word) is not None


def matched_case(word: str, like: str) -> str:
    """`word` with the capital that `like` has."""
    return word[:1].upper() + word[1:] if like[:1].isupper() else word


class Lexicon:
    """Alternatives of English words: lemmas of the same sense in the same grammatical form.

    Args:
        wordnet: the senses.
        num_senses: senses of a word that are looked at, the most frequent first.
        num_alternatives: most alternatives of a word.

    Raises:
        MissingExtraError: `lemminflect` is not installed.
    """

    def __init__(self, wordnet: WordNet, *, num_senses: int = 6, num_alternatives: int = 8) -> None:
        self.wordnet = wordnet
        self._lemminflect = import_extra("lemminflect", extra="watermark", purpose="The English lexicon")
        self.form = functools.lru_cache(maxsize=1 << 16)(self._form)
        self.alternatives = functools.lru_cache(maxsize=1 << 16)(self._alternatives)
        self._inflections = functools.lru_cache(maxsize=1 << 17)(self._inflect)
        self._senses = functools.lru_cache(maxsize=1 << 16)(wordnet.senses)
        self._uses = functools.lru_cache(maxsize=1 << 16)(wordnet.uses)
        self._ranked = functools.lru_cache(maxsize=1 << 16)(self._rank)
        self._num_senses = num_senses
        self._num_alternatives = num_alternatives

    def _form(self, word: str) -> Form | None:
        """What a lower-case word most often is; None for a function word or one that WordNet does not have.

        Of several parts of speech, the one that the tagged texts of WordNet have most often.
        """
        if word in _STOP_WORDS:
            return None
        best: tuple[tuple[int, int], Form] | None = None
        lemmas: dict[str, tuple[str, ...]] = self._lemminflect.getAllLemmas(word)
        for upos, found in lemmas.items():
            part = _UPOS.get(upos)
            if part is None:
                continue
            for lemma in found:
                if lemma in _STOP_WORDS or not self._senses(lemma, part):
                    continue
                tag = next((tag for tag in _TAGS[part] if word in self._inflections(lemma, tag)), None)
                if tag is None:
                    continue
                # A word that is its own lemma wins a tie: `building` is more a building than to build.
                rank = (self._uses(lemma).get(part, 0), int(lemma == word))
                if best is None or rank > best[0]:
                    best = rank, Form(lemma, part, tag)
        return best[1] if best else None

    def _inflect(self, lemma: str, tag: str) -> tuple[str, ...]:
        # Words that are not listed would be inflected by a model from a pickle; they are left alone instead.
        return tuple(self._lemminflect.getInflection(lemma, tag, inflect_oov=False))

    def _alternatives(self, word: str) -> tuple[str, ...]:
        """Lower-case words that may stand for a lower-case word, the closest first; a symmetric relation.

        Symmetric, so that a text has the same changeable words before and after a change.
        """
        return tuple(other for other in self._ranked(word) if word in self._ranked(other))

    def _rank(self, word: str) -> tuple[str, ...]:
        form = self.form(word)
        if form is None:
            return ()
        ranks: dict[str, int] = {}
        for rank, lemma in self._lemmas(form):
            if lemma == form.lemma or not _PLAIN.match(lemma) or lemma in _STOP_WORDS:
                continue
            inflected = next(iter(self._inflections(lemma, form.tag)), None)
            if inflected is None or inflected == word or not _PLAIN.match(inflected):
                continue
            if self.form(inflected) == Form(lemma, form.part, form.tag):
                ranks[inflected] = min(rank, ranks.get(inflected, rank))
        ordered = sorted(ranks, key=lambda other: (ranks[other], other))
        return tuple(ordered[: self._num_alternatives])

    def _lemmas(self, form: Form) -> Iterable[tuple[int, str]]:
        """Lemmas that share a sense, with how rare that sense is among both lemmas' senses, from 0 on."""
        for rank, place in enumerate(self._senses(form.lemma, form.part)[: self._num_senses]):
            synset = self.wordnet.synset(form.part, place)
            for lemma in synset.words:
                yield rank + self._rarity(lemma.lower(), form.part, place), lemma
            for near in synset.similar:
                for lemma in self.wordnet.synset(form.part, near).words:
                    yield rank + self._num_senses + self._rarity(lemma.lower(), form.part, near), lemma

    def _rarity(self, lemma: str, part: str, place: int) -> int:
        places = self._senses(lemma, part)
        return places.index(place) if place in places else self._num_senses


assert set(_TAGS) == set(PARTS)
