"""The whole path, text to text, against Hugging Face Transformers on the real SmolLM2."""

from __future__ import annotations

import math
import pydoc_data.topics
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.engine import LanguageModel

pytestmark = pytest.mark.model

PROMPTS = [
    "The history of computing",
    "def quicksort(items):\n",
    "Once upon a time, in a village by the sea,",
    "Ingredients for a simple bread: flour,",
    pydoc_data.topics.topics["assert"][:800],
]
# Positions of a float32 tie: below this gap between the two best logits, rounding decides.
TIE = 1e-3


@pytest.fixture(scope="module")
def transformers_model(smollm2_gguf: Path) -> Any:
    """The same file, dequantised by Transformers."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
        )
    return model.eval()


@pytest.fixture(scope="module")
def greedy(smollm2: LanguageModel) -> dict[str, list[int]]:
    """Up to 200 greedy tokens behind each prompt, all prompts in one batch."""
    found = smollm2.generate(PROMPTS, max_new_tokens=200)
    return {prompt: list(one.tokens) for prompt, one in zip(PROMPTS, found, strict=True)}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_each_of_200_greedy_tokens_is_the_one_that_transformers_finds_best(
    smollm2: LanguageModel, transformers_model: Any, greedy: dict[str, list[int]], prompt: str
) -> None:
    """A greedy text is the one whose every token is the best behind those before it, so one pass can judge it."""
    ids = smollm2.encode(prompt)
    ours = greedy[prompt]
    ended = len(ours) < 200
    assert len(ours) > 20
    with torch.inference_mode():
        logits = transformers_model(torch.tensor([ids + ours[:-1]])).logits[0, len(ids) - 1 :]
    best = logits.amax(dim=1)
    behind = best - logits.gather(1, torch.tensor(ours)[:, None])[:, 0]
    assert float(behind.max()) < TIE
    assert not ended or ours[-1] in smollm2.tokenizer.eos_ids


@pytest.mark.timeout(600)
def test_greedy_text_is_what_transformers_generates(smollm2: LanguageModel, transformers_model: Any) -> None:
    ids = smollm2.encode(PROMPTS[0])
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers_model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=200, do_sample=False,
        )[0, len(ids) :].tolist()  # fmt: skip
    ours = list(smollm2.generate(PROMPTS[0], max_new_tokens=200).tokens)
    if ours == theirs:
        return
    first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    with torch.inference_mode():
        best = transformers_model(torch.tensor([ids + theirs[:first]])).logits[0, -1].topk(2).values
    assert float(best[0] - best[1]) < TIE, f"differs at token {first}, which is not a tie"


@pytest.mark.timeout(600)
def test_perplexity_agrees_to_four_digits(smollm2: LanguageModel, transformers_model: Any) -> None:
    text = pydoc_data.topics.topics["class"] + pydoc_data.topics.topics["assignment"][:4000]
    ids = torch.tensor([smollm2.encode(text)])
    nats, count, window = 0.0, 0, 1024
    with torch.inference_mode():
        for start in range(0, ids.shape[1], window):
            piece = ids[:, start : start + window]
            if piece.shape[1] < 2:
                continue
            law = transformers_model(piece).logits[0, :-1].log_softmax(-1)
            nats -= float(law.gather(1, piece[0, 1:, None]).sum(dtype=torch.float64))
            count += piece.shape[1] - 1
    ours = smollm2.score(text, context=window)
    assert ours.tokens == count
    assert ours.perplexity == pytest.approx(math.exp(nats / count), rel=5e-5)
