"""What a model family is: a reading of its configuration, and the names its files use.

To add one: one file in `plait/nn/families/` that makes a `Family`, and one entry in that folder's
`__init__.py`. Files of both kinds (Hugging Face folders and GGUF) are read through one configuration:
GGUF metadata is first put into the words of a Hugging Face `config.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from plait.errors import ConfigError
from plait.nn.config import Activation, BlockConfig, FeedForwardConfig, NormConfig, TransformerConfig
from plait.nn.families.settings import Settings, shown_value
from plait.nn.mixers import AttentionConfig
from plait.nn.parameters import Entry
from plait.nn.rotary import SCALINGS, RopeConfig, RopeScaling

__all__ = [
    "ACTIVATIONS",
    "Family",
    "Names",
    "attention",
    "decoder",
    "expand",
    "interleaved_rows",
    "layer_windows",
    "projections",
    "rope_config",
    "stacked_rows",
]

Names = dict[str, str | Entry]

# From the names that Transformers gives activations to ours; several of them are one function.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family.

    Args:
        name: such as `llama`.
        model_types: values of `model_type` in a `config.json`.
        architectures: values of `general.architecture` in GGUF metadata.
        config: from settings to the model as data.
        names: from a configuration to where a Hugging Face checkpoint keeps each parameter.
        gguf_names: the same for GGUF.
        gguf_settings: adds what GGUF metadata leaves out, known of the architecture or told by which
            tensors there are; takes the settings and the names of the tensors.
        prefix: start of tensor names that checkpoints of the bare model, without its head, leave out.
        ignored: ends of the names of tensors that hold no parameters.
        settings: from a configuration to the `config.json` that describes it, for families that are
            written too; what it cannot say shows when it is read back.
    """

    name: str
    model_types: tuple[str, ...]
    config: Callable[[Settings], TransformerConfig]
    names: Callable[[TransformerConfig], dict[str, Entry]]
    architectures: tuple[str, ...] = ()
    gguf_names: Callable[[TransformerConfig], dict[str, Entry]] | None = None
    gguf_settings: Callable[[Settings, Collection[str]], None] = lambda settings, tensors: None
    prefix: str = "model."
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)
    settings: Callable[[TransformerConfig], dict[str, Any]] | None = None


# Reading configurations.


def attention(settings: Settings, **choices: Any) -> AttentionConfig:
    """The attention of a block, its head counts read from the settings.

    Args:
        choices: further fields of `AttentionConfig`.
    """
    width = settings.count("hidden_size", "n_embd")
    heads = settings.count("num_attention_heads", "n_head")
    head_dim = settings.optional_count("head_dim")
    if head_dim is None:
        if width % heads:
            raise ConfigError(
                f"the configuration has {heads} attention heads, which do not divide its width {width}."
            )
        head_dim = width // heads
    kv_heads = settings.count("num_key_value_heads", default=heads)
    return AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, **choices)


def decoder(
    settings: Settings,
    family: str,
    *,
    mixers: Sequence[AttentionConfig],
    feed_forward: FeedForwardConfig,
    norm: NormConfig,
    norms: Literal["pre", "post", "sandwich"] = "pre",
    max_positions: int,
    tied: bool,
    **choices: Any,
) -> TransformerConfig:
    """A decoder whose blocks differ in their mixers only.

    Args:
        max_positions: longest sequence, where the settings do not say.
        tied: whether the head is the embedding, where the settings do not say.
        choices: further fields of `TransformerConfig`.
    """
    return TransformerConfig(
        family=family,
        vocab_size=settings.count("vocab_size"),
        width=settings.count("hidden_size", "n_embd"),
        blocks=tuple(BlockConfig(mixer=mixer, feed_forward=feed_forward, norms=norms) for mixer in mixers),
        norm=norm,
        max_positions=settings.count("max_position_embeddings", "n_positions", default=max_positions),
        tied_head=settings.flag("tie_word_embeddings", default=tied),
        placeholder=settings.optional_count("placeholder_token_id", least=0),
        **choices,
    )


def rope_config(
    settings: Settings,
    head_dim: int,
    *,
    max_positions: int,
    layer_type: str | None = None,
    theta_key: str = "rope_theta",
    theta: float = 10000.0,
) -> RopeConfig:
    """The rotary positions of a layer, from `rope_parameters` or from `rope_theta` and `rope_scaling`.

    Args:
        head_dim: channels of a head; all are rotated unless the settings say otherwise.
        max_positions: longest sequence, where the settings do not say.
        layer_type: the entry to take from `rope_parameters` that differ by type of layer.
        theta_key, theta: the setting that holds the base outside `rope_parameters`, and the base where
            the settings do not say.

    Raises:
        ConfigError: a scaling or a setting of one that is not known, or a value outside its limits.
    """
    given = settings.get("rope_scaling", "rope_parameters") or {}
    if isinstance(given, Mapping) and layer_type in given:
        given = given[layer_type] or {}
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"the configuration sets rope_parameters to {shown_value(given)}, not to an object."
        )
    given = {str(key): value for key, value in given.items() if value is not None}
    own = Settings(given)
    base = own.optional_number("rope_theta") or settings.number(theta_key, default=theta)
    part = own.optional_number("partial_rotary_factor") or settings.number(
        "partial_rotary_factor", default=1.0
    )
    dim = settings.count("rotary_dim", default=max(1, int(head_dim * min(part, 2.0))))
    longest = settings.count("max_position_embeddings", default=max_positions)
    trained = settings.optional_count("original_max_position_embeddings")
    return RopeConfig(theta=base, dim=dim, scaling=_scaling(given, longest, trained))


