"""Measure sizes and qualities for the pages of methods; times depend on the machine and are claims.

`python docs/measurements.py` writes the tables of the pages in docs/methods/. They are measured with
SmolLM2-135M-Instruct on the reference manual that comes with Python, and take some ten minutes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from torch import Tensor

import plait
from plait.claims import follow
from plait.claims.marking import strengths
from plait.claims.memories import fidelity, fp16_bytes
from plait.claims.prose import HELD_OUT_SUBJECTS, manual_passages, model_passages
from plait.engine import LanguageModel
from plait.files import write_text
from plait.memory import Memory, MemoryPlan, Rows
from plait.prose import ThesaurusCandidates, english_lexicon
from plait.weights import Embedding, Linear

METHODS = Path(__file__).parent / "methods"
NUM_TOKENS = 4096
CHUNK = 256


class Reading(NamedTuple):
    """A text read through a memory: mean nats of a token, bytes held at its end, and every logit's law."""

    nats: float
    nbytes: int
    laws: list[Tensor]


def manual_ids(lm: LanguageModel) -> Tensor:
    """The first tokens of Python's reference manual, topic by topic in alphabetical order."""
    text = "\n".join(topics[name] for name in sorted(topics))
    return torch.tensor(lm.encode(text[: NUM_TOKENS * 8])[:NUM_TOKENS])


@torch.inference_mode()
def read(lm: LanguageModel, memory: str, ids: Tensor) -> Reading:
    """Read a text in chunks through a memory, predicting each token but the first."""
    past = lm.model.new_past(MemoryPlan.parse(memory))
    nats, laws = 0.0, []
    for start in range(0, len(ids), CHUNK):
        chunk = ids[start : start + CHUNK]
        hidden = lm.model(chunk, Rows([(len(chunk), start)]), [past])
        past.commit()
        law = lm.model.logits(hidden).log_softmax(dim=-1)
        following = ids[start + 1 : start + CHUNK + 1]
        nats -= float(law[: len(following)].gather(1, following[:, None]).sum())
        # Every eighth row is enough for a largest difference, and fits in memory.
        laws.append(law[::8].clone())
    return Reading(nats / (len(ids) - 1), past.nbytes(), laws)


def table(page: str, name: str, heading: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Put a table between the markers of a page."""
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    path = METHODS / f"{page}.md"
    before, begin, rest = path.read_text("utf-8").partition(f"<!-- measured: {name} -->\n")
    _, end, after = rest.partition("<!-- measured: end -->")
    if not end:
        raise SystemExit(f"{path} has no markers for {name}")
    write_text(path, f"{before}{begin}\n{text}\n{end}{after}")
    print(f"{name} done", file=sys.stderr)  # noqa: T201 - a script


def codecs(lm: LanguageModel, ids: Tensor) -> None:
    """The dense codec's number formats."""
    exact = read(lm, "full", ids)
    rows = []
    for dtype in ("fp32", "bf16", "fp16"):
        reading = exact if dtype == "fp32" else read(lm, f"dense:dtype={dtype}", ids)
        worst = max(float((a - b).abs().max()) for a, b in zip(exact.laws, reading.laws, strict=True))
        itemsize = MemoryPlan.parse(f"dense:dtype={dtype}").codec.tail_dtype.itemsize
        heads = [layer.heads for layer in lm.model.new_past(lm.plan).layers if isinstance(layer, Memory)]
        per_token = sum(2 * layer.num_kv_heads * layer.head_dim * itemsize for layer in heads)
        rows.append(
            (
                f"`dense:dtype={dtype}`",
                f"{per_token:,}",
                f"{worst:.1e}" if worst else "0",
                f"{math.exp(reading.nats):.3f}",
            )
        )
    table(
        "dense",
        "dense",
        ("memory", "bytes a token", "largest change of a log-probability", "perplexity"),
        rows,
    )


def policies(lm: LanguageModel, ids: Tensor) -> None:
    """What a window saves and costs."""
    rows = []
    memories = [
        "full",
        *(f"window:size={size}" for size in (2048, 1024, 512, 256)),
        "window:size=512,sinks=0",
    ]
    for memory in memories:
        reading = read(lm, memory, ids)
        rows.append((f"`{memory}`", f"{reading.nbytes / 1e6:.0f}", f"{math.exp(reading.nats):.3f}"))
    table("window", "window", ("memory", f"MB held after {len(ids):,} tokens", "perplexity"), rows)


def coded(lm: LanguageModel, ids: Tensor) -> None:
    """What lossy codecs save and cost: prompts stored at once, and how far the tokens behind them move."""
    pages = {
        "gear": (
            "gear:bits=4",
            "gear:bits=4,rank=0,rank_decode=0,sparsity=0",
            "gear:bits=4,backbone=kcvt",
            "gear:bits=2",
            "gear:bits=2,sinks=64",
        ),
        "saq": (
            "saq:steps=rest@4",
            "saq:sink=64@8",
            "saq:steps=rest@3",
            "saq:steps=64@16/128@8/192@4/rest@2,sink=64@8",
        ),
        "snapkv": (
            "snapkv:capacity=512",
            "snapkv:capacity=256",
            "snapkv:capacity=512,think:ratio=0.4",
            "snapkv:capacity=512,gear:bits=4,dtype=fp16",
        ),
        "think": ("think:ratio=0.4", "think:ratio=0.6", "think:ratio=0.4,gear:bits=4,dtype=fp16"),
    }
    plans = {spec: MemoryPlan.parse(spec) for specs in pages.values() for spec in specs}
    prompt, following, count = 1024, 128, 3
    size = prompt + following
    windows = [ids[number * size : (number + 1) * size].tolist() for number in range(count)]
    found = follow(fidelity(lm, plans, windows, prompt), lambda line: None)
    for page, specs in pages.items():
        rows = [
            (
                f"`{spec}`",
                f"{found[spec].nbytes[0] / fp16_bytes(lm, prompt):.2f}",
                f"{sum(found[spec].divergence) / count:.4f}",
                f"{sum(found[spec].nats) / count:+.3f}",
                f"{sum(found[spec].agreement) / count:.3f}",
            )
            for spec in specs
        ]
        heading = (
            "memory",
            "bytes, of fp16",
            "divergence, nats",
            "loss of likelihood, nats a token",
            "same first choice",
        )
        table(page, page, heading, rows)


def weights(ids: Tensor) -> None:
    """Every weight format, packed from the model's own file."""
    rows = []
    for name in ("fp32", "bf16", "fp16", "q8_0", "q4_1", "q4_0", "file"):
        lm = plait.load("smollm2", weights=name)
        layers = [module for module in lm.model.modules() if isinstance(module, (Linear, Embedding))]
        # A tied head and its embedding hold one matrix.
        matrices = {id(layer.weight): layer.weight for layer in layers}
        nbytes = sum(matrix.nbytes() for matrix in matrices.values())
        numbers = sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices.values())
        nats = read(lm, "full", ids).nats
        rows.append(
            (f"`{name}`", f"{nbytes * 8 / numbers:.2f}", f"{nbytes / 1e6:.0f}", f"{math.exp(nats):.3f}")
        )
    table("weight-formats", "weights", ("weights", "bits a weight", "MB of matrices", "perplexity"), rows)


