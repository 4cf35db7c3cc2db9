"""What the routes share: model, engine, limits, sessions, and the thread for work beside the engine."""

from __future__ import annotations

import asyncio
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from plait.decode import Constraint
from plait.engine import AsyncEngine, LanguageModel, Request
from plait.errors import ConfigError
from plait.serve.errors import HTTPError
from plait.serve.json_schema import Grammars
from plait.serve.keys import Keys
from plait.serve.metrics import ServeMetrics
from plait.serve.running import Admission
from plait.serve.schema import GenerationOptions, JSONObjectFormat, JSONSchemaFormat
from plait.serve.sessions import Sessions
from plait.serve.settings import Settings

if TYPE_CHECKING:
    from plait.text.words import Lexicon

__all__ = ["Service"]

T = TypeVar("T")

# Texts above this many characters are tokenised in a thread, so that the event loop goes on.
_SHORT_TEXT = 4096
# Jobs of one key that may wait for the thread beside the engine.
_JOBS = 8


class Service:
    """A model behind an engine, for the routes.

    Args:
        lm: the model.
        settings: of the server.
        replica: its number, where there are several; session ids tell it.
    """

    def __init__(self, lm: LanguageModel, settings: Settings, replica: int | None = None) -> None:
        self.replica = replica
        self.lm = lm
        self.settings = settings
        self.keys = Keys(settings.api_keys)
        name = Path(lm.name)
        self.model_name = name.name if name.is_absolute() or name.exists() else lm.name
        self.created = int(time.time())
        self.lm_engine = lm.new_engine(
            memory_bytes=settings.memory_bytes or None,
            rows_per_step=settings.rows_per_step,
            max_sequences=settings.max_sequences,
        )
        self.engine = AsyncEngine(self.lm_engine, max_requests=settings.max_requests)
        self.admission = Admission(settings)
        self.metrics = ServeMetrics(str(lm.plan), str(lm.draft))
        self.sessions = Sessions(self)
        self._lexicon = _read_lexicon(settings) if settings.watermark else None
        self._grammars: Grammars | None = None
        self._grammars_lock = threading.Lock()
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="plait-beside")
        self._jobs: Counter[str] = Counter()

    async def start(self) -> None:
        """Begin to answer."""
        self.engine.start()
        self.sessions.start()

    async def close(self) -> None:
        """Cancel what is unfinished, and free everything."""
        await self.sessions.close()
        await self.engine.close(drain=False)
        self._beside.shutdown(cancel_futures=True)

    def tenant_for_sharing(self, tenant: str) -> str:
        """On whose behalf the engine answers: that of the key, unless keys share."""
        return "" if self.settings.share_across_keys else tenant

    async def beside(self, tenant: str, work: Callable[[], T]) -> T:
        """Run work in the one thread beside the engine, so that others get at least half of the machine.

        Raises:
            HTTPError: 429, too many jobs of this key wait.
        """
        if self._jobs[tenant] >= _JOBS:
            raise HTTPError(
                429, f"{_JOBS} jobs of this key are waiting; at most as many may be.", retry_after=1
            )
        self._jobs[tenant] += 1
        try:
            # Work that has begun goes on to its end, so whoever waits must wait for that too.
            return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._beside, work))
        finally:
            self._jobs[tenant] -= 1
            self._jobs += Counter()

    async def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of a text."""
        if len(text) <= _SHORT_TEXT:
            return self.lm.tokenizer.encode(text, add_special=add_special)
        return await asyncio.to_thread(self.lm.tokenizer.encode, text, add_special=add_special)

    async def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation. Its template runs in a process of its own, so this waits in a thread."""
        return await asyncio.to_thread(self.lm.encode_chat, messages)

    def check_model(self, name: str) -> None:
        """Raise 404 for another model than the one that is loaded."""
        if name not in (self.model_name, self.lm.name):
            raise HTTPError(
                404,
                f"The model {name!r} is not here. This server has {self.model_name!r}.",
                param="model",
                code="model_not_found",
            )

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raise `ConfigError` for a prompt that is longer than the server lets it be."""
        longest = self.settings.max_prompt_tokens
        if longest is not None and len(prompt) > longest:
            raise ConfigError(f"A prompt has at most {longest} tokens here. Got {len(prompt)}.")

    def lexicon(self) -> Lexicon:
        """The words that a watermark replaces.

        Raises:
            ConfigError: watermarks are switched off.
        """
        if self._lexicon is None:
            raise ConfigError("Watermarks are switched off on this server. Start it with --watermark.")
        return self._lexicon

    async def constraint(self, options: GenerationOptions) -> Constraint | None:
        """What `response_format` asks for."""
        wanted = options.response_format
        if isinstance(wanted, JSONObjectFormat):
            return await asyncio.to_thread(self._compile, {"type": "object"})
        if isinstance(wanted, JSONSchemaFormat):
            return await asyncio.to_thread(self._compile, wanted.json_schema.schema_)
        return None

    def _compile(self, schema: dict[str, Any]) -> Constraint:
        with self._grammars_lock:
            if self._grammars is None:
                self._grammars = Grammars(
                    self.lm.tokenizer,
                    self.lm.model.config.vocab_size,
                    max_bytes=self.settings.max_schema_bytes,
                )
            return self._grammars.of_schema(schema)

    async def request(
        self,
        tenant: str,
        prompt: list[int],
        options: GenerationOptions,
        *,
        max_new_tokens: int | None,
        logprobs: int | None,
        constraint: Constraint | None,
        branch: int = 0,
    ) -> Request:
        """A request to the engine from what a client sent.

        Raises:
            ConfigError: over one of the server's limits, or a value that the model does not allow.
        """
        settings = self.settings
        if options.trace and not settings.trace:
            raise ConfigError("trace is switched off on this server.")
        if len(options.stops) > settings.max_stops:
            raise ConfigError(
                f"A request has at most {settings.max_stops} stop texts. Got {len(options.stops)}."
            )
        self.check_prompt(prompt)
        if max_new_tokens is None:
            room = self.lm.plan.longest(self.lm.model.config.max_positions) - len(prompt)
            max_new_tokens = max(1, min(settings.max_new_tokens, room))
        elif max_new_tokens > settings.max_new_tokens:
            raise ConfigError(
                f"An answer has at most {settings.max_new_tokens} tokens here. {max_new_tokens} were asked for."
            )
        return Request(
            prompt=prompt,
            sampling=options.sampling(logprobs),
            max_new_tokens=max_new_tokens,
            stop=options.stops,
            ignore_end=bool(options.ignore_end),
            tenant=self.tenant_for_sharing(tenant),
            branch=branch,
            constraint=constraint,
            trace=bool(options.trace),
        )

    async def status(self) -> dict[str, Any]:
        """What the playground's meters show."""
        now = await self.engine.metrics()
        self.metrics.of_engine = now
        self.metrics.session_count, self.metrics.session_bytes = self.sessions.total()
        return {
            "model": self.model_name,
            "memory": str(self.lm.plan),
            "draft": str(self.lm.draft),
            "context": self.lm.model.config.max_positions,
            "has_chat_template": self.lm.chat_template is not None,
            "trace": self.settings.trace,
            "process_bytes": _resident_bytes(),
            "sessions": self.metrics.session_count,
            "session_bytes": self.metrics.session_bytes,
            "engine": now._asdict(),
        }


def _read_lexicon(settings: Settings) -> Lexicon:
    from plait.prose import english_lexicon

    return english_lexicon(offline=settings.offline or None)


def _resident_bytes() -> int:
    """Memory of this process, in bytes: now where the system tells, else the most so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return pages * resource.getpagesize()
