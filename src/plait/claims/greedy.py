"""Greedy continuations by Plait and by the peer, Hugging Face Transformers with the same dequantised weights."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.claims.claim import MeasurementError

if TYPE_CHECKING:
    from plait.engine import LanguageModel

__all__ = ["NEEDS", "by_peer", "by_plait", "load_peer"]

# What Transformers needs to read a GGUF file; a claim that uses the peer lists them.
NEEDS = ("transformers", "gguf", "accelerate")


def load_peer(gguf: Path) -> Any:
    """The model of a GGUF file as Transformers reads it, dequantised to fp32, with its default attention."""
    import torch

    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    # Its progress bars cannot all be switched off; ours says what is going on.
    with contextlib.redirect_stderr(io.StringIO()):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
        ).eval()
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise MeasurementError(f"Transformers holds {name} in {parameter.dtype}; fp32 was asked for.")
    # Every answer is to have its full length on both sides.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def by_plait(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    on_step: Callable[[list[int]], None] = lambda counts: None,
) -> list[list[int]]:
    """Greedy continuations by Plait's engine, all prompts at once.

    Args:
        lm: a loaded model.
        prompts: token ids.
        max_new_tokens: tokens of every continuation; the end-of-sequence token does not stop it.
        on_step: told, after every step, how many tokens each continuation has.
    """
    engine = lm.new_engine()
    sequences = [
        engine.submit(lm.request(prompt, max_new_tokens=max_new_tokens, ignore_end=True))
        for prompt in prompts
    ]
    while not engine.is_idle:
        engine.step()
        on_step([len(sequence.choices) for sequence in sequences])
    return [list(sequence.result().tokens) for sequence in sequences]


def by_peer(
    peer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    on_step: Callable[[list[int]], None] = lambda counts: None,
) -> list[list[int]]:
    """The same by `generate` of Transformers, the batch padded on the left as its users pad it.

    Args:
        peer: from `load_peer`; the others as in `by_plait`.
    """
    import torch

    transformers: Any = importlib.import_module("transformers")
    longest = max(len(prompt) for prompt in prompts)

    class Watch(transformers.StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
            on_step([input_ids.shape[1] - longest] * len(prompts))
            return torch.zeros(len(prompts), dtype=torch.bool)

    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        answer = peer.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            stopping_criteria=transformers.StoppingCriteriaList([Watch()]),
        )
    tokens: list[list[int]] = answer[:, longest:].tolist()
    return tokens
