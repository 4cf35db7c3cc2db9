"""A model reads on past any length in constant memory and time, as well as from a fresh window."""

from __future__ import annotations

from collections.abc import Generator

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run
from plait.claims.reading import decode_times, fill, filled_past, token_nats

__all__ = ["CLAIM"]


def _far_beyond(run: Run) -> Generator[str, None, dict[str, Quantity]]:
    """What each part of the method does for a model of bytes that reads 16 times the length it was trained on."""
    from plait.claims.tuning import byte_model
    from plait.train import python_corpus

    local, times, num_texts = 128, run.pick(16, 3), run.pick(6, 1)
    corpus = python_corpus(code=run.pick(0.5, 0.01))
    yield f"training a small model on {local} bytes"
    lm = byte_model(run, corpus, rows=8 * local, trained=local)
    long = [ids for ids in map(lm.tokenizer.encode, corpus.held_out) if len(ids) >= local * times]
    texts = [ids[: local * times] for ids in long[-num_texts:]]
    memories = {
        "full": "full",
        "lm_infinite": f"lm-infinite:local={local},initial=10",
        "mask_alone": f"window:size={local},sinks=10",
        # Every block is looked up, so that nothing is hidden, and none of them is further than the window.
        "limit_alone": f"infllm:local={local},initial=10,block=32,execution=32,topk=999,cached=999",
        "window_alone": f"window:size={local},sinks=0",
    }
    means = {}
    first = local * times // 2
    for name, memory in memories.items():
        yield f"reading {num_texts} texts of {local * times} bytes with {name}"
        nats = [value for ids in texts for value in token_nats(lm, memory, ids, local)[first - 1 :]]
        means[name] = sum(nats) / len(nats)
    yield "reading the same bytes in fresh windows"
    nats, half = [], local // 2
    for ids in texts:
        for start in range(first, len(ids), half):
            nats += token_nats(lm, "full", ids[start - half : start + half], local)[half - 1 :]
    means["fresh_windows"] = sum(nats) / len(nats)
    found = {f"small_{name}": Quantity(mean, "nats", samples=len(nats)) for name, mean in means.items()}
    found["small_gain_over_full"] = Quantity(means["full"] - means["lm_infinite"], "nats", samples=len(nats))
    found["small_against_fresh_windows"] = Quantity(
        means["lm_infinite"] - means["fresh_windows"], "nats", samples=len(nats)
    )
    return found


