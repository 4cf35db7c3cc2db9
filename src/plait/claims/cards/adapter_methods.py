"""Ten ways to train few numbers, on the same steps as the whole model: what each gains, and what it takes."""

from __future__ import annotations

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run

__all__ = ["CLAIM"]

_STEPS = 30
# Each with a learning rate that is usual for its kind: few numbers, or numbers before the text, need larger steps.
_METHODS = {
    "lora": ("lora:rank=8", 1e-3),
    "dora": ("dora:rank=8", 1e-3),
    "adalora": ("adalora:rank=8,first_rank=12", 2e-3),
    "vera": ("vera:rank=256", 1e-2),
    "serial": ("serial:size=32", 1e-3),
    "parallel": ("parallel:size=64", 1e-3),
    "ia3": ("ia3", 1e-2),
    "bitfit": ("bitfit", 3e-3),
    "prefix": ("prefix:tokens=16", 1e-2),
    "prompt": ("prompt:tokens=16", 1e-2),
}


def _measure(run: Run) -> Measurements:
    from plait.claims.tuning import adapter_learned, model_learned

    found: dict[str, Quantity] = {}
    yield "training the whole model"
    whole = model_learned(run, steps=_STEPS)
    gain = whole.before - whole.after
    found["whole_gain"] = Quantity(gain, "nats/token")
    found["whole_numbers"] = Quantity(whole.parameters, "")
    found["whole_seconds"] = Quantity(whole.seconds, "s")
    gains: dict[str, float] = {}
    for name in run.pick(list(_METHODS), ["lora", "dora", "adalora", "bitfit", "prompt"]):
        spec, rate = _METHODS[name]
        yield f"training {spec}"
        one = adapter_learned(run, spec, "fp32", steps=_STEPS, learning_rate=rate)
        gains[name] = one.before - one.after
        found[f"{name}_gain"] = Quantity(gains[name], "nats/token")
        found[f"{name}_numbers"] = Quantity(one.parameters, "")
        found[f"{name}_bytes"] = Quantity(one.nbytes / 1e6, "MB")
        found[f"{name}_seconds"] = Quantity(one.seconds, "s")
    found["lora_of_whole_gain"] = Quantity(gains["lora"] / gain, "x")
    found["lora_share"] = Quantity(found["lora_numbers"].value / whole.parameters, "of the model")
    weaker = max(gains["prompt"], gains["bitfit"])
    for name in ("lora", "dora", "adalora"):
        found[f"{name}_above_weaker"] = Quantity(gains[name] - weaker, "nats/token")
    return found


CLAIM = Claim(
    name="adapter-methods",
    title="Ten ways to train few numbers, side by side",
    source="Han et al. 2024, arXiv:2403.14608",
    headline=(
        "A survey's families of parameter-efficient tuning on one task: what is gained with which share of the numbers."
    ),
    scale=(
        "SmolLM2-135M-Instruct in fp32; 30 steps of 256 tokens of Python's standard library (modules a to m) from the "
        "same start on the same batches, each method with one learning rate that is usual for it, the whole model with "
        "1e-4; loss on 2,048 tokens of other modules and the manual. Peak memory is not measured."
    ),
    bars=(
        Bar(
            quantity="lora_of_whole_gain",
            relation=">=",
            value=0.7,
            unit="x",
            why="Few numbers must bring most of what training all of them brings.",
        ),
        Bar(
            quantity="lora_share",
            relation="<=",
            value=0.03,
            unit="of the model",
            why="Gradients and optimizer state take that share of what the whole model needs.",
        ),
        *(
            Bar(
                quantity=f"{name}_above_weaker",
                relation=">=",
                value=0.0,
                unit="nats/token",
                why="It has more numbers than a prompt or biases, and must gain more.",
            )
            for name in ("lora", "dora", "adalora")
        ),
    ),
    measure=_measure,
)
