"""Language models of bytes: a loaded model, or several with different vocabularies, seen through the next byte."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from plait.decode import Sampling
from plait.decode.bytes import END, ByteState, Marginal, MixtureState, NextByte, TokenReader, heal
from plait.decode.history import History
from plait.decode.sampler import Sampler
from plait.errors import ConfigError
from plait.text import ByteVocabulary, StopStrings

if TYPE_CHECKING:
    from plait.engine.language_model import LanguageModel
    from plait.engine.request import Generation

__all__ = ["ByteGeneration", "ByteLM", "Ensemble", "Fill", "Settled", "ensemble"]

# From this share of the probability on, one token sequence stands for the text.
_SETTLED = 0.99
# Bytes after which tokens take over even so.
_LONGEST_WORD = 64


class ByteGeneration(NamedTuple):
    """Bytes that continue a prompt.

    Attributes:
        data: without the prompt; it may end inside a character.
        ended: whether the model ended the text.
        logprob: log-probability of the bytes, and of the end where there is one, in nats, before warping.
    """

    data: bytes
    ended: bool
    logprob: float

    @property
    def text(self) -> str:
        """The bytes as text; what is not UTF-8 as U+FFFD."""
        return self.data.decode("utf-8", errors="replace")


class Fill(NamedTuple):
    """What may stand between two texts.

    Attributes:
        data: the bytes in the middle.
        logprob: log-probability of the middle and of the beginning of what follows it, in nats.
    """

    data: bytes
    logprob: float


class Settled(NamedTuple):
    """A prompt whose last word was finished in bytes, to be continued in tokens.

    Attributes:
        ids: tokens of prompt and text, with what starts a text.
        text: what was written behind the prompt; may be empty.
        share: of the probability that the tokens have among all that spell the same bytes; 1 after `heal`.
    """

    ids: tuple[int, ...]
    text: str
    share: float

    def before(self, answer: Generation, stop: str | Sequence[str]) -> Generation:
        """The answer that went on from here, with the text written before it; it ends at the first stop text."""
        stops = StopStrings([stop] if isinstance(stop, str) else stop)
        text, is_stopped = stops.push(self.text + answer.text)
        reason = "stop" if is_stopped else answer.finish_reason
        return dataclasses.replace(answer, text=text + stops.finish(), finish_reason=reason)


class _ByteGenerator:
    """What a byte model does with its states; subclasses make them."""

    def state(self, prefix: str | bytes = b"") -> NextByte:
        """The law of the next byte after a prefix, to which bytes can be pushed."""
        raise NotImplementedError

    def next(self, prefix: str | bytes) -> npt.NDArray[np.float64]:
        """Probability of each byte after a prefix, and of the end: (257,), summing to 1.

        Args:
            prefix: text, or bytes that may end inside a character.

        Raises:
            ConfigError: bytes that are not UTF-8, or that no token sequence of the model spells.
            CapacityError: the prefix fills the model's context.
        """
        law: npt.NDArray[np.float64] = np.exp(self.state(prefix).law())
        return law

    def generate(
        self,
        prompt: str | bytes,
        *,
        max_bytes: int = 64,
        stop: Sequence[bytes] = (),
        sampling: Sampling | None = None,
    ) -> ByteGeneration:
        """Continue a prompt byte by byte.

        Args:
            prompt: text, or bytes that may end inside a character.
            max_bytes: most bytes of the answer, at least 1.
            stop: bytes behind which the answer ends; they are left out.
            sampling: temperature, top-k, top-p and min-p over the 257 outcomes; penalties and bias count bytes
                as they count tokens elsewhere. Greedy when left out.

        Raises:
            ConfigError: as `next`, or a setting outside its limits.
        """
        if max_bytes < 1 or any(not each for each in stop):
            raise ConfigError(
                f"generate takes a max_bytes of at least 1 and stops that are not empty. Got {max_bytes}."
            )
        return _write(self.state(prompt), sampling or Sampling(temperature=0.0), max_bytes, stop)


class ByteLM(_ByteGenerator):
    """A tokenised model as a model of bytes: the same law over texts, for prompts that end anywhere.

    Args:
        lm: the loaded model.
        vocabulary: its tokenizer seen from bytes.
        start: tokens before every text.
        marginal: sum over all token sequences of the last word, in a beam; None for those that the tokenizer
            makes.
    """

    def __init__(
        self, lm: LanguageModel, vocabulary: ByteVocabulary, start: Sequence[int], marginal: Marginal | None
    ) -> None:
        self.lm = lm
        self.vocabulary = vocabulary
        self.start = tuple(start)
        self.marginal = marginal

    def __repr__(self) -> str:
        return f"<ByteLM {self.lm.name}: {'exact' if self.marginal is None else self.marginal}>"

    def state(self, prefix: str | bytes = b"") -> ByteState[TokenReader]:
        return ByteState(
            self.vocabulary,
            TokenReader(self.lm.model, self.lm.plan),
            self.start,
            _as_bytes(prefix),
            marginal=self.marginal,
        )

    def logprob(self, data: str | bytes, prefix: str | bytes = b"") -> float:
        """Log-probability in nats that a text begins, or goes on after a prefix, with these bytes.

        One pass over the tokens, not one for each byte.

        Raises:
            ConfigError, CapacityError: as `next`.
        """
        return self.state(prefix).log_of(_as_bytes(data))

    def settle(self, prompt: str | bytes, sampling: Sampling | None = None) -> Settled:
        """Finish the last word of a prompt in bytes, so that tokens can go on without a bad start.

        Bytes are written until one token sequence has nearly all the probability of what is there; at the end
        of a word that is so at once.

        Args:
            prompt: text, or bytes that may end inside a character.
            sampling: of the bytes; greedy when left out.
        """
        warping = _warping(sampling)
        state = self.state(prompt)
        data = state.data

        def is_settled() -> bool:
            return state.settled()[1] >= _SETTLED and _is_text(state.data)

        _write(state, warping, _LONGEST_WORD, (), until=is_settled)
        ids, share = state.settled()
        if share == 0.0:
            ids = (*self.start, *self.vocabulary.encodings(self.vocabulary.lead + state.data)[0])
        return Settled(ids, state.data[len(data) :].decode("utf-8", errors="replace"), share)

    def heal(self, prompt: str | bytes, sampling: Sampling | None = None) -> Settled:
        """Choose the last token of a prompt again, among those that begin with its text; see `settle`.

        The usual, cheaper remedy, right where one token is all that a cut spoiled.

        Args:
            prompt: text, or bytes of whole characters.
            sampling: of the token; greedy when left out.
        """
        prompt = _as_bytes(prompt)
        ids = self.vocabulary.encodings(self.vocabulary.lead + prompt)[0]
        last = self.vocabulary.texts[ids[-1]] if ids else b""
        sampler, history = Sampler(_warping(sampling), self.vocabulary.vocab_size), History(ids[:-1])
        found = heal(
            self.vocabulary,
            TokenReader(self.lm.model, self.lm.plan),
            self.start,
            ids,
            last,
            lambda law: int(sampler.choose(torch.from_numpy(law), history, len(ids)).token),
        )
        written = self.vocabulary.texts[found[-1]][len(last) :] if ids else b""
        return Settled(found, written.decode("utf-8", errors="replace"), 1.0)

    def fill(
        self, prefix: str | bytes, suffix: str | bytes, *, max_bytes: int = 32, look_ahead: int = 24
    ) -> Fill:
        """What may stand between two texts, from any byte position, with a model that only reads forwards.

        The middle is the beginning of the model's greedy continuation that makes the middle and what follows
        likeliest together; P(middle | both sides) is proportional to that.

        Args:
            prefix: what stands before.
            suffix: what stands behind; at least one byte.
            max_bytes: most bytes of the middle.
            look_ahead: how many bytes of the suffix are looked at.
        """
        prefix, suffix = _as_bytes(prefix), _as_bytes(suffix)[:look_ahead]
        if not suffix or max_bytes < 0:
            raise ConfigError("fill takes a suffix of at least one byte and a max_bytes of at least 0.")
        state = self.state(prefix)
        so_far, best = 0.0, Fill(b"", -np.inf)
        for count in range(max_bytes + 1):
            try:
                total = so_far + state.log_of(suffix)
            except ConfigError:
                # Here the suffix is no text, or impossible.
                total = -np.inf
            if total > best.logprob:
                best = Fill(state.data[len(prefix) :], total)
            law = state.law()
            byte = int(law.argmax())
            so_far += float(law[byte])
            # What comes later can only be less likely.
            if byte == END or so_far < best.logprob or count == max_bytes:
                break
            state.push(byte)
        return best


class Ensemble(_ByteGenerator):
    """Several models, with any vocabularies, as one: the mean of their laws of the next byte.

    Args:
        members: the models.
        weights: of each; equal when left out.
    """

    def __init__(self, members: Sequence[ByteLM], weights: Sequence[float] | None = None) -> None:
        self.members = list(members)
        self.weights = [1.0] * len(self.members) if weights is None else list(weights)
        if len(self.members) < 2:
            raise ConfigError(f"An ensemble needs at least two models. Got {len(self.members)}.")

    def state(self, prefix: str | bytes = b"") -> MixtureState:
        return MixtureState([member.state(prefix) for member in self.members], self.weights)

    def logprob(self, data: str | bytes, prefix: str | bytes = b"") -> float:
        """Log-probability of bytes after a prefix, in nats; a pass for each byte and model."""
        state, total = self.state(prefix), 0.0
        for byte in _as_bytes(data):
            total += float(state.law()[byte])
            state.push(byte)
        return total


def ensemble(models: Sequence[LanguageModel], weights: Sequence[float] | None = None) -> Ensemble:
    """Models with any vocabularies as one model of bytes.

    Args:
        models: at least two loaded models.
        weights: of each, positive; equal when left out.

    Raises:
        ConfigError: fewer than two models.
        IncompatibleError: the tokenizer of one has no exact bytes; see `LanguageModel.bytes`.
    """
    return Ensemble([model.bytes() for model in models], weights)


def _write(
    state: NextByte,
    sampling: Sampling,
    max_bytes: int,
    stop: Sequence[bytes],
    *,
    until: Callable[[], bool] = lambda: False,
) -> ByteGeneration:
    sampler = Sampler(sampling, END + 1)
    first = len(state.data)
    history = History(state.data)
    logprob, ended = 0.0, False
    while len(state.data) - first < max_bytes and not until():
        law = state.law()
        byte = sampler.choose(torch.from_numpy(law), history, len(state.data)).token
        logprob += float(law[byte])
        if byte == END:
            ended = True
            break
        state.push(byte)
        history.append(byte)
        written = state.data[first:]
        if found := next((each for each in stop if written.endswith(each)), None):
            return ByteGeneration(written[: -len(found)], False, logprob)
    return ByteGeneration(state.data[first:], ended, logprob)


def _warping(sampling: Sampling | None) -> Sampling:
    """What of a sampling does not depend on what its outcomes are."""
    sampling = sampling or Sampling(temperature=0.0)
    return Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
    )


def _as_bytes(text: str | bytes) -> bytes:
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):
        raise ConfigError(f"A prefix is text or bytes. Got {type(text).__name__}.")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"Character {error.start} of the text is half of a surrogate pair, which is no text in Unicode."
        ) from None


def _is_text(data: bytes) -> bool:
    try:
        data[-4:].decode("utf-8", errors="strict") if data[-4:-3].isascii() else data.decode()
    except UnicodeDecodeError:
        return False
    return True
