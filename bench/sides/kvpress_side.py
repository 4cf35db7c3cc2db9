"""What kvpress and Transformers' quantised cache keep of a prompt, and how far the next tokens move; see `protocol.py`.

A task is `{"windows": [[ids], ...], "prompt": n, "method": name, "options": {...}, "steps": k}`: read the first n tokens of
each window with the method on, compare the laws of the others with those of the exact cache, then decode k tokens one by
one behind the first window. The answer is `{"divergence": [...], "nats": [...], "agreement": [...], "nbytes": [...],
"seconds": [...]}`; divergences and nats in the order of the windows, seconds of each decoding step.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import kvpress
import torch
import transformers
from protocol import serve, settings


def main() -> None:
    given = settings()
    torch.set_num_threads(given["threads"])
    transformers.utils.logging.disable_progress_bar()
    # kvpress looks into attention; eager and fused attention give the same laws to rounding.
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        given["folder"], dtype=torch.float32, attn_implementation="sdpa"
    ).eval()

    @torch.inference_mode()
    def answer(
        windows: list[list[int]] = (),  # type: ignore[assignment]
        prompt: int = 0,
        method: str = "none",
        options: dict[str, Any] | None = None,
        steps: int = 0,
    ) -> dict[str, Any]:
        found: dict[str, Any] = {"divergence": [], "nats": [], "agreement": [], "nbytes": [], "seconds": []}
        for number, window in enumerate(windows):
            ids = torch.tensor([window])
            truth, _ = laws(model, ids, prompt, "none", {})
            other, cache = laws(model, ids, prompt, method, options or {})
            found["divergence"].append(float((truth.exp() * (truth - other)).sum(-1).mean()))
            following = ids[0, prompt + 1 :, None]
            found["nats"].append(float((truth - other)[:-1].gather(1, following).mean()))
            found["agreement"].append(float((truth.argmax(-1) == other.argmax(-1)).double().mean()))
            found["nbytes"].append(cache)
            if not number:
                found["seconds"] = decode(model, ids, prompt, method, options or {}, steps)
        return found

    serve(
        f"kvpress {kvpress.__version__ if hasattr(kvpress, '__version__') else '0.5.5'}, Transformers {transformers.__version__}",
        answer,
    )


def read(model: Any, ids: torch.Tensor, prompt: int, method: str, options: dict[str, Any]) -> Any:
    """The cache of a prompt."""
    if method == "quantised":
        cache: Any = transformers.QuantizedCache(config=model.config, **options)
        pressed: Any = contextlib.nullcontext()
    else:
        cache = transformers.DynamicCache(config=model.config)
        pressed = contextlib.nullcontext() if method == "none" else getattr(kvpress, method)(**options)(model)
    with pressed:
        model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
    return cache


def laws(
    model: Any, ids: torch.Tensor, prompt: int, method: str, options: dict[str, Any]
) -> tuple[torch.Tensor, int]:
    """Log-probabilities behind each token from the prompt's length on, and bytes held after the prompt."""
    cache = read(model, ids, prompt, method, options)
    held = nbytes(cache)
    positions = torch.arange(prompt, ids.shape[1])[None]
    logits = model(ids[:, prompt:], past_key_values=cache, position_ids=positions).logits[0]
    return logits.double().log_softmax(-1), held


def decode(
    model: Any, ids: torch.Tensor, prompt: int, method: str, options: dict[str, Any], steps: int
) -> list[float]:
    """Seconds of each step behind the prompt."""
    cache = read(model, ids, prompt, method, options)
    seconds = []
    for at in range(prompt, min(prompt + steps, ids.shape[1])):
        start = time.perf_counter()
        model(ids[:, at : at + 1], past_key_values=cache, position_ids=torch.tensor([[at]]))
        seconds.append(time.perf_counter() - start)
    return seconds


def nbytes(cache: Any) -> int:
    """Bytes of every tensor that a cache holds, once each."""
    seen: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            inner = [getattr(value, name) for name in ("_data", "_scale", "_shift") if hasattr(value, name)]
            if inner:
                for one in inner:
                    visit(one)
            else:
                storage = value.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, (list, tuple)):
            for one in value:
                visit(one)

    for layer in cache.layers:
        for value in vars(layer).values():
            visit(value)
    return sum(seen.values())


if __name__ == "__main__":
    main()
