"""Numbers for Prometheus: the engine's own, and what clients waited for."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from plait.engine import Generation, Metrics

__all__ = ["ServeMetrics"]

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class ServeMetrics:
    """What a server counts.

    Args:
        memory: spec string of the memory, which labels bytes.
        draft: spec string of the draft, which labels guesses.
    """

    def __init__(self, memory: str, draft: str) -> None:
        self.memory, self.draft = memory, draft
        self.of_engine = Metrics()
        self.session_count, self.session_bytes = 0, 0
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._answers = Counter(
            "plait_answers", "Answers by how they ended.", ["finish_reason"], registry=self.registry
        )
        self._prompt = Counter("plait_prompt_tokens", "Tokens of prompts answered.", registry=self.registry)
        self._new = Counter("plait_new_tokens", "Tokens generated.", registry=self.registry)
        self._first = Histogram(
            "plait_first_token_seconds", "Time to the first token.", buckets=_FIRST, registry=self.registry
        )
        self._each = Histogram(
            "plait_token_seconds", "Time of each further token.", buckets=_EACH, registry=self.registry
        )

    def finished(self, generation: Generation) -> None:
        """Count an answer."""
        self._answers.labels(generation.finish_reason).inc()
        self._prompt.inc(generation.prompt_tokens)
        self._new.inc(len(generation.tokens))
        self._first.observe(generation.seconds_to_first_token)
        if len(generation.tokens) > 1:
            rest = generation.seconds - generation.seconds_to_first_token
            self._each.observe(rest / (len(generation.tokens) - 1))

    def cancelled(self, count: int) -> None:
        """Count answers that nobody waited for, or that failed."""
        self._answers.labels("cancelled").inc(count)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """The engine's numbers, as the registry asks for them."""
        now = self.of_engine
        for name, help, value in (
            ("plait_waiting_requests", "Sequences without a place.", now.waiting),
            ("plait_running_requests", "Sequences with a place.", now.running),
            ("plait_sessions", "Open sessions.", self.session_count),
            ("plait_session_bytes", "Bytes that sessions remember.", self.session_bytes),
        ):
            yield GaugeMetricFamily(name, help, value=value)
        kept = GaugeMetricFamily(
            "plait_memory_bytes",
            "Bytes of keys, values and states, by the memory.",
            labels=["memory", "part"],
        )
        kept.add_metric([self.memory, "shared"], now.prefix_bytes)
        kept.add_metric([self.memory, "own"], now.memory_bytes - now.prefix_bytes)
        yield kept
        for name, help, value in (
            ("plait_steps", "Forward passes.", now.steps),
            ("plait_rows", "Rows fed.", now.rows),
            ("plait_starts", "Times that a sequence began to read.", now.starts),
            ("plait_prefix_hits", "How many of these began with something remembered.", now.hits),
            ("plait_begun_tokens", "Tokens of sequences when they began.", now.tokens),
            ("plait_shared_tokens", "How many of these were remembered already.", now.shared_tokens),
            ("plait_preemptions", "Times that a sequence gave its past back.", now.preemptions),
        ):
            yield CounterMetricFamily(name, help, value=value)
        for name, help, value in (
            ("plait_proposed_tokens", "Tokens that drafts guessed.", now.proposed),
            ("plait_accepted_tokens", "How many of these were accepted.", now.accepted),
        ):
            family = CounterMetricFamily(name, help, labels=["draft"])
            family.add_metric([self.draft], value)
            yield family
