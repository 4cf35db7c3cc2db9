"""Drafting and checking on two devices, event by event: how many tokens a second each way of taking turns gives.

Events carry the time at which they happen and are handled in its order. Times are in units of one pass of the
draft; what is accepted comes from a trace of real decisions, or from chance.

Sources: Leviathan et al. 2023, arXiv:2211.17192 (taking turns); Liu et al. 2024, arXiv:2408.11850 (at the same time).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from itertools import count

__all__ = [
    "Events",
    "chain_tokens_per_step",
    "decisions_from",
    "pearl_tokens_per_step",
    "simulate_chain",
    "simulate_pearl",
]

# What decides whether the next guess is right.
Decide = Callable[[], bool]


class Events:
    """What happens next: actions by the time at which they are due, equal times in the order of asking.

    Attributes:
        now: the time of the last action that was run.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def after(self, delay: float, action: Callable[[], None]) -> None:
        """Run an action `delay` from now, which is 0 or more."""
        assert delay >= 0
        heapq.heappush(self._due, (self.now + delay, next(self._order), action))

    def run(self, until: Callable[[], bool]) -> None:
        """Run actions until that is so, or nothing is left."""
        while self._due and not until():
            self.now, _, action = heapq.heappop(self._due)
            action()


def decisions_from(runs: Sequence[int]) -> Iterator[bool]:
    """Decisions, for ever, as they fell in a measurement: each run is so many right guesses, then a wrong one.

    Args:
        runs: at least one, each 0 or more.
    """
    while True:
        for length in runs:
            yield from [True] * length
            yield False


def simulate_chain(decide: Decide, gamma: int, ratio: float, tokens: int) -> float:
    """Time for so many tokens when drafting and checking take turns.

    Args:
        decide: whether the next guess is right.
        gamma: guesses of each turn, at least 1.
        ratio: time of a pass of the model, in passes of the draft.
        tokens: when to stop.
    """
    events, emitted = Events(), 0

    def drafted() -> None:
        events.after(ratio, checked)

    def checked() -> None:
        nonlocal emitted
        right = 0
        while right < gamma and decide():
            right += 1
        emitted += right + 1
        events.after(gamma, drafted)

    events.after(gamma, drafted)
    events.run(lambda: emitted >= tokens)
    return events.now * tokens / emitted


def simulate_pearl(decide: Decide, gamma: int, ratio: float, tokens: int) -> float:
    """Time for so many tokens when both devices work at the same time; arguments as of `simulate_chain`.

    Each step starts a pass of the model over what waits and `gamma` passes of the draft, and is over when both are.
    """
    events, emitted, window, working = Events(), 0, 0, 0

    def begin() -> None:
        nonlocal working
        working = 2
        events.after(ratio, ended)
        events.after(gamma, ended)

    def ended() -> None:
        nonlocal emitted, window, working
        working -= 1
        if working:
            return
        # The guesses that wait, and the first of those that were drafted meanwhile.
        for _ in range(window + 1):
            emitted += 1
            if not decide():
                window = 0
                break
        else:
            window = gamma - 1
        begin()

    begin()
    events.run(lambda: emitted >= tokens)
    return events.now * tokens / emitted


def chain_tokens_per_step(acceptance: float, gamma: int) -> float:
    """Expected tokens of a turn where each guess is right with the same chance, below 1."""
    return (1 - acceptance ** (gamma + 1)) / (1 - acceptance)


def pearl_tokens_per_step(acceptance: float, gamma: int) -> float:
    """Expected tokens of a step of PEARL, likewise: the stationary law of windows that wait and that do not."""
    whole = acceptance**gamma
    return (1 - whole) / ((1 - acceptance) * (1 - whole + acceptance))
