"""A model as data: every family is one of these, and a family's variants differ in values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from plait.errors import ConfigError
from plait.spec import Axis, Spec

if TYPE_CHECKING:
    from plait.nn.mixers.base import Mixer
    from plait.nn.parameters import Parameters

__all__ = [
    "MIXERS",
    "Activation",
    "BlockConfig",
    "FeedForwardConfig",
    "MixerConfig",
    "NormConfig",
    "TransformerConfig",
]

MIXERS = Axis("mixer")

Count = Annotated[int, Field(ge=1)]
Softcap = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


class MixerConfig(Spec, axis=MIXERS):
    """The part of a block in which tokens exchange information.

    To add one: one file in `plait/nn/mixers/` with a frozen dataclass that derives from this class
    and the `Mixer` it builds, and one import in that folder's `__init__.py`.
    """

    def build(self, width: int, norm: NormConfig, parameters: Parameters) -> Mixer:
        """Make the module, with parameters drawn from `parameters`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class NormConfig(Spec):
    """Normalisation over the width of a row.

    Args:
        kind: `rms` (root mean square) or `layer` (mean and variance).
        epsilon: added to the mean square or variance.
        has_weight, has_bias: whether a layer norm has them; an RMS norm has a weight only.
    """

    kind: Literal["rms", "layer"] = "rms"
    epsilon: Annotated[float, Field(ge=0)] = 1e-6
    has_weight: bool = True
    has_bias: bool = True


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig(Spec):
    """The part of a block that works on each token alone.

    Args:
        size: inner width.
        activation: `silu`, `gelu`, `gelu_tanh` or `relu`.
        gated: `down(activation(gate(x)) * up(x))` when true, else `down(activation(up(x)))`.
        bias: whether the projections have biases.
    """

    size: Count
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class BlockConfig(Spec):
    """One block: a mixer, then a feed-forward, each with a residual connection.

    Args:
        mixer: how tokens exchange information.
        feed_forward: what happens to each token alone.
        norms: `pre` (normalise the input of each part), `post` (normalise after the residual sum)
            or `sandwich` (normalise both the input and the output of each part).
    """

    mixer: MixerConfig
    feed_forward: FeedForwardConfig
    norms: Literal["pre", "post", "sandwich"] = "pre"


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Spec):
    """A decoder.

    Args:
        family: name of the model family, such as `llama`.
        vocab_size: number of token ids.
        width: size of a row between blocks.
        embedding_width: size of an embedding row where it differs from `width`, else None.
        blocks: one configuration for each block.
        norm: used between and at the end of blocks.
        max_positions: longest sequence that the model was made for, in tokens.
        learned_positions: rows of a learned position table, or None.
        position_shift: added to a position before it is looked up in that table.
        embedding_scale: factor on embedding rows.
        final_norm: whether rows are normalised before the output head.
        tied_head: whether the output head is the embedding matrix.
        head_bias: whether the output head has a bias.
        logit_scale: factor on logits.
        logit_softcap: c in `c * tanh(logit / c)`, or None.
        placeholder: id that stands for a token which is not known yet, or None. It is read, never
            predicted: its logit is -inf.
    """

    family: str
    vocab_size: Count
    width: Count
    blocks: tuple[BlockConfig, ...]
    norm: NormConfig
    max_positions: Count
    embedding_width: Count | None = None
    learned_positions: Count | None = None
    position_shift: Annotated[int, Field(ge=0)] = 0
    embedding_scale: float = 1.0
    final_norm: bool = True
    tied_head: bool = False
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: Softcap | None = None
    placeholder: Annotated[int, Field(ge=0)] | None = None

    def check(self) -> None:
        if self.placeholder is not None and self.placeholder >= self.vocab_size:
            raise ConfigError(
                f"TransformerConfig.placeholder must be an id below the vocabulary of {self.vocab_size}. "
                f"Got {self.placeholder}."
            )
