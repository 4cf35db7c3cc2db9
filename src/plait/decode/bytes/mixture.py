"""Byte laws of several models, mixed: their vocabularies may differ, bytes do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from plait.errors import ConfigError

__all__ = ["MixtureState", "NextByte"]


class NextByte(Protocol):
    """The law of the next byte after some bytes."""

    @property
    def data(self) -> bytes:
        """The bytes so far."""

    def law(self) -> npt.NDArray[np.float64]:
        """Log-probabilities in nats, (257,)."""

    def push(self, byte: int) -> None:
        """Append a byte."""

    def fork(self) -> Self:
        """A second state at the same bytes."""


class MixtureState:
    """The mean of several laws after the same bytes.

    Args:
        states: one of each model, at the same bytes.
        weights: of each model, positive; they are divided by their sum.

    Raises:
        ConfigError: no state, another number of weights, or a weight that is not positive and finite.
    """

    def __init__(self, states: Sequence[NextByte], weights: Sequence[float]) -> None:
        if not states or len(states) != len(weights):
            raise ConfigError(
                f"A mixture needs one weight for each model. Got {len(weights)} for {len(states)}."
            )
        if not all(0 < weight < float("inf") for weight in weights):
            raise ConfigError(f"The weights of a mixture must be positive and finite. Got {list(weights)}.")
        self.states = list(states)
        self.weights = np.array(weights, dtype=np.float64) / sum(weights)

    @property
    def data(self) -> bytes:
        """The bytes so far."""
        return self.states[0].data

    def law(self) -> npt.NDArray[np.float64]:
        """Log-probabilities of the next byte and of the end, (257,) in nats."""
        laws = np.stack([state.law() for state in self.states])
        with np.errstate(divide="ignore"):
            mixed: npt.NDArray[np.float64] = np.log(self.weights @ np.exp(laws))
        return mixed

    def push(self, byte: int) -> None:
        """Append a byte to every model's text; a model that thinks it impossible leaves the mixture.

        Raises:
            ConfigError: it is no byte, or impossible to all; nothing changed.
        """
        able = [
            index
            for index, state in enumerate(self.states)
            if 0 <= byte < 256 and state.law()[byte] > -np.inf
        ]
        if not able:
            raise ConfigError(f"{byte!r} cannot follow {self.data[-16:]!r} in any of the mixed models.")
        kept = [self.states[index] for index in able]
        for state in kept:
            state.push(byte)
        self.states = kept
        self.weights = self.weights[able] / self.weights[able].sum()

    def fork(self) -> MixtureState:
        """A second state at the same bytes."""
        return MixtureState([state.fork() for state in self.states], self.weights.tolist())
