"""A number that was read long ago is found again, although each query attends to little."""

from __future__ import annotations

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run
from plait.claims.reading import decode_times, filled_past, pass_keys, pass_keys_found, token_nats

__all__ = ["CLAIM"]


def _measure(run: Run) -> Measurements:
    from plait.claims.texts import token_runs
    from plait.engine import load

    length, count = run.pick((6000, 20), (700, 1))
    local, blocks = run.pick(512, 128), run.pick("initial=64,block=64,topk=10", "initial=16,block=32,topk=4")
    lm = load("smollm2")
    ours = f"infllm:local={local},{blocks},execution={min(256, local)}"
    equal = f"lm-infinite:local={run.pick(1206, 256)},initial=10"
    # Everywhere but in the window of the question.
    keys = pass_keys(run.seed, count, 1 - (local + 300) / length)
    middle = dict(list(keys.items())[count // 2 :][:1])
    far = run.pick(16_000, 900)
    found: dict[str, Quantity] = {}
    for name, memory, tokens, some in (
        ("infllm", ours, length, keys),
        ("lm_infinite", equal, length, keys),
        ("full", "full", length, middle),
        ("infllm_far", ours, far, middle),
    ):
        yield f"looking for {len(some)} pass keys in {tokens} tokens with {name.replace('_', '-')}"
        hits = pass_keys_found(lm, memory, tokens, some)
        found[f"found_{name}"] = Quantity(sum(hits) / len(hits), "of keys", samples=len(hits))

    tokens = run.pick(16_384, 384)
    (ids,) = token_runs(lm.tokenizer, [tokens])
    yield f"reading {tokens} tokens of a text"
    nats = {
        "infllm": token_nats(lm, ours, ids),
        "lm_infinite": token_nats(lm, f"lm-infinite:local={local},initial=10", ids),
    }
    found |= {f"nats_{name}": Quantity(sum(n) / len(n), "nats", samples=len(n)) for name, n in nats.items()}
    found["nats_against_lm_infinite"] = Quantity(
        found["nats_infllm"].value - found["nats_lm_infinite"].value, "nats"
    )

    short, long = run.pick((8192, 32_768), (700, 900))
    yield f"filling pasts of {short} and {long} tokens"
    pasts = {
        "full": filled_past(lm, "full", long),
        "infllm_short": filled_past(lm, ours, short),
        "infllm": filled_past(lm, ours, long),
        "infllm_file": filled_past(lm, f"{ours},cold=file", long),
    }
    times = yield from decode_times(lm, pasts, steps=run.pick(12, 2), rounds=run.pick(5, 1))
    found |= {f"decode_{name}": Quantity.median(values, "s") for name, values in times.items()}
    for name in ("full", "infllm_short"):
        ratios = [a / b for a, b in zip(times["infllm"], times[name], strict=True)]
        found[f"decode_time_against_{name}"] = Quantity.median(ratios, "x")
    found |= {f"held_{name}": Quantity(past.nbytes() / 1e6, "MB") for name, past in pasts.items()}
    found["held_in_memory_of_a_file"] = Quantity(
        pasts["infllm_file"].nbytes() / pasts["infllm"].nbytes(), "x"
    )
    return found


CLAIM = Claim(
    name="infllm",
    title="Far blocks are looked up",
    headline=(
        "A model that attends to a window and to a few blocks it looks up finds what was said far outside the window, "
        "without training (Mistral-7B: pass keys in texts of up to 1,024K tokens)."
    ),
    source="Xiao et al. 2024, InfLLM, arXiv:2402.04617",
    scale=(
        "SmolLM2-135M-Instruct, 20 pass keys at random depths of 6,000 tokens of filler, greedy; at most 1,280 tokens attended "
        "to (local 512, initial 64, 10 blocks of 64 and the remainder), beside lm-infinite of 1,216; one key with full "
        "attention, and one in 16,000 tokens, which full attention refuses: the model was trained on 8,192. 16,384 tokens of Python's manual. Decoding behind 32,768 and 8,192 tokens of random keys and values, with blocks in memory and in a file."
    ),
    bars=(
        Bar(
            quantity="found_infllm",
            relation=">=",
            value=0.6,
            unit="of keys",
            why="A small model misses some even where it sees the block.",
        ),
        Bar(
            quantity="found_lm_infinite",
            relation="<=",
            value=0.1,
            unit="of keys",
            why="All keys lie outside its window, so that a hit would be luck, or a leak.",
        ),
        Bar(
            quantity="nats_against_lm_infinite",
            relation="<=",
            value=0.02,
            unit="nats",
            why="What is looked up must not disturb the reading of ordinary text.",
        ),
        Bar(
            quantity="decode_time_against_full",
            relation="<=",
            value=0.35,
            unit="x",
            why="The paper's ratio; a small model has little attention to save beside its weights.",
        ),
        Bar(
            quantity="decode_time_against_infllm_short",
            relation="<=",
            value=1.3,
            unit="x",
            why="Only the index grows: one product of 576 numbers for each block of 64 tokens.",
        ),
        Bar(
            quantity="held_in_memory_of_a_file",
            relation="<=",
            value=0.3,
            unit="x",
            why="Of 32,768 tokens, the window, the index and at most 32 blocks of a layer stay in memory.",
        ),
    ),
    measure=_measure,
)
