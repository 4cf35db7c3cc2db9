"""Requests to models whose attention has a bias by distance: batched, drafted and forked answers are those of lone ones."""

from __future__ import annotations

import pytest
import torch

from plait.decode.speculate import SPECULATORS, DraftBudget
from plait.engine import LanguageModel
from plait.memory import MemoryPlan
from plait.nn import Transformer
from plait.nn.distance_bias import DistanceBiasConfig, Harmonic, Linear
from plait.nn.mixers import AttentionConfig
from plait.nn.rotary import RopeConfig
from plait.text import Tokenizer
from small_models import small_transformer

PROMPTS = [
    "one two three one two three one two",
    "one two three and then",
    "x",
    "some longer text, so it is " * 3,
]


def around(
    bias: DistanceBiasConfig, rotary: bool, tokenizer: Tokenizer, memory: str, draft: str
) -> LanguageModel:
    rope = RopeConfig(dim=16) if rotary else None
    mixer = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, rope=rope, distance_bias=bias)
    with torch.no_grad():
        model: Transformer = small_transformer(
            mixer, mixer, seed=3, vocab_size=257, width=64, inner=96, max_positions=512, logit_scale=3.0
        )
    lm = LanguageModel(
        name="small", model=model, tokenizer=tokenizer, chat_template=None, plan=MemoryPlan.parse(memory),
        draft=SPECULATORS.parse(draft),
    )  # fmt: skip
    lm.draft_budget = DraftBudget("off")
    return lm


@pytest.mark.parametrize(("bias", "rotary"), [(Harmonic(weight=4.0), True), (Linear(), False)], ids=str)
@pytest.mark.parametrize("memory", ["full", "lm-infinite:local=20,initial=3"])
def test_answers_do_not_depend_on_batch_chunks_or_drafts(
    byte_tokenizer: Tokenizer, bias: DistanceBiasConfig, rotary: bool, memory: str
) -> None:
    lm = around(bias, rotary, byte_tokenizer, memory, "none")
    alone = [lm.generate(prompt, max_new_tokens=10, ignore_end=True).tokens for prompt in PROMPTS]
    assert len(set(alone)) == len(PROMPTS)
    # The guesses of token recycling are trees.
    for draft in ("none", "prompt-lookup:match=2", "token-recycling"):
        other = around(bias, rotary, byte_tokenizer, memory, draft)
        engine = other.new_engine(rows_per_step=13)
        running = [
            engine.submit(other.request(other.encode(prompt), max_new_tokens=10, ignore_end=True))
            for prompt in PROMPTS
        ]
        for _ in engine.run():
            pass
        assert [sequence.result().tokens for sequence in running] == alone