def drafts(lm: LanguageModel) -> None:
    """Forward passes that prompt look-up saves where the answer copies, and where it does not."""
    code = "def area(width, height):\n    return width * height\n\n\ndef volume(width, height, depth):\n"
    tasks = {
        "repeat a list": "Repeat this list exactly.\n"
        + "apples, pears, plums, figs, dates, limes, kiwis, melons\n" * 2,
        "edit code": f"Write this code again with a docstring in each function:\n{code}    return width * height * depth\n",
        "tell a story": "Write a short story about a lighthouse.",
    }
    rows = []
    for task, prompt in tasks.items():
        counts, answers = [], []
        for draft in ("none", "prompt-lookup"):
            speaker = LanguageModel(
                name=lm.name, model=lm.model, tokenizer=lm.tokenizer, chat_template=lm.chat_template,
                plan=lm.plan, draft=type(lm.draft).axis.parse(draft),
            )  # fmt: skip
            engine = speaker.new_engine()
            sequence = engine.submit(speaker.request(speaker.encode_chat(prompt), max_new_tokens=120))
            passes = 0
            while not engine.is_idle:
                engine.step()
                passes += 1
            counts.append(passes)
            answers.append(sequence.result().tokens)
        if answers[0] != answers[1]:
            raise SystemExit(f"{task}: the answers differ")
        rows.append((task, str(len(answers[0])), str(counts[0]), str(counts[1])))
    table(
        "prompt-lookup",
        "prompt-lookup",
        ("task", "tokens of the answer", "passes, `none`", "passes, `prompt-lookup`"),
        rows,
    )


def marks(lm: LanguageModel) -> None:
    """How strong a watermark is by what a replacement may cost, on the passages that are for calibrating alone."""
    keys = [bytes([number]) * 32 for number in range(5)]
    texts = [
        *model_passages(lm, HELD_OUT_SUBJECTS, held_out=True),
        *manual_passages(lm, HELD_OUT_SUBJECTS, held_out=True),
    ]
    lexicon = english_lexicon()
    found = follow(strengths(texts, keys, lexicon, ThesaurusCandidates(lm, lexicon)), lambda line: None)
    rows = [
        (
            f"{one.limit:g}",
            f"{one.replaced:.1%}",
            f"{one.nats:.1f}",
            f"{one.z:.1f}",
            f"{one.detected:.0%}",
        )
        for one in found
    ]
    heading = ("`max_nats`", "words replaced", "nats of a replacement", "median z", "found, 1 % false alarms")
    table("watermark", "watermark", heading, rows)


def main() -> None:
    """Write every table."""
    lm = plait.load("smollm2")
    ids = manual_ids(lm)
    drafts(lm)
    codecs(lm, ids)
    policies(lm, ids)
    coded(lm, ids)
    weights(ids)
    marks(lm)


if __name__ == "__main__":
    main()