def _measure(run: Run) -> Measurements:
    from plait.claims.texts import token_runs
    from plait.engine import load
    from plait.memory import Heads, Memory, MemoryPlan

    local, stretches = run.pick(2048, 32), run.pick(6, 3)
    (ids,) = token_runs((lm := load("smollm2")).tokenizer, [local * stretches])
    found = yield from _far_beyond(run)

    def stretch_means(name: str, nats: list[float], size: int = local) -> list[float]:
        means = [sum(part) / len(part) for part in (nats[i : i + size] for i in range(0, len(nats), size))]
        for number, mean in enumerate(means):
            found[f"nats_{name}_stretch_{number + 1}"] = Quantity(mean, "nats", samples=size)
        return means

    yield f"reading {len(ids)} tokens with lm-infinite"
    spec = f"lm-infinite:local={local},initial={run.pick(10, 4)}"
    ours = stretch_means("lm_infinite", token_nats(lm, spec, ids, min(256, local)))
    yield f"reading {len(ids)} tokens with full attention"
    full = stretch_means("full", token_nats(lm, "full", ids, min(256, local)))
    near, initial = local // 2, run.pick(10, 4)
    pieces = run.pick("block=64,execution=64", "block=8,execution=8")
    means = {}
    for name, memory in {
        "near": f"lm-infinite:local={near},initial={initial}",
        "near_without_first": f"lm-infinite:local={near},initial=0",
        "near_mask_alone": f"window:size={near},sinks={initial}",
        "near_limit_alone": f"infllm:local={near},initial={initial},{pieces},topk=999,cached=999",
    }.items():
        yield f"reading {4 * near} tokens with {memory}"
        means[name] = stretch_means(name, token_nats(lm, memory, ids[: 4 * near], min(256, near)), near)
    losses = [a - b for a, b in list(zip(means["near_without_first"], means["near"], strict=True))[1:]]
    trained = max(lm.model.config.max_positions // local, 1)
    yield "reading the end with a fresh window"
    # Its rows see on average as much as a window that is full half the time, so the preceding stretch is read too.
    fresh = sum(token_nats(lm, "full", ids[-2 * local :], min(256, local))[-local:]) / local
    found |= {
        "worst_stretch_against_full": Quantity(
            max(a - b for a, b in zip(ours[:-1], full[:-1], strict=True)), "nats", samples=len(ours) - 1
        ),
        "last_stretch_against_fresh_window": Quantity(ours[-1] - fresh, "nats", samples=local),
        "spread_against_full": Quantity(
            (max(ours) - min(ours)) - (max(full[:trained]) - min(full[:trained])), "nats", samples=len(ours)
        ),
        "loss_without_first_tokens": Quantity(min(losses), "nats", samples=near),
    }

    near, far = run.pick((10_000, 50_000), (400, 800))
    context = run.pick(16_384, 1024)
    window = run.pick(2048, 64)
    spec = f"lm-infinite:local={window},initial=10"
    yield f"filling pasts of {context}, {near} and {far} tokens"
    pasts = {
        "full": filled_past(lm, "full", context),
        "lm_infinite": filled_past(lm, spec, context),
        "near": filled_past(lm, spec, near),
        "far": filled_past(lm, spec, far),
    }
    times = yield from decode_times(lm, pasts, steps=run.pick(16, 2), rounds=run.pick(5, 1))
    found |= {f"decode_{name}": Quantity.median(values, "s") for name, values in times.items()}
    found["decode_speedup"] = Quantity.median(
        [a / b for a, b in zip(times["full"], times["lm_infinite"], strict=True)], "x"
    )
    found["decode_far_against_near"] = Quantity.median(
        [a / b for a, b in zip(times["far"], times["near"], strict=True)], "x"
    )
    found["held_full"] = Quantity(pasts["full"].nbytes() / 1e6, "MB")
    found["held_lm_infinite"] = Quantity(pasts["lm_infinite"].nbytes() / 1e6, "MB")
    yield "streaming a million tokens through one layer"
    layer = Memory(Heads(2, 1, 16, scale=0.25), MemoryPlan.parse(spec))
    early, late = run.pick((100_000, 1_000_000), (2_000, 10_000))
    fill(layer, early)
    before = layer.nbytes()
    fill(layer, late)
    found["bytes_late_against_early"] = Quantity(layer.nbytes() / before, "x")
    return found


CLAIM = Claim(
    name="lm-infinite",
    title="Reading on past any length",
    headline=(
        "With a Lambda-shaped mask and limited distances, models stay fluent at lengths they were never trained on, "
        "in O(n) time and constant memory, and decode 2.72 times as fast (LLaMA, Llama-2, MPT and GPT-J, up to 32k tokens)."
    ),
    source="Han et al. 2024, LM-Infinite, arXiv:2308.16137",
    scale=(
        "SmolLM2-135M-Instruct reads 12,288 tokens of Python's manual with local=2048 and initial=10, in stretches of "
        "2,048; beside it full attention and a fresh window. SmolLM2 is trained on 8,192 tokens and does not fail soon "
        "after them, so a model of bytes is trained here on 128 (2 blocks of width 96, 600 steps of 1,024 bytes of Python's "
        "library and manual) and reads 6 held-out texts of 2,048, scored from byte 1,024 on; beside it full attention, the "
        "mask or the limit alone, a window alone, and fresh windows. First tokens, mask and limit are left out of SmolLM2 too, "
        "with local=1024 and 4,096 tokens. Decoding times are taken with local=2048 behind random keys and values: "
        "16,384 tokens against full attention, and 10,000 against 50,000. One small layer streams a million tokens."
    ),
    bars=(
        Bar(
            quantity="worst_stretch_against_full",
            relation="<=",
            value=0.25,
            unit="nats",
            why="All stretches but the last: a window of 2,048 loses what lies further back, and nothing more.",
        ),
        Bar(
            quantity="spread_against_full",
            relation="<=",
            value=0.1,
            unit="nats",
            why="Flat through and past the length of training: stretches differ no more than for full attention within it.",
        ),
        Bar(
            quantity="last_stretch_against_fresh_window",
            relation="<=",
            value=0.1,
            unit="nats",
            why="Deep in a stream the text must be read as well as with a window that was just opened.",
        ),
        Bar(
            quantity="small_gain_over_full",
            relation=">=",
            value=0.3,
            unit="nats",
            why="At 16 times the length of its training a model must fail with full attention, and not with this.",
        ),
        Bar(
            quantity="small_against_fresh_windows",
            relation="<=",
            value=0.05,
            unit="nats",
            why="What it reads there must be as good as what it was trained on.",
        ),
        Bar(
            quantity="loss_without_first_tokens",
            relation=">=",
            value=0.3,
            unit="nats",
            why="The first tokens carry the spare weight of softmax; if dropping them cost nothing, they would not matter.",
        ),
        Bar(
            quantity="decode_speedup",
            relation=">=",
            value=2.0,
            unit="x",
            why="At 16,384 tokens full attention reads eight times the keys and values; the paper has 2.72.",
        ),
        Bar(
            quantity="decode_far_against_near",
            relation="<=",
            value=1.15,
            unit="x",
            why="Time a token must not depend on how long the stream is; timing is off by some percent.",
        ),
        Bar(
            quantity="bytes_late_against_early",
            relation="<=",
            value=1.3,
            unit="x",
            why="Room for a quarter more comes and goes as old tokens are dropped in groups.",
        ),
    ),
    measure=_measure,
)
