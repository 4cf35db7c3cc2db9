"""A training run as data: what is trained, on what, towards what, and for how long."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import Field

from plait.errors import ConfigError
from plait.memory import MemoryPlan
from plait.nn import BlockConfig, FeedForwardConfig, NormConfig, TransformerConfig
from plait.nn.distance_bias import DistanceBiasConfig
from plait.nn.mixers import AttentionConfig
from plait.nn.rotary import RopeConfig
from plait.spec import Spec, settings_of
from plait.train.objectives import Objective
from plait.train.tuners import Tuner
from plait.weights.adapters import AdapterConfig

__all__ = ["FULL", "ModelShape", "RunConfig", "Training", "changed"]

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]

S = TypeVar("S", bound=Spec)

# Attention that sees everything, which the parallel form of a model computes in one operation.
FULL = "full"


@dataclass(frozen=True, kw_only=True)
class ModelShape(Spec):
    """A new model of Llama's kind: RMS norms, gated feed-forwards, tied head, and rotary attention unless said otherwise.

    Args:
        width: of a row between blocks.
        blocks: how many.
        heads, kv_heads: query heads, and key/value heads, which divide them.
        inner: width of the feed-forwards.
        vocab_size: tokens to learn from the corpus; the model has as many as were found.
        context: longest sequence, in tokens.
        rotary: whether queries and keys are rotated.
        distance_bias: what is taken off scores by distance, such as `harmonic` or `linear`, or none. Models that have
            one, or are not rotary, are files that Plait alone opens.
    """

    width: Count = 384
    blocks: Count = 6
    heads: Count = 6
    kv_heads: Count = 2
    inner: Count = 1024
    vocab_size: Annotated[int, Field(ge=258)] = 4096
    context: Annotated[int, Field(ge=2)] = 512
    rotary: bool = True
    distance_bias: DistanceBiasConfig | None = None

    def check(self) -> None:
        if self.width % self.heads or self.width // self.heads % 2:
            raise ConfigError(
                f"ModelShape.heads must cut the width of {self.width} into heads of an even size. Got {self.heads}."
            )

    def transformer(self, vocab_size: int, placeholder: int | None) -> TransformerConfig:
        """The model, for a vocabulary that has been learned."""
        head_dim = self.width // self.heads
        mixer = AttentionConfig(
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=head_dim,
            rope=RopeConfig(dim=head_dim) if self.rotary else None,
            distance_bias=self.distance_bias,
        )
        block = BlockConfig(mixer=mixer, feed_forward=FeedForwardConfig(size=self.inner))
        return TransformerConfig(
            family="llama" if self.rotary and self.distance_bias is None else "plait",
            vocab_size=vocab_size,
            width=self.width,
            blocks=(block,) * self.blocks,
            norm=NormConfig(),
            max_positions=self.context,
            tied_head=True,
            placeholder=placeholder,
        )


@dataclass(frozen=True, kw_only=True)
class Training(Spec):
    """How long and how fast to train: AdamW, a linear warm-up, then half a cosine down to a floor.

    Args:
        steps: updates of the parameters.
        rows: tokens of one step, packed without padding.
        context: longest piece of a document, in tokens.
        seed: of the new parameters and of the order of the data.
        learning_rate: at its highest.
        warmup: steps until then.
        floor: share of the learning rate that is left at the end.
        beta1, beta2, weight_decay: of AdamW; norms and biases do not decay.
        clip: largest norm of the whole gradient; larger ones are scaled down.
        save_every: steps between checkpoints.
        evaluate_every: steps between measurements on held-out text.
    """

    steps: Count = 1000
    rows: Annotated[int, Field(ge=2)] = 2048
    context: Annotated[int, Field(ge=2)] = 256
    seed: Annotated[int, Field(ge=0)] = 0
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    warmup: Annotated[int, Field(ge=0)] = 50
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    beta1: Share = 0.9
    beta2: Share = 0.95
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    save_every: Count = 100
    evaluate_every: Count = 100

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (
            self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig(Spec):
    """Everything that decides what a run computes, beside its data; kept in every checkpoint.

    Args:
        model: the model as data.
        objective: what is learned.
        training: how long and how fast.
        start: the model whose parameters the run starts from, or empty for new ones.
        corpus: what the data was made of, in words.
        adapter: what is trained beside a model that is not; None where the model itself is.
        weights: how that model is kept, as `plait.load` takes it.
        base: fingerprint of that model.
        original: the model that it was packed from, where the adapter starts from what packing lost.
        tuner: how codes are chosen anew, where `start` is a packed model whose numbers are trained; None elsewhere.
        teacher: the model that it was packed from.
        memory: what the model learns to read through, as `plait.load` takes it.
    """

    model: TransformerConfig
    objective: Objective
    training: Training
    start: str = ""
    corpus: str = ""
    adapter: AdapterConfig | None = None
    weights: str = "auto"
    base: str = ""
    original: str = ""
    tuner: Tuner | None = None
    teacher: str = ""
    memory: str = FULL

    def check(self) -> None:
        self.plan()

    def plan(self, step: int | None = None) -> MemoryPlan | None:
        """The memory of a step, counted from 0, with the draws of that step; of measurements when left out.

        Returns:
            None for full attention.

        Raises:
            ConfigError: an unknown method or setting.
            IncompatibleError: no gradient flows through it.
        """
        if self.memory == FULL:
            return None
        plan = MemoryPlan.parse(self.memory)
        if step is not None:
            plan = dataclasses.replace(
                plan, policy=plan.policy.redrawn(self.training.seed * 1_000_003 + step)
            )
        return dataclasses.replace(plan, differentiable=True)


def changed(base: S, settings: str) -> S:
    """A copy of a config with some settings replaced, given as `key=value,key=value`.

    Raises:
        ConfigError: an unknown setting, or a value outside its limits.
    """
    given = settings_of(settings)
    new = type(base).from_settings(given)
    return dataclasses.replace(base, **{key: getattr(new, key) for key in given})  # type: ignore[type-var]
