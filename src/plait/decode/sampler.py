"""From logits to a law to a token.

Shapes: B sequences, V vocabulary. The work is done on the CPU, one row at a time and in one thread, so
a row's law and token have the same bits whatever else is in the batch and however many threads there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plait.decode.constraint import Guide
from plait.decode.history import History
from plait.decode.penalties import Bias, penalise
from plait.decode.randomness import Streams
from plait.decode.sampling import Sampling
from plait.decode.truncation import kept_tokens, largest
from plait.errors import ConfigError, PlaitError

__all__ = ["Alternative", "Choice", "Sampler", "choose_many", "draw"]

_Row = npt.NDArray[np.floating[Any]]

_DRAW_BLOCK = 512


class Alternative(NamedTuple):
    """A token that could have been chosen, with its log-probability (nats) under the raw logits."""

    token: int
    logprob: float


class Choice(NamedTuple):
    """A chosen token.

    `logprob` is the log-softmax (nats) of the raw logits, before any warping, as OpenAI-compatible servers
    report it; None unless `Sampling.logprobs` is set. `alternatives` are the likeliest tokens under the raw
    logits, best first, lowest id first among equals; impossible tokens are left out. The chosen token is
    among them only if it is that likely.
    """

    token: int
    logprob: float | None
    alternatives: tuple[Alternative, ...]


class Sampler:
    """A `Sampling` bound to a vocabulary and to the random numbers of one sequence.

    It keeps no record of what it chose: `History` does.

    Args:
        sampling: the settings.
        vocab_size: the number of logits V, at least 1.
        branch: tells apart sequences of one seed; see `Streams`.
        guide: which tokens may follow the generated ones; None for all.

    Raises:
        ConfigError: `vocab_size` is not positive, or `logit_bias` names a token outside the vocabulary.
    """

    def __init__(
        self, sampling: Sampling, vocab_size: int, *, branch: int = 0, guide: Guide | None = None
    ) -> None:
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1:
            raise ConfigError(f"Sampler.vocab_size must be a whole number in [1, inf). Got {vocab_size!r}.")
        bias = sampling.logit_bias or {}
        if outside := [token for token in bias if token >= vocab_size]:
            raise ConfigError(
                f"Sampling.logit_bias names token {outside[0]}, but the vocabulary has ids 0 to {vocab_size - 1}."
            )
        self.sampling = sampling
        self.vocab_size = vocab_size
        self.streams = Streams(sampling.seed, branch=branch)
        self._bias = Bias(bias) if bias else None
        self._guide = guide

    def law(self, logits: Tensor, history: History) -> Tensor:
        """The probabilities of the next token after all warping, (V,), on the CPU.

        float64 for float64 logits, else float32; they sum to 1 up to rounding. Greedy gives a single 1.
        A logit of +inf is certain: such tokens share all the probability equally.

        Args:
            logits: raw logits, (V,), floating; not changed.
            history: the tokens before this one.

        Raises:
            ConfigError: wrong shape or dtype, or bias and penalties leave no possible token.
            PlaitError: a logit is NaN, or all are -inf; the message names the position, `len(history)`.
        """
        row = _row(logits, self.vocab_size)
        return torch.from_numpy(self._law(row, _peak(row, len(history)), history, len(history)))

    def choose(self, logits: Tensor, history: History, position: int) -> Choice:
        """Choose the next token: the law's only one when greedy, else a draw with one uniform.

        The uniform is `streams.uniform(position)`, round 0 of purpose "verify", so a token depends only
        on its logits, history, seed and position.

        Args:
            logits: raw logits, (V,), floating; not changed.
            history: the tokens before this one.
            position: absolute position of the token to choose, used once in a sequence.

        Raises:
            As `law`; messages name `position`.
        """
        row = _row(logits, self.vocab_size)
        return self._choose(row, _peak(row, position), history, position)

    def warped(self, logits: Tensor, history: History) -> Tensor:
        """The logits after bias, penalties and guide, before the temperature, (V,), on the CPU.

        Args and errors: as `law`.
        """
        row = _row(logits, self.vocab_size)
        return torch.from_numpy(self._warped(row, _peak(row, len(history)), history, len(history))[0])

    def report(self, logits: Tensor, token: int, position: int) -> Choice:
        """A token that was chosen elsewhere, with the log-probabilities that `choose` would report.

        Args:
            logits: raw logits, (V,), floating; not changed.
            token: what was chosen.
            position: its absolute position, for messages.
        """
        if self.sampling.logprobs is None:
            return Choice(token, None, ())
        row = _row(logits, self.vocab_size)
        return Choice(token, *_report(row, _peak(row, position), token, self.sampling.logprobs))

    def _choose(self, row: _Row, peak: int, history: History, position: int) -> Choice:
        if self.sampling.is_greedy:
            token = self._warped(row, peak, history, position)[1]
        else:
            token = _invert(self._law(row, peak, history, position), self.streams.uniform(position))
        if self.sampling.logprobs is None:
            return Choice(token, None, ())
        return Choice(token, *_report(row, peak, token, self.sampling.logprobs))

    def _warped(self, row: _Row, peak: int, history: History, position: int) -> tuple[_Row, int]:
        """The logits after bias, penalties and guide, and where they are largest."""
        allowed = None if self._guide is None else self._guide.allowed(history.generated)
        if self._bias is None and not self.sampling.has_penalties and allowed is None:
            return row, peak
        row = row.copy()
        if self._bias is not None:
            self._bias.apply(row)
        if self.sampling.has_penalties:
            penalise(
                row,
                history,
                repetition=self.sampling.repetition_penalty,
                presence=self.sampling.presence_penalty,
                frequency=self.sampling.frequency_penalty,
            )
        if allowed is not None:
            row[~allowed] = -np.inf
        peak = int(row.argmax())
        if row[peak] == -np.inf:
            what = "Bias and penalties" if allowed is None else "Bias, penalties and the constraint"
            raise ConfigError(f"{what} leave no possible token at position {position}. Ban fewer tokens.")
        return row, peak

    def _law(self, row: _Row, peak: int, history: History, position: int) -> _Row:
        row, peak = self._warped(row, peak, history, position)
        law = np.zeros_like(row)
        if self.sampling.is_greedy:
            law[peak] = 1
            return law
        with np.errstate(over="ignore", under="ignore"):
            scores = _scores(row, peak, self.sampling.temperature)
            kept = kept_tokens(
                scores, top_k=self.sampling.top_k, top_p=self.sampling.top_p, min_p=self.sampling.min_p
            )
            weights = np.exp(scores if kept is None else scores[kept])
            weights /= float(weights.sum(dtype=np.float64))
        if kept is None:
            return weights
        law[kept] = weights
        return law


def choose_many(
    logits: Tensor, samplers: Sequence[Sampler], histories: Sequence[History], positions: Sequence[int]
) -> list[Choice]:
    """Choose one token for each row: the same choices, bit for bit, as `Sampler.choose` row by row.

    Args:
        logits: raw logits, (B, V), floating.
        samplers: one for each row, each of vocabulary V; so are `histories` and `positions`.

    Raises:
        ConfigError: the lengths differ, or as `Sampler.choose` for the first row that is wrong.
        PlaitError: as `Sampler.choose`.
    """
    lengths = {len(samplers), len(histories), len(positions)}
    if logits.ndim != 2 or lengths != {len(logits)}:
        raise ConfigError(
            f"choose_many takes (B, V) logits and B samplers, histories and positions. Got shape"
            f" {tuple(logits.shape)} and {len(samplers)}, {len(histories)} and {len(positions)}."
        )
    if not samplers:
        return []
    rows = _host(logits)
    for sampler in samplers:
        _check_width(rows, sampler.vocab_size)
    peaks = rows.argmax(axis=1).tolist()
    choices = []
    for row, peak, sampler, history, position in zip(
        rows, peaks, samplers, histories, positions, strict=True
    ):
        _check_peak(row, peak, position)
        choices.append(sampler._choose(row, peak, history, position))
    return choices


def draw(law: Tensor, uniform: float) -> int:
    """The token at `uniform` of the law's cumulative distribution; never one of zero probability.

    Args:
        law: non-negative weights, (V,), of any positive finite sum.
        uniform: in [0, 1).

    Raises:
        ConfigError: `uniform` is outside [0, 1), or the law has no positive finite sum.
    """
    if not 0 <= uniform < 1:
        raise ConfigError(f"A draw needs a uniform in [0, 1). Got {uniform}.")
    if law.ndim != 1 or not len(law):
        raise ConfigError(f"A law has one dimension, the vocabulary. Got shape {tuple(law.shape)}.")
    return _invert(_host(law), uniform)


def _invert(law: _Row, uniform: float) -> int:
    # Two levels: only one block's running sum is needed, not the whole vocabulary's.
    blocks = np.add.reduceat(law, np.arange(0, len(law), _DRAW_BLOCK), dtype=np.float64)
    until = np.cumsum(blocks)
    total = float(until[-1])
    if not 0 < total < math.inf:
        raise ConfigError(f"A law must have a positive finite sum. Got {total}.")
    target = uniform * total
    block = _first_above(until, target)
    inside = law[block * _DRAW_BLOCK : (block + 1) * _DRAW_BLOCK]
    before = float(until[block - 1]) if block else 0.0
    return block * _DRAW_BLOCK + _first_above(np.cumsum(inside, dtype=np.float64), target - before)


def _first_above(until: npt.NDArray[np.float64], target: float) -> int:
    """First index whose running sum exceeds the target; the last that adds anything if rounding left none."""
    index = int(np.searchsorted(until, target, side="right"))
    return index if index < len(until) else int(np.searchsorted(until, until[-1], side="left"))


def _host(values: Tensor) -> _Row:
    if not values.is_floating_point():
        raise ConfigError(f"Logits must be floating-point numbers. Got {values.dtype}.")
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    row: _Row = np.ascontiguousarray(values.detach().to("cpu", dtype).numpy())
    return row


def _row(values: Tensor, vocab_size: int) -> _Row:
    if values.ndim != 1:
        raise ConfigError(f"Logits of one position have one dimension. Got shape {tuple(values.shape)}.")
    row = _host(values)
    _check_width(row, vocab_size)
    return row


def _check_width(rows: _Row, vocab_size: int) -> None:
    if rows.shape[-1] != vocab_size:
        raise ConfigError(
            f"This sampler takes {vocab_size} logits. Got {rows.shape[-1]}; bind it to the model's vocabulary."
        )


def _peak(row: _Row, position: int) -> int:
    peak = int(row.argmax())
    _check_peak(row, peak, position)
    return peak


def _check_peak(row: _Row, peak: int, position: int) -> None:
    # numpy's argmax stops at the first NaN, so one look at the peak is enough.
    if math.isnan(row[peak]):
        raise PlaitError(
            f"The logits at position {position} are not numbers (NaN at token {peak}). The weights may be"
            " damaged or a computation overflowed; check the model file."
        )
    if row[peak] == -np.inf:
        raise PlaitError(f"All logits at position {position} are -inf, so no token can be chosen.")


def _scores(row: _Row, peak: int, temperature: float) -> _Row:
    """Log-probabilities up to a constant, (V,), with largest value 0."""
    if row[peak] == np.inf:
        return np.where(row == np.inf, row.dtype.type(0), row.dtype.type(-np.inf))
    # A temperature that the dtype rounds to 0 would make 0 / 0 of the peak.
    scores: _Row = (row - row[peak]) / max(temperature, float(np.finfo(row.dtype).tiny))
    return scores


def _report(row: _Row, peak: int, token: int, count: int) -> tuple[float, tuple[Alternative, ...]]:
    with np.errstate(over="ignore", under="ignore"):
        scores = _scores(row, peak, 1.0)
        log_sum = math.log(float(np.exp(scores).sum(dtype=np.float64)))
    alternatives: list[Alternative] = []
    if count:
        candidates = largest(row, min(count, len(row)))
        best = candidates[np.argsort(-row[candidates], kind="stable")][:count]
        alternatives = [
            Alternative(int(each), float(scores[each]) - log_sum) for each in best if scores[each] > -np.inf
        ]
    return float(scores[token]) - log_sum, tuple(alternatives)