# Keys of `rope_parameters` that are not fields of a scaling.
_OTHER_KEYS = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "finetuned"}


def _scaling(given: dict[str, Any], longest: int, trained: int | None) -> RopeScaling | None:
    """The scaling that an object of `rope_parameters` describes; None for plain rotary positions.

    Args:
        longest: longest sequence of the model.
        trained: longest sequence before it was stretched, where it stands outside the object.
    """
    fields = {name: dataclasses.fields(cls) for name, cls in SCALINGS.methods.items()}  # type: ignore[arg-type]
    known = _OTHER_KEYS.union(*({field.name for field in own} for own in fields.values()))
    unknown = sorted(given.keys() - known)
    if unknown:
        raise ConfigError(
            f"rope_parameters sets {unknown[0]} to {shown_value(given[unknown[0]])}, which is not implemented."
        )
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in fields:
        raise ConfigError(
            f"the configuration sets rope_type to {shown_value(kind)}."
            f" It must be one of default, {', '.join(SCALINGS.names())}."
        )
    if kind == "dynamic":
        given = given | {"original_max_position_embeddings": longest}
    elif trained is not None:
        given = given | {"original_max_position_embeddings": trained}
    before = Settings(given).count("original_max_position_embeddings", default=longest)
    derived: dict[str, float] = {"original_max_position_embeddings": before}
    if kind in ("yarn", "longrope"):
        derived["factor"] = longest / before
    given = derived | given
    for field in fields[kind]:
        if field.default is dataclasses.MISSING and field.name not in given:
            raise ConfigError(f"rope_parameters of type {kind} need {field.name}, which is absent.")
    scaling = SCALINGS.find(kind)(
        **{field.name: given[field.name] for field in fields[kind] if field.name in given}
    )
    assert isinstance(scaling, RopeScaling)
    return scaling


def layer_windows(
    settings: Settings, window: int | None, sliding: Callable[[int], bool] = lambda i: True
) -> list[int | None]:
    """The window of each block: None where it sees everything.

    Args:
        window: of the blocks that have one; None when none has.
        sliding: which blocks have it, where `layer_types` does not say.

    Raises:
        ConfigError: `layer_types` is not a list of known types, one for each block, or asks for a window
            when there is none.
    """
    blocks = range(settings.num_blocks())
    types = settings.get("layer_types")
    if types is None:
        return [window if sliding(i) else None for i in blocks]
    if not isinstance(types, list) or len(types) != len(blocks):
        raise ConfigError(
            f"the configuration sets layer_types to {shown_value(types)}."
            f" It must be a list with a type for each of {len(blocks)} blocks."
        )
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(
                f"layer_types has {shown_value(kind)}. It must hold full_attention and sliding_attention only."
            )
    if window is None and "sliding_attention" in types:
        raise ConfigError("layer_types has sliding_attention, but the configuration has no sliding_window.")
    return [window if kind == "sliding_attention" else None for kind in types]


# Writing tables of names.


def expand(names: Mapping[str, str | Entry], num_blocks: int) -> dict[str, Entry]:
    """Write out a table of names for every block.

    Args:
        names: from our name to the file's; `{i}` on both sides stands for the block's number.
    """
    entries: dict[str, Entry] = {}
    for ours, theirs in names.items():
        entry = theirs if isinstance(theirs, Entry) else Entry(theirs)
        for i in range(num_blocks) if "{i}" in ours else [0]:
            entries[ours.format(i=i)] = entry._replace(name=entry.name.format(i=i))
    return entries


def projections(ours: str, theirs: str, parts: Mapping[str, str]) -> Names:
    """Names of the weights and biases of several projections.

    Args:
        ours, theirs: names with `{part}` where the projection's own name belongs.
        parts: from our name of each projection to the file's.
    """
    return {
        f"{ours.replace('{part}', mine)}.{kind}": f"{theirs.replace('{part}', other)}.{kind}"
        for mine, other in parts.items()
        for kind in ("weight", "bias")
    }


def stacked_rows(
    ours: str, theirs: str, parts: Mapping[str, int], *, transposed: bool = False
) -> dict[str, Entry]:
    """Entries of projections that a file keeps on top of each other, weights and biases.

    Args:
        ours: name with `{part}` where the projection's own name belongs.
        theirs: name of the tensor that holds them all.
        parts: from our name of each projection to its number of rows, in the order of the file.
        transposed: weights are stored as (inputs, outputs).
    """
    entries: dict[str, Entry] = {}
    start = 0
    for place, (part, rows) in enumerate(parts.items(), start=1):
        # The last part reaches to the end, so that rows left over show as a wrong shape.
        own = slice(start, None if place == len(parts) else start + rows)
        name = ours.replace("{part}", part)
        entries[f"{name}.weight"] = Entry(f"{theirs}.weight", rows=own, transposed=transposed)
        entries[f"{name}.bias"] = Entry(f"{theirs}.bias", rows=own)
        start += rows
    return entries


def interleaved_rows(head_dim: int) -> Callable[[int], Tensor]:
    """How to put rows that pair channels (2c, 2c + 1) into the order that pairs (c, c + head_dim / 2)."""

    def index(num_rows: int) -> Tensor:
        return torch.arange(num_rows).view(-1, head_dim // 2, 2).transpose(1, 2).reshape(-1)

    return index
