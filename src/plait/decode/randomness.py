"""Random numbers that are a pure function of their key, so no draw depends on batching or timing.

Generator: Philox4x64 with 10 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"),
as implemented by numpy. It is integer arithmetic, so the bits are the same on every platform.

    key      (seed, branch)                         two 64-bit words
    counter  (block, position, round, purpose)      four 64-bit words; each block gives four words

`block` counts the numbers of one call, so no call can run into the numbers of another key. `purpose` is
a short lower-case name whose letters are the bytes of its word: two names never share a number.
"""

from __future__ import annotations

import functools
import secrets
from typing import Any

import numpy as np
import numpy.typing as npt

from plait.errors import ConfigError

__all__ = ["Streams"]

_WORDS = 2**64


class Streams:
    """All the random numbers of one generated sequence.

    Each number belongs to a key (position, round, purpose) and is always the same for that key. Use a
    key once: two decisions that share a uniform are not independent. Holds no state that changes, so it
    may be shared between threads.

    Args:
        seed: in [0, 2**64); None takes a fresh one from the operating system, kept in `seed`.
        branch: tells apart sequences of one seed, such as the forks of a session; in [0, 2**64).

    Raises:
        ConfigError: a number is outside its range.
    """

    def __init__(self, seed: int | None = None, *, branch: int = 0) -> None:
        self.seed = secrets.randbits(64) if seed is None else _word("seed", seed)
        self.branch = _word("branch", branch)

    def __repr__(self) -> str:
        return f"Streams({self.seed}, branch={self.branch})"

    def uniform(self, position: int, round: int = 0, purpose: str = "verify") -> float:
        """A number in [0, 1), a multiple of 2**-53.

        Args:
            position: absolute position of the token that is being settled, or a running call number.
            round: tells apart several numbers for one position and purpose.
            purpose: one to eight lower-case letters.

        Raises:
            ConfigError: a part of the key is outside its range.
        """
        return float(self.uniforms(1, position, round, purpose)[0])

    def uniforms(
        self, count: int, position: int, round: int = 0, purpose: str = "verify"
    ) -> npt.NDArray[np.float64]:
        """`count` numbers in [0, 1) that belong to one key, (count,); the first is `uniform` of that key."""
        bits = self._words(count, position, round, purpose) >> np.uint64(11)
        return bits.astype(np.float64) * 2.0**-53

    def gumbel(
        self, count: int, position: int, round: int = 0, purpose: str = "draft"
    ) -> npt.NDArray[np.float64]:
        """`count` finite standard Gumbel numbers that belong to one key, (count,).

        The largest of `log_law + gumbel` is a draw from the law, and the largest k are k draws without
        replacement, in the order of drawing. The same key gives the same bits as `uniforms`: do not use both.
        """
        # 52 bits and a half lie strictly inside (0, 1) and are exact in float64, so both logarithms are finite.
        bits = self._words(count, position, round, purpose) >> np.uint64(12)
        inside: npt.NDArray[np.float64] = (bits.astype(np.float64) + 0.5) * 2.0**-52
        return -np.log(-np.log(inside))

    def _words(self, count: int, position: int, round: int, purpose: str) -> npt.NDArray[np.uint64]:
        counter = (0, _word("position", position), _word("round", round), _purpose_word(purpose))
        philox = np.random.Philox(
            key=np.array((self.seed, self.branch), dtype=np.uint64),
            counter=np.array(counter, dtype=np.uint64),
        )
        words: npt.NDArray[np.uint64] = philox.random_raw(count)
        return words


def _word(what: str, value: Any) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise ConfigError(f"A random stream's {what} must be a whole number. Got {value!r}.")
    if not 0 <= value < _WORDS:
        raise ConfigError(f"A random stream's {what} must be in [0, {_WORDS - 1}]. Got {value}.")
    return int(value)


@functools.cache
def _purpose_word(purpose: str) -> int:
    if not (purpose.isascii() and purpose.isalpha() and purpose.islower() and len(purpose) <= 8):
        raise ConfigError(f"A purpose must be one to eight lower-case letters. Got {purpose!r}.")
    return int.from_bytes(purpose.encode("ascii"), "little")
