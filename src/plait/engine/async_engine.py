"""The engine for many callers: one worker thread that steps, and an asyncio front."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self

from plait.engine.engine import Engine
from plait.engine.metrics import Metrics
from plait.engine.request import Generation, Piece, Request
from plait.engine.sequence import RunningSequence
from plait.errors import CancelledError, CapacityError, ConfigError
from plait.memory import Past

__all__ = ["AsyncEngine", "Stream"]


class _Answer:
    """What the worker and a stream both hold of one request; the stream itself only its caller holds."""

    def __init__(self, request: Request, past: Past | None) -> None:
        self.request = request
        self.past = past
        self.released = asyncio.Event()
        self.arrived: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self.generation: Generation | None = None
        self.is_cancelled = False
        self.sequence: RunningSequence | None = None


class Stream(AsyncIterator[Piece]):
    """The answer to one request, piece by piece as it comes.

    Cancelling the task that waits for a piece, `cancel`, leaving `async with`, and forgetting the stream all
    cancel the request, which frees what it remembered before the next step. The last piece has a
    `finish_reason`.
    """

    def __init__(self, answer: _Answer, cancel: Callable[[_Answer], None]) -> None:
        self._answer = answer
        self._cancel = cancel
        self._is_over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        """The next piece.

        Raises:
            StopAsyncIteration: the answer is complete, or was cancelled by its caller.
            PlaitError: what made this request fail.
        """
        if self._is_over:
            raise StopAsyncIteration
        try:
            arrived = await self._answer.arrived.get()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if isinstance(arrived, Exception):
            self._is_over = True
            raise arrived
        self._is_over = arrived.finish_reason is not None
        return arrived

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Cancel the request if it is not finished; nothing more is yielded. Any thread may call it."""
        if not self._is_over:
            self._is_over = True
            self._cancel(self._answer)

    async def aclose(self) -> None:
        """Cancel the request if it is not finished, and wait until the engine has let go of its past."""
        self.cancel()
        await self._answer.released.wait()

    async def result(self) -> Generation:
        """The whole answer, once it is there; pieces that were not taken are skipped.

        Raises:
            CancelledError: the caller cancelled the request before it was finished.
            PlaitError: what made this request fail.
        """
        async for _ in self:
            pass
        if self._answer.generation is None:
            raise CancelledError("The request was cancelled before it finished.")
        return self._answer.generation


