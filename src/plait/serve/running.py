"""One request of a client while it is answered: its sequences, their places in the limits, their pieces."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING

from plait.engine import Generation, Piece, Request, Stream
from plait.memory import Past
from plait.serve.errors import HTTPError
from plait.serve.settings import Settings

if TYPE_CHECKING:
    from plait.serve.service import Service

__all__ = ["Admission", "Running"]


class Admission:
    """Counts unfinished sequences of each tenant, and refuses what goes over the limits.

    Args:
        settings: `max_requests` and `max_requests_per_key`.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.unfinished: Counter[str] = Counter()
        # Seconds of an answer, as a running mean, from which clients are told when to come again.
        self.mean_seconds = 1.0

    def take(self, tenant: str, count: int) -> None:
        """Make room for sequences.

        Raises:
            HTTPError: 429, there is none; with the seconds after which there may be.
        """
        own, most_own = self.unfinished[tenant], self.settings.max_requests_per_key
        total, most = self.unfinished.total(), self.settings.max_requests
        if own + count > most_own or total + count > most:
            over = (
                f"{own} of this key; at most {most_own}"
                if own + count > most_own
                else f"{total}; at most {most}"
            )
            raise HTTPError(
                429,
                f"Too many sequences are unfinished: {over} may be, and {count} more were asked for. Try again later.",
                code="too_many_requests",
                retry_after=max(1, min(60, round(self.mean_seconds))),
            )
        self.unfinished[tenant] += count

    def give_back(self, tenant: str, count: int = 1) -> None:
        """Note that sequences are finished."""
        self.unfinished[tenant] -= count
        self.unfinished += Counter()

    def note(self, seconds: float) -> None:
        """Learn how long an answer took."""
        self.mean_seconds += 0.1 * (seconds - self.mean_seconds)


class Running:
    """The sequences of one request. Close it in any case.

    Args:
        service: of the server.
        requests: one for each sequence, all of one tenant.
        past: the caller's own, for a single sequence; nobody uses it until this is closed.

    Raises:
        HTTPError: over the limits, or the server is ending.
        ConfigError, CapacityError: the engine cannot answer one of them; none was queued.
    """

    def __init__(self, service: Service, requests: Sequence[Request], past: Past | None = None) -> None:
        self.service = service
        self.tenant = requests[0].tenant
        for request in requests:
            service.lm_engine.check(request)
        service.admission.take(self.tenant, len(requests))
        self.open = len(requests)
        self.streams: list[Stream] = []
        try:
            self.streams += [service.engine.submit(request, past) for request in requests]
        except BaseException:
            service.admission.give_back(self.tenant, self.open)
            for stream in self.streams:
                stream.cancel()
            raise

    async def results(self) -> list[Generation]:
        """All answers, in order."""
        return [await self._finish(stream) for stream in self.streams]

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of all sequences as they come, each with the number of its sequence."""
        if len(self.streams) == 1:
            async for piece in self.streams[0]:
                yield 0, piece
            await self._finish(self.streams[0])
            return
        arrived: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()

        async def pump(index: int, stream: Stream) -> None:
            try:
                async for piece in stream:
                    arrived.put_nowait((index, piece))
                await self._finish(stream)
            except Exception as error:  # noqa: BLE001 - it is raised where the pieces are read
                arrived.put_nowait((index, error))
            else:
                arrived.put_nowait((index, None))

        tasks = [asyncio.ensure_future(pump(index, stream)) for index, stream in enumerate(self.streams)]
        try:
            left = len(tasks)
            while left:
                index, came = await arrived.get()
                if isinstance(came, Exception):
                    raise came
                if came is None:
                    left -= 1
                else:
                    yield index, came
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """Cancel what is not finished, and wait until the engine has let go of it."""
        open_now, self.open = self.open, 0
        # Cancelled twice, it still waits: a past must not be used while the engine may write to it.
        await asyncio.shield(asyncio.gather(*(stream.aclose() for stream in self.streams)))
        if open_now:
            self.service.metrics.cancelled(open_now)
            self.service.admission.give_back(self.tenant, open_now)

    async def _finish(self, stream: Stream) -> Generation:
        generation = await stream.result()
        if self.open:
            self.open -= 1
            self.service.admission.give_back(self.tenant)
            self.service.admission.note(generation.seconds)
            self.service.metrics.finished(generation)
        return generation
