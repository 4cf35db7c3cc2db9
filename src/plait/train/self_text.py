"""Text that a model writes itself: to tune it without teaching it another voice."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from plait.engine import LanguageModel
from plait.errors import ConfigError
from plait.train.data import TokenData
from plait.train.progress import Progress

__all__ = ["own_text", "prompts_from", "sampled_text"]

_TASKS = ("Explain this.", "Continue this text.", "Write about this in your own words.", "What does this do?")
_PASSAGE = 400
_BATCH = 16
_TRIES = 100


def prompts_from(lm: LanguageModel, texts: Sequence[str], count: int, seed: int = 0) -> list[list[int]]:
    """Prompts around passages of texts: to be continued, and for a chat model questions in turn with them.

    Args:
        lm: whose ids they are.
        texts: to draw passages from.
        count: how many prompts.
        seed: of the draw.
    """
    draw = random.Random(seed)
    usable = [text for text in texts if len(text) > 2 * _PASSAGE]
    prompts = []
    for number in range(count if usable else 0):
        text = draw.choice(usable)
        start = draw.randrange(len(text) - _PASSAGE)
        passage = text[start : start + _PASSAGE].partition("\n")[2]
        if lm.chat_template is not None and number % 2:
            prompts.append(lm.encode_chat(f"{_TASKS[number // 2 % len(_TASKS)]}\n\n{passage}"))
        else:
            prompts.append(lm.encode(passage))
    return [prompt for prompt in prompts if prompt]


def own_text(lm: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> TokenData:
    """What a model answers to each prompt, greedily; answers have weight 1, prompts weight 0."""
    documents: list[list[int]] = []
    weights: list[float] = []
    with Progress("writing", len(prompts)) as progress:
        for low in range(0, len(prompts), _BATCH):
            engine = lm.new_engine()
            batch = [list(prompt) for prompt in prompts[low : low + _BATCH]]
            running = [engine.submit(lm.request(ids, max_new_tokens=max_new_tokens)) for ids in batch]
            for _ in engine.run():
                pass
            for ids, sequence in zip(batch, running, strict=True):
                answer = sequence.result().tokens
                documents.append([*ids, *answer])
                weights += [0.0] * len(ids) + [1.0] * len(answer)
            progress.tell(low + len(batch))
    data = TokenData.of(documents)
    return TokenData(data.ids, data.lengths, torch.tensor(weights))


def sampled_text(lm: LanguageModel, count: int, tokens: int, seed: int = 0) -> TokenData:
    """Texts that a model writes from one random token on, drawn at temperature 1; every token counts.

    Args:
        lm: the writer.
        count: texts.
        tokens: of each, at most.
        seed: of the first tokens and of the draws.

    Raises:
        ConfigError: the model ends every one of 100 tries for a text at once.
    """
    draw = random.Random(seed)
    special = lm.tokenizer.special_ids
    usable = [id for id in range(lm.model.config.vocab_size) if id not in special]
    documents: list[list[int]] = []
    with Progress("writing", count) as progress:
        for tried in range(0, _TRIES * count, _BATCH):
            engine = lm.new_engine()
            starts = [draw.choice(usable) for _ in range(min(_BATCH, count - len(documents)))]
            running = [
                engine.submit(
                    lm.request(
                        [first], max_new_tokens=tokens - 1, temperature=1.0, seed=seed * 1_000_003 + tried + i
                    )
                )
                for i, first in enumerate(starts)
            ]
            for _ in engine.run():
                pass
            for first, sequence in zip(starts, running, strict=True):
                if answer := sequence.result().tokens:
                    documents.append([first, *answer])
            progress.tell(len(documents))
            if len(documents) == count:
                return TokenData.of(documents)
    raise ConfigError(f"The model ended {_TRIES * count} texts at their first token. Give texts to tune on.")
