"""Which words might stand in for others, by a thesaurus and a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import torch

from plait.engine.scoring import nats_of_rows
from plait.memory import Rows
from plait.ops import Tree
from plait.text.words import Lexicon, Word, matched_case, needs_an

if TYPE_CHECKING:
    from plait.engine import LanguageModel

__all__ = ["Candidates", "Proposal", "ThesaurusCandidates"]

# Rows of one pass: the mask of a draft tree grows with their square.
_ROWS = 1536
# Tokens before a passage that the model reads first.
_CONTEXT = 96
# Tokens after a word over which a change is still counted: what follows must go with it.
_FOLLOWING = 2


class Proposal(NamedTuple):
    """A word for another's place.

    Attributes:
        word: with the capital that the place has.
        nats: how much less likely it makes the text, 0 or more.
    """

    word: str
    nats: float


@runtime_checkable
class Candidates(Protocol):
    """A source of words that fit in a place.

    A source may only offer words of `Lexicon.alternatives`, by which the detector knows the words to look
    at; it says which of them fit, and how well.
    """

    def propose(self, text: str, words: Sequence[Word], wanted: Sequence[int]) -> list[list[Proposal]]:
        """What may stand for each wanted word (indices of `words`), the best first; none where nothing fits."""
        ...


class _Branch(NamedTuple):
    """A changed stretch in the tree of tokens: which proposal it is, its rows, and what it replaces."""

    place: int
    word: str
    rows: range
    original: range


class ThesaurusCandidates:
    """Alternatives of the lexicon, each scored by a causal language model.

    The model reads the text once, and every alternative as a branch of one draft tree: the word itself and
    the next three tokens, after what stands before it. A proposal costs the branch's negative log-likelihood
    less that of the same stretch of the original, where that is above 0.

    Args:
        lm: the model; its tokenizer's word boundaries are those of the text.
        lexicon: the alternatives.
        num_candidates: most alternatives of one word that are scored, the closest first.
    """

    def __init__(self, lm: LanguageModel, lexicon: Lexicon, *, num_candidates: int = 6) -> None:
        self.lm, self.lexicon, self.num_candidates = lm, lexicon, num_candidates

    def propose(self, text: str, words: Sequence[Word], wanted: Sequence[int]) -> list[list[Proposal]]:
        found: list[list[Proposal]] = [[] for _ in wanted]
        chunks = self._chunks(text, words)
        low = 0
        while low < len(wanted):
            low = self._score_some(text, words, wanted, chunks, low, found)
        for proposals in found:
            proposals.sort(key=lambda proposal: proposal.nats)
        return found

    def _chunks(self, text: str, words: Sequence[Word]) -> list[list[int]]:
        """Token ids of each word with what stands between it and the word before."""
        return self.lm.tokenizer.encode_batch(
            [_gap(text, words, index) + word.text for index, word in enumerate(words)]
        )

    def _score_some(
        self,
        text: str,
        words: Sequence[Word],
        wanted: Sequence[int],
        chunks: Sequence[Sequence[int]],
        low: int,
        found: list[list[Proposal]],
    ) -> int:
        """Score the words from `low` on that fit into one pass; return the first that does not."""
        first = wanted[low]
        size = 0
        # A row before the first token, so that it is predicted too.
        tokens = self.lm.encode("")[:1] or self.lm.tokenizer.encode("\n")[:1]
        while first > 0 and size + len(chunks[first - 1]) <= _CONTEXT:
            first -= 1
            size += len(chunks[first])
        starts = {}  # of each chunk, its first row
        parents = [-1]
        waiting: list[tuple[int, int]] = []
        index, place = first, low
        # The chain first, as far as the tree has room for the branches of its words.
        rows = 1
        while index < len(words) and rows < _ROWS:
            if place < len(wanted) and wanted[place] == index:
                cost = sum(len(chunks[index]) + 1 + _FOLLOWING for _ in self._alternatives(words[index]))
                if rows + cost > _ROWS and place > low:
                    break
                rows += cost
                waiting.append((place, index))
                place += 1
            starts[index] = len(tokens)
            for token in chunks[index]:
                parents.append(len(tokens) - 1)
                tokens.append(token)
            rows += len(chunks[index])
            index += 1
            if place == len(wanted) and index > wanted[-1] + _FOLLOWING:
                break
        chain = len(tokens)
        branches = [
            self._grow(text, words, chunks, starts, chain, at, index, word, tokens, parents)
            for at, index in waiting
            for word in self._alternatives(words[index])
        ]
        nats = self._nats(tokens, parents)
        for branch in branches:
            rise = float(nats[branch.rows].sum() - nats[branch.original].sum())
            found[branch.place].append(Proposal(branch.word, max(0.0, rise)))
        return place

    def _alternatives(self, word: Word) -> list[str]:
        others = self.lexicon.alternatives(word.text.lower())[: self.num_candidates]
        return [matched_case(other, word.text) for other in others]

    def _grow(
        self,
        text: str,
        words: Sequence[Word],
        chunks: Sequence[Sequence[int]],
        starts: dict[int, int],
        chain: int,
        place: int,
        index: int,
        word: str,
        tokens: list[int],
        parents: list[int],
    ) -> _Branch:
        """Add the branch of one alternative to the tree."""
        article = index > 0 and words[index - 1].text.lower() in ("a", "an") and index - 1 in starts
        first = index - 1 if article and needs_an(word) != (words[index - 1].text.lower() == "an") else index
        own = self.lm.tokenizer.encode(
            _gap(text, words, index) + word
            if first == index
            else _gap(text, words, first)
            + matched_case("an" if needs_an(word) else "a", words[first].text)
            + _gap(text, words, index)
            + word
        )
        stop = starts[index] + len(chunks[index])
        following = tokens[stop : min(stop + _FOLLOWING, chain)]
        start = len(tokens)
        for row, token in enumerate([*own, *following]):
            parents.append(starts[first] - 1 if row == 0 else len(tokens) - 1)
            tokens.append(token)
        return _Branch(place, word, range(start, len(tokens)), range(starts[first], stop + len(following)))

    @torch.inference_mode()
    def _nats(self, tokens: list[int], parents: list[int]) -> torch.Tensor:
        """Negative log-probability of every token behind its parent, (rows,) float64; 0 for the root."""
        ids = torch.tensor(tokens, dtype=torch.int64)
        model = self.lm.model
        hidden = model(ids, Rows([(len(tokens), 0, Tree(parents))]), [model.new_past(self.lm.plan)])
        nats = nats_of_rows(model, hidden[torch.tensor(parents[1:], dtype=torch.int64)], ids[1:])
        return torch.cat([nats.new_zeros(1), nats])


def _gap(text: str, words: Sequence[Word], index: int) -> str:
    """What stands between a word and the one before."""
    return text[words[index - 1].stop if index else 0 : words[index].start]
