"""The asyncio front: streams, cancellation, a bounded queue, and a graceful end."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from plait.decode import Sampling
from plait.engine import AsyncEngine, Engine, LanguageModel, Request
from plait.errors import CancelledError, CapacityError, ConfigError, PlaitError
from plait.memory import Past

Make = Callable[..., LanguageModel]

LONG = 480


def ask(prompt: list[int], count: int = 12, **options: Any) -> Request:
    sampling = options.pop("sampling", Sampling(temperature=0.0))
    return Request(prompt=prompt, max_new_tokens=count, sampling=sampling, ignore_end=True, **options)


def alone(lm: LanguageModel, request: Request) -> tuple[int, ...]:
    engine = lm.new_engine()
    sequence = engine.submit(request)
    for _ in engine.run():
        pass
    return sequence.result().tokens


async def until(condition: Callable[[], bool] | Callable[[], Awaitable[bool]]) -> None:
    """Wait, at most ten seconds, until something holds."""
    for _ in range(1000):
        held = condition()
        if held if isinstance(held, bool) else await held:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("waited for ten seconds")


async def is_empty(engine: AsyncEngine) -> bool:
    metrics = await engine.metrics()
    return metrics.waiting + metrics.running + metrics.memory_bytes == 0


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "plait-engine"]


def test_streams_side_by_side_give_what_each_gives_alone(make_small: Make) -> None:
    lm = make_small()
    requests = [ask([i + 1, 2, 3], 8 + i, sampling=Sampling(temperature=0.8, seed=i)) for i in range(12)]

    async def read(engine: AsyncEngine, request: Request) -> tuple[str, tuple[int, ...]]:
        text, tokens, last = "", [], None
        stream = engine.submit(request)
        async for piece in stream:
            text, last = text + piece.text, piece.finish_reason
            tokens += [choice.token for choice in piece.choices]
        generation = await stream.result()
        assert last == generation.finish_reason == "length"
        assert (generation.text, generation.tokens) == (text, tuple(tokens))
        return text, tuple(tokens)

    async def main() -> list[tuple[str, tuple[int, ...]]]:
        async with AsyncEngine(lm.new_engine(max_sequences=5)) as engine:
            return await asyncio.gather(*(read(engine, request) for request in requests))

    assert [tokens for _, tokens in asyncio.run(main())] == [alone(lm, request) for request in requests]
    assert not engine_threads()


@pytest.mark.parametrize("way", ["task", "leave", "forget", "call"])
def test_every_way_to_go_away_frees_what_was_remembered(make_small: Make, way: str) -> None:
    lm = make_small()

    async def consume(engine: AsyncEngine, begun: asyncio.Event) -> None:
        async for _ in engine.submit(ask([1, 2], LONG)):
            begun.set()

    async def main() -> None:
        async with AsyncEngine(lm.new_engine()) as engine:
            if way == "task":
                begun = asyncio.Event()
                task = asyncio.create_task(consume(engine, begun))
                await begun.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            elif way == "leave":
                async with engine.submit(ask([1, 2], LONG)) as stream:
                    await anext(stream)
            elif way == "forget":
                stream = engine.submit(ask([1, 2], LONG))
                await anext(stream)
                del stream
                gc.collect()
            else:
                stream = engine.submit(ask([1, 2], LONG))
                await anext(stream)
                stream.cancel()
                with pytest.raises(CancelledError):
                    await stream.result()
            steps = (await engine.metrics()).steps
            await until(lambda: is_empty(engine))
            # It ended because it was cancelled: the whole answer would have taken many more steps.
            assert steps < LONG - 50
            assert (await engine.submit(ask([3], 2)).result()).tokens == alone(lm, ask([3], 2))
            assert not engine._answers
            assert not engine._unfinished

    asyncio.run(main())


def test_a_full_queue_refuses_with_the_numbers_and_other_tenants_get_in(make_small: Make) -> None:
    lm = make_small()

    async def main() -> None:
        async with AsyncEngine(lm.new_engine(max_sequences=1), max_requests=3) as engine:
            streams = [engine.submit(ask([i + 1], 20, tenant="anna")) for i in range(3)]
            with pytest.raises(CapacityError, match=r"3 requests.*at most 3"):
                engine.submit(ask([9], tenant="anna"))
            other = engine.submit(ask([9], 2, tenant="bert"))
            await other.result()
            for stream in streams:
                await stream.result()
            await engine.submit(ask([9], 2, tenant="anna")).result()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("request_", "error"),
    [(ask([999]), ConfigError), (ask([1] * 600), CapacityError), (ask([1] * 100, 300), CapacityError)],
)
def test_a_request_that_cannot_be_is_refused_at_once(
    make_small: Make, request_: Request, error: type[PlaitError]
) -> None:
    lm = make_small()

    async def main() -> None:
        async with AsyncEngine(lm.new_engine(memory_bytes=100_000)) as engine:
            with pytest.raises(error):
                engine.submit(request_)
            assert (await engine.submit(ask([3], 2)).result()).tokens == alone(lm, ask([3], 2))

    asyncio.run(main())


def test_a_request_that_fails_tells_its_caller_and_nobody_else(
    make_small: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_small()
    submit = Engine.submit

    def marked(engine: Engine, request: Request, past: Past | None = None) -> Any:
        sequence = submit(engine, request, past)
        if request.prompt[0] == 13:
            monkeypatch.setattr(sequence.sampler, "choose", _broken)
        return sequence

    monkeypatch.setattr(Engine, "submit", marked)

    async def main() -> None:
        async with AsyncEngine(lm.new_engine()) as engine:
            good, bad = engine.submit(ask([1, 2], 30)), engine.submit(ask([13, 2], 30))
            with pytest.raises(PlaitError, match="broken"):
                await bad.result()
            assert (await good.result()).tokens == alone(lm, ask([1, 2], 30))

    asyncio.run(main())


def _broken(*_: Any) -> Any:
    raise PlaitError("broken")


def test_a_step_that_fails_as_a_whole_ends_its_requests_and_the_next_one_works(
    make_small: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_small()

    async def main() -> None:
        async with AsyncEngine(lm.new_engine()) as engine:
            with monkeypatch.context() as patched:
                patched.setattr(Engine, "_plan_rows", _broken)
                with pytest.raises(PlaitError, match="broken"):
                    await engine.submit(ask([1, 2])).result()
            assert (await engine.submit(ask([3], 2)).result()).tokens == alone(lm, ask([3], 2))

    asyncio.run(main())


def test_closing_finishes_what_was_begun_and_takes_nothing_new(make_small: Make) -> None:
    lm = make_small()

    async def main() -> None:
        engine = AsyncEngine(lm.new_engine(max_sequences=2))
        with pytest.raises(CapacityError, match="closed"):
            engine.submit(ask([1]))
        engine.start()
        with pytest.raises(ConfigError, match="started"):
            engine.start()
        streams = [engine.submit(ask([i + 1], 20)) for i in range(5)]
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)
        with pytest.raises(CapacityError, match="closed"):
            engine.submit(ask([1]))
        # Whenever it is asked, also while the thread ends, it is answered.
        asked = [asyncio.create_task(engine.metrics())]
        while not closing.done():
            asked.append(asyncio.create_task(engine.metrics()))
            await asyncio.sleep(0.001)
        asked.append(asyncio.create_task(engine.metrics()))
        *_, last = await asyncio.wait_for(asyncio.gather(*asked), 10)
        assert last.waiting + last.running == 0
        await engine.close()
        assert [len((await stream.result()).tokens) for stream in streams] == [20] * 5
        assert (await engine.metrics()).running == 0

    asyncio.run(main())
    assert not engine_threads()


@pytest.mark.parametrize("options", [{"drain": False}, {"timeout": 0.05}])
def test_closing_in_a_hurry_cancels_what_is_left(make_small: Make, options: dict[str, Any]) -> None:
    lm = make_small()

    async def main() -> None:
        engine = AsyncEngine(lm.new_engine(max_sequences=1))
        engine.start()
        streams = [engine.submit(ask([i + 1], LONG)) for i in range(20)]
        await anext(streams[0])
        began = time.monotonic()
        await engine.close(**options)
        assert time.monotonic() - began < 5
        reasons = [(await stream.result()).finish_reason for stream in streams]
        assert reasons[-1] == "cancelled"

    asyncio.run(main())
    assert not engine_threads()


def test_the_event_loop_is_free_while_the_engine_works(make_small: Make) -> None:
    lm = make_small()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    async def main() -> None:
        async with AsyncEngine(lm.new_engine()) as engine:
            ticking = asyncio.create_task(tick())
            await engine.submit(ask([1, 2], 40)).result()
            ticking.cancel()

    asyncio.run(main())
    assert ticks > 100


def test_a_queue_without_a_place_is_refused(make_small: Make) -> None:
    with pytest.raises(ConfigError, match="max_requests"):
        AsyncEngine(make_small().new_engine(), max_requests=0)
