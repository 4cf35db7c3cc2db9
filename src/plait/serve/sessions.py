"""Sessions of clients: texts that are read once, and continued, edited, forked and rewound."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from plait.decode import Choice
from plait.engine import Request, Session
from plait.errors import CapacityError
from plait.serve.errors import HTTPError
from plait.serve.sharing import check_sessions

if TYPE_CHECKING:
    from plait.serve.running import Running
    from plait.serve.service import Service

__all__ = ["ServedSession", "Sessions"]

T = TypeVar("T")


class ServedSession:
    """A session of one key.

    Attributes:
        lock: held while something changes the session; only one request at a time does.
    """

    def __init__(self, id: str, tenant: str, session: Session) -> None:
        self.id = id
        self.tenant = tenant
        self.session = session
        self.created = int(time.time())
        self.used = time.monotonic()
        self.lock = asyncio.Lock()

    def to_json(self, *, with_text: bool = False) -> dict[str, Any]:
        """What a client sees of it."""
        told: dict[str, Any] = {
            "id": self.id,
            "object": "session",
            "created": self.created,
            "tokens": len(self.session),
            "remembered_tokens": len(self.session.past),
            "bytes": self.session.nbytes(),
        }
        if with_text:
            told["text"] = self.session.text
        return told


class Sessions:
    """All open sessions.

    Args:
        service: of the server.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.settings = service.settings
        self._open: dict[str, ServedSession] = {}
        self._closer: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Close sessions that nobody uses, from now on."""
        self._closer = asyncio.ensure_future(self._close_unused())

    async def close(self) -> None:
        """Close all."""
        if self._closer is not None:
            self._closer.cancel()
            await asyncio.gather(self._closer, return_exceptions=True)
        for one in list(self._open.values()):
            self._close(one)

    def total(self) -> tuple[int, int]:
        """How many sessions are open, and the bytes that they remember; what forks share counts in each."""
        return len(self._open), sum(one.session.nbytes() for one in self._open.values())

    def of(self, tenant: str) -> list[ServedSession]:
        """The sessions of a key, oldest first."""
        return [one for one in self._open.values() if one.tenant == tenant]

    def find(self, tenant: str, id: str) -> ServedSession:
        """A session of this key.

        Raises:
            HTTPError: 404, there is none; those of other keys are not there either.
        """
        one = self._open.get(id)
        if one is None or one.tenant != tenant:
            raise HTTPError(404, f"There is no session {id!r}. It may have been closed.", param="session")
        one.used = time.monotonic()
        return one

    def add(self, tenant: str, sessions: list[Session]) -> list[ServedSession]:
        """Take sessions of a key.

        Raises:
            HTTPError: 429, it has too many.
        """
        self.check_count(tenant, len(sessions))
        # With several replicas the front finds the one that holds a session by its id.
        prefix = "s" if self.service.replica is None else f"s{self.service.replica}"
        added = [ServedSession(f"{prefix}-{secrets.token_hex(12)}", tenant, session) for session in sessions]
        self._open |= {one.id: one for one in added}
        return added

    def check_count(self, tenant: str, more: int) -> None:
        """Raise 429 if a key would have too many sessions."""
        check_sessions(len(self.of(tenant)), more, self.settings)

    def delete(self, one: ServedSession) -> None:
        """Close a session.

        Raises:
            HTTPError: 409, something is using it.
        """
        if one.lock.locked():
            raise _busy(one)
        self._close(one)

    @contextlib.asynccontextmanager
    async def using(self, one: ServedSession) -> AsyncGenerator[Session, None]:
        """Use a session alone.

        Raises:
            HTTPError: 409, another request uses it now.
        """
        if one.lock.locked():
            raise _busy(one)
        async with one.lock:
            try:
                yield one.session
            finally:
                one.used = time.monotonic()

    async def change(self, one: ServedSession, work: Callable[[Session], T]) -> T:
        """Let work change a session in the thread beside the engine, once all that it has read is fed.

        Raises:
            HTTPError: 409 or 429; PlaitError: what the work raises.
        """
        async with self.using(one) as session:
            await self.feed(one)
            # The lock is held until work that has begun is over, also when the client goes away.
            job = asyncio.ensure_future(self.service.beside(one.tenant, lambda: work(session)))
            try:
                return await asyncio.shield(job)
            except asyncio.CancelledError:
                await asyncio.wait({job})
                raise

    async def feed(self, one: ServedSession) -> None:
        """Let the engine read what a session has not read yet, side by side with the requests of others."""
        session = one.session
        if len(session.past) >= len(session.tokens) or not session.tokens:
            return
        if len(session.tokens) >= self._longest():
            return
        # An answer of one token makes the engine read the whole prompt, the token itself is left out.
        request = Request(prompt=list(session.tokens), max_new_tokens=1, tenant=self._tenant(one))
        running = self.run(one, request)
        try:
            await running.results()
        finally:
            await running.close()

    def run(self, one: ServedSession, request: Request) -> Running:
        """Let the engine continue a session that is used alone; `keep` takes over the answer.

        Raises:
            HTTPError: over a limit.
        """
        from plait.serve.running import Running

        session = one.session
        self.check_bytes(session.past.growth(max(0, len(request.prompt) - len(session.past))))
        return Running(self.service, [request], session.ready())

    def keep(self, one: ServedSession, choices: list[Choice]) -> None:
        """Make an answer, or as much of it as was told, part of a session."""
        one.session.keep([choice.token for choice in choices])

    def check_bytes(self, more: int) -> None:
        """Raise `CapacityError` if sessions would remember too much."""
        most = self.settings.max_session_bytes
        used = self.total()[1]
        if used + more > most:
            raise CapacityError(
                f"Sessions remember {used} bytes, this would take {more} more, and the server allows {most}. "
                "Delete a session, or shorten the text."
            )

    def _tenant(self, one: ServedSession) -> str:
        return self.service.tenant_for_sharing(one.tenant)

    def _longest(self) -> int:
        return self.service.lm.plan.longest(self.service.lm.model.config.max_positions)

    def _close(self, one: ServedSession) -> None:
        del self._open[one.id]
        one.session.close()

    async def _close_unused(self) -> None:
        while True:
            await asyncio.sleep(min(self.settings.session_seconds, 30.0))
            oldest = time.monotonic() - self.settings.session_seconds
            for one in list(self._open.values()):
                if one.used < oldest and not one.lock.locked():
                    self._close(one)


def _busy(one: ServedSession) -> HTTPError:
    return HTTPError(
        409, f"Session {one.id} is in use by another request. Wait for that to end.", code="busy"
    )