class AsyncEngine:
    """Many requests from one event loop, answered together by an engine in a thread of its own.

    Example:
        >>> async with AsyncEngine(lm.new_engine(memory_bytes=2**30)) as engine:  # doctest: +SKIP
        ...     async for piece in engine.submit(lm.request(lm.encode("Once upon a time"))):
        ...         print(piece.text, end="")

    Args:
        engine: used by nobody else from now on.
        max_requests: most unfinished requests of one tenant, the running ones included.

    Raises:
        ConfigError: `max_requests` is below 1.
    """

    def __init__(self, engine: Engine, *, max_requests: int = 256) -> None:
        if max_requests < 1:
            raise ConfigError(f"AsyncEngine.max_requests must be at least 1. Got {max_requests}.")
        self.max_requests = max_requests
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_open = False
        # What the worker does between two steps, and None to stop. A destructor may add to it at any time.
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # The worker's own: the answers that are being made.
        self._answers: dict[RunningSequence, _Answer] = {}
        # The event loop's own: unfinished requests of each tenant.
        self._unfinished: Counter[str] = Counter()
        self._all_finished = asyncio.Event()
        self._all_finished.set()

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(drain=kind is None)

    @property
    def is_open(self) -> bool:
        """Whether requests are taken, and somebody answers them."""
        return self._is_open and self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Take requests from the running event loop from now on.

        Raises:
            ConfigError: it was started before.
        """
        if self._thread is not None:
            raise ConfigError("This AsyncEngine was started before. Make a new one.")
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="plait-engine", daemon=True)
        self._is_open = True
        self._thread.start()

    def submit(self, request: Request, past: Past | None = None) -> Stream:
        """Queue a request.

        Args:
            request: what to continue.
            past: the caller's own; see `Engine.submit`. Nobody else may use it until the answer is complete or
                `Stream.aclose` has returned.

        Raises:
            ConfigError: the request is not one for this model; see `Engine.check`.
            CapacityError: it could never fit, its tenant has `max_requests` unfinished ones, or the engine is
                closed.
        """
        if not self._is_open:
            raise CapacityError("The engine takes no requests: it is closed, or was not started.")
        self._engine.check(request)
        if self._unfinished[request.tenant] >= self.max_requests:
            raise CapacityError(
                f"{self._unfinished[request.tenant]} requests are waiting or running; at most {self.max_requests} "
                "may be. Try again when some are finished."
            )
        self._unfinished[request.tenant] += 1
        self._all_finished.clear()
        answer = _Answer(request, past)
        self._orders.put(lambda: self._take(answer))
        return Stream(answer, self._cancel)

    async def metrics(self) -> Metrics:
        """What the engine does now, and what it has done; answered between two steps."""
        if self._loop is None or self._thread is None or not self._thread.is_alive():
            return self._engine.metrics
        asked: asyncio.Future[Metrics] = self._loop.create_future()
        self._orders.put(lambda: self._in_loop(_resolve, asked, self._engine.metrics))
        return await asked

    async def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, finish those that there are, and end the thread.

        Args:
            drain: whether unfinished requests are finished; else they are cancelled.
            timeout: seconds after which the rest is cancelled all the same; None for no limit.
        """
        self._is_open = False
        if self._thread is None:
            return
        try:
            if drain:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._all_finished.wait(), timeout)
        finally:
            self._orders.put(self._cancel_all)
            self._orders.put(None)
        await asyncio.to_thread(self._thread.join)
        # Whoever asked while the thread was ending is answered here.
        with contextlib.suppress(queue.Empty):
            while True:
                if (order := self._orders.get_nowait()) is not None:
                    order()

    # What follows runs in the worker thread, but for `_cancel`, `_deliver` and `_resolve`.

    def _work(self) -> None:
        while self._obey():
            try:
                pieces = self._engine.advance()
            except Exception as error:  # noqa: BLE001 - every caller is told, and the next request works
                for sequence, answer in list(self._answers.items()):
                    self._engine.cancel(sequence)
                    self._send(answer, error)
                continue
            for sequence, piece in pieces:
                self._send(self._answers[sequence], sequence.error or piece)

    def _obey(self) -> bool:
        """Carry out what was ordered, waiting for an order if there is nothing else to do; False to stop."""
        # Orders that come meanwhile have to wait for a step, so that no flood of them stops the engine.
        for _ in range(max(self._orders.qsize(), int(self._engine.is_idle))):
            order = self._orders.get()
            if order is None:
                return False
            order()
        return True

    def _take(self, answer: _Answer) -> None:
        if answer.is_cancelled:
            self._in_loop(self._deliver, answer, None)
            return
        try:
            answer.sequence = self._engine.submit(answer.request, answer.past)
        except Exception as error:  # noqa: BLE001 - the caller is told
            self._in_loop(self._deliver, answer, error)
        else:
            self._answers[answer.sequence] = answer

    def _stop(self, answer: _Answer) -> None:
        if answer.sequence is not None and not answer.sequence.is_finished:
            self._send(answer, self._engine.cancel(answer.sequence))

    def _cancel_all(self) -> None:
        for answer in list(self._answers.values()):
            self._stop(answer)

    def _send(self, answer: _Answer, arrived: Piece | Exception) -> None:
        assert answer.sequence is not None
        if answer.sequence.is_finished:
            del self._answers[answer.sequence]
            if not answer.is_cancelled:
                answer.generation = answer.sequence.result()
        self._in_loop(self._deliver, answer, arrived)

    def _in_loop(self, call: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        # A loop that is closed has nobody who waits.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *arguments)

    def _cancel(self, answer: _Answer) -> None:
        answer.is_cancelled = True
        self._orders.put(lambda: self._stop(answer))

    def _deliver(self, answer: _Answer, arrived: Piece | Exception | None) -> None:
        if arrived is not None:
            answer.arrived.put_nowait(arrived)
        if not isinstance(arrived, Piece) or arrived.finish_reason is not None:
            answer.released.set()
            self._unfinished[answer.request.tenant] -= 1
            self._unfinished += Counter()
            if not self._unfinished:
                self._all_finished.set()


def _resolve(future: asyncio.Future[Metrics], metrics: Metrics) -> None:
    if not future.done():
        future.set_result(metrics)
