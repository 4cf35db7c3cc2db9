"""An adapter on a model: where its changes sit, how it is merged, and its form in a native program.

Shapes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from plait.errors import ConfigError, IncompatibleError, suggestion
from plait.memory import FrozenStrand, MemoryPlan, Past, Rows
from plait.memory.memory import check_precede
from plait.nn.layers import FeedForward
from plait.nn.mixers.attention import Attention
from plait.nn.routing import PartHook
from plait.nn.transformer import Block, Transformer
from plait.ops import native
from plait.weights import Dense, Linear, Packed
from plait.weights.adapters import (
    AdapterConfig,
    Beginning,
    Change,
    Embeddings,
    Geometry,
    KeysAndValues,
    Matrix,
)

__all__ = ["Adapter", "Site", "fingerprint", "geometry_of", "new_adapter", "sites_of"]

# The products of a layer as the native program numbers them.
_NATIVE = {"query": 0, "key": 0, "value": 0, "output": 1, "gate": 2, "up": 3, "down": 4}


class Site(NamedTuple):
    """A matrix of a model, and the linear layer that it is rows [first, first + outputs) of."""

    matrix: Matrix
    linear: Linear
    first: int
    layer: int


def sites_of(model: Transformer) -> dict[str, Site]:
    """The matrices of a model's blocks that adapters can change, by name."""
    found: dict[str, Site] = {}
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        for linear, parts in _linears(block):
            first = 0
            for name, outputs in parts:
                full = f"blocks.{layer}.{name}"
                bias = None if linear.bias is None else linear.bias[first : first + outputs]
                matrix = Matrix(full, outputs, linear.weight.shape[1], _Rows(linear, first, outputs), bias)
                found[full] = Site(matrix, linear, first, layer)
                first += outputs
    return found


def _linears(block: Block) -> list[tuple[Linear, list[tuple[str, int]]]]:
    """The linear layers of a block, with the names and outputs of the matrices that each is made of."""
    found: list[tuple[Linear, list[tuple[str, int]]]] = []
    mixer, feed_forward = block.mixer, block.feed_forward
    if isinstance(mixer, Attention):
        queries = mixer.config.num_heads * mixer.config.head_dim
        keys = mixer.config.num_kv_heads * mixer.config.head_dim
        parts = [("mixer.query", queries), ("mixer.key", keys), ("mixer.value", keys)]
        found += [(mixer.qkv, parts), (mixer.output, [("mixer.output", mixer.output.weight.shape[0])])]
    assert isinstance(feed_forward, FeedForward)
    size = feed_forward.config.size
    names = ["gate", "up"] if feed_forward.config.gated else ["up"]
    found.append((feed_forward.up, [(f"feed_forward.{name}", size) for name in names]))
    found.append((feed_forward.down, [("feed_forward.down", feed_forward.down.weight.shape[0])]))
    return found


class _Rows:
    """Rows of a part of a packed matrix, dense."""

    def __init__(self, linear: Linear, first: int, count: int) -> None:
        self.linear, self.first, self.count = linear, first, count

    def __call__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.count)
        at = slice(self.first + start, self.first + stop)
        return self.linear.weight.unpack_rows(at).detach().float()


class Adapter(nn.Module):
    """A method's changes at some matrices of one model. The model itself is never written to.

    Args:
        config: the method.
        model: that it is for.
        changes: by the names of matrices; see `sites_of`.
        beginning: what it puts before every text, or None.
        name: what it is called.

    Raises:
        ConfigError: a matrix that the model does not have, or no change at all.
    """

    def __init__(
        self,
        config: AdapterConfig,
        model: Transformer,
        changes: Mapping[str, Change],
        name: str = "adapter",
        *,
        beginning: Beginning | None = None,
    ) -> None:
        super().__init__()
        self.config, self.name = config, name
        self.shared: dict[str, Tensor] = {}
        self.base = fingerprint(model)
        self._sites = sites_of(model)
        unknown = next((name for name in changes if name not in self._sites), None)
        if unknown is not None:
            raise ConfigError(f"The model has no matrix {unknown!r}.{suggestion(unknown, self._sites)}")
        if not changes and beginning is None:
            raise ConfigError("The adapter changes nothing: none of its targets is a matrix of this model.")
        self.at: dict[str, Change] = dict(changes)
        self.beginning = beginning
        self._strands: list[FrozenStrand] | None = None
        self._geometry = geometry_of(model)
        if beginning is not None and not self._geometry.layers:
            raise IncompatibleError(
                f"{config.name} puts rows before every text, which needs attention with rotary positions that do not "
                f"depend on the length, in layers that are alike. This {model.config.family} model has others. "
                "Choose lora."
            )
        for site, change in changes.items():
            self.add_module(site.replace(".", "/"), change)
        _install(model)
        self._native: Any = None

    @property
    def num_parameters(self) -> int:
        """Numbers that are stored and, but for frozen ones, trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def nbytes(self) -> int:
        """Bytes of the parameters, shared tensors included."""
        tensors = [*self.parameters(), *self.shared.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def prompt(self) -> Tensor | None:
        """Rows to be read before every text, (L, W); None for none."""
        return self.beginning.numbers if isinstance(self.beginning, Embeddings) else None

    def prefix(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values before the text in a layer, (G, L, D) each; None for none."""
        if not isinstance(self.beginning, KeysAndValues):
            return None
        return self.beginning.layer(layer, self._geometry)

    def check_plan(self, plan: MemoryPlan) -> None:
        """Raise where a memory would hide what this adapter puts before every text.

        Raises:
            IncompatibleError: the memory does not keep every token as it is.
        """
        if self.beginning is not None:
            check_precede(plan)

    def begin(self, model: Transformer, past: Past) -> None:
        """Put what stands before every text into an empty past, as strands that all such pasts share.

        Raises:
            IncompatibleError: the memory would hide it.
        """
        if self.beginning is None:
            return
        if self._strands is None:
            with torch.inference_mode(False), torch.no_grad():
                self._strands = self._made_strands(model)
        for memory, strand in zip(past.memories("put before the text"), self._strands, strict=True):
            memory.precede(strand)

    def _made_strands(self, model: Transformer) -> list[FrozenStrand]:
        prompt, plan = self.prompt(), MemoryPlan()
        if prompt is not None:
            past = model.new_past(plan, None)
            model(None, Rows([(len(prompt), 0)]), [past], embeddings=prompt.detach())
            past.commit()
            found = []
            for memory in past.memories("put before the text"):
                (strand,) = memory.run(0, len(prompt))
                assert isinstance(strand, FrozenStrand)
                found.append(strand.moved(-len(prompt)))
            return found
        heads = [memory.heads for memory in model.new_past(plan, None).memories("put before the text")]
        made = []
        for layer, of_layer in enumerate(heads):
            pair = self.prefix(layer)
            assert pair is not None
            keys, values = (part.detach().contiguous() for part in pair)
            # Keys stand unrotated in a frame of their own, so that a query turns by its distance to its start.
            made.append(FrozenStrand(of_layer, keys, values, offset=-keys.shape[1]))
        return made

    def check_model(self, model: Transformer) -> None:
        """Raise where this adapter was made for another model.

        Raises:
            IncompatibleError: the models differ in their shape or in their last norm.
        """
        if fingerprint(model) != self.base:
            raise IncompatibleError(
                f"The adapter {self.name!r} was made for another model. Load it on the model it was trained on."
            )

    def merged(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """What the changed matrices and their biases become, by name: (O, I) and (O,) or None, fp32.

        Raises:
            IncompatibleError: a bias would have to be added to a matrix that has none, or the method changes no
                matrices.
        """
        if self.beginning is not None:
            raise IncompatibleError(
                f"{self.config.name} puts rows before every text, which no matrix can. Use it as an adapter."
            )
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        with torch.no_grad():
            for name, change in self.at.items():
                matrix, delta = self._sites[name].matrix, change.delta()
                if delta.bottleneck is not None:
                    raise IncompatibleError(
                        f"{self.config.name} has an activation inside, which no matrix can. Use it as an adapter."
                    )
                weight, bias = matrix.rows(slice(None)), matrix.bias
                if delta.input_scale is not None:
                    weight = weight * delta.input_scale
                if delta.output_scale is not None:
                    weight = weight * delta.output_scale[:, None]
                    bias = None if bias is None else bias * delta.output_scale
                if delta.down is not None and delta.up is not None:
                    weight = weight + delta.up @ delta.down
                if delta.bias is not None:
                    if bias is None and bool((delta.bias != 0).any()):
                        raise IncompatibleError(
                            f"{self.config.name} adds a bias to {name}, which has none in this model, so it cannot "
                            "be merged. Use it as an adapter."
                        )
                    bias = None if bias is None else bias + delta.bias
                found[name] = (weight, bias)
        return found

    @torch.no_grad()
    def merge(self) -> Merged:
        """Write the changes into the model, for as long as the result is not undone.

        Returns:
            What `undo` brings the model back with, to the bit: the matrices as they were are kept.

        Raises:
            IncompatibleError: the matrices are packed, where merging would mean to quantise them again, or the
                method cannot be merged.
        """
        for name in self.at:
            weight = self._sites[name].linear.weight
            if not all(isinstance(piece, Dense) for piece in weight.pieces()):
                raise IncompatibleError(
                    f"{name} is kept in {weight.format}: merging would quantise it again. Use the adapter as it is, or "
                    "merge into a copy in fp32: plait adapters merge."
                )
        before: dict[int, tuple[Linear, Packed, Tensor | None]] = {}
        for name, (changed, changed_bias) in self.merged().items():
            site = self._sites[name]
            linear, rows = site.linear, slice(site.first, site.first + site.matrix.outputs)
            if id(linear) not in before:
                kept = None if linear.bias is None else linear.bias.clone()
                before[id(linear)] = (linear, linear.weight, kept)
                linear.weight = Dense(linear.weight.unpack().clone())
            assert isinstance(linear.weight, Dense)
            linear.weight.weight[rows] = changed.to(linear.weight.weight.dtype)
            if linear.bias is not None and changed_bias is not None:
                linear.bias[rows] = changed_bias
        return Merged(list(before.values()))

    def to_native(self) -> Any:
        """The form that a native program reads, made once; None where a change has none."""
        if self._native is None:
            made = _native_form(self)
            self._native = (made,)
        return self._native[0]

    def train(self, mode: bool = True) -> Adapter:
        self._native = self._strands = None
        for change in self.at.values():
            change._fixed = None
        super().train(mode)
        return self


class Merged:
    """An adapter that is written into its model."""

    def __init__(self, before: Sequence[tuple[Linear, Packed, Tensor | None]]) -> None:
        self._before = list(before)

    @torch.no_grad()
    def undo(self) -> None:
        """Bring back every matrix and bias, to the bit; a second call does nothing."""
        for linear, weight, bias in self._before:
            linear.weight = weight
            if linear.bias is not None and bias is not None:
                linear.bias.copy_(bias)
        self._before = []


def new_adapter(
    config: AdapterConfig,
    model: Transformer,
    *,
    seed: int = 0,
    name: str = "adapter",
    original: Transformer | None = None,
) -> Adapter:
    """An adapter to be trained, which leaves the model's answers as they are or brings them nearer to the original's.

    Args:
        config: the method.
        model: that it is for; it is not changed.
        seed: of its random numbers.
        original: the model that this one was packed from, for methods that start from what packing lost.

    Raises:
        ConfigError: no matrix of the model is a target, the rank is too large for one, or the method needs the original.
        IncompatibleError: the original is another model.
    """
    generator = torch.Generator().manual_seed(seed)
    geometry = geometry_of(model)
    beginning = config.beginning(geometry, generator)
    if beginning is not None:
        return Adapter(config, model, {}, name, beginning=beginning)
    places = config.places()
    chosen = [site.matrix for site in sites_of(model).values() if site.matrix.place in places]
    if not chosen:
        raise ConfigError(
            f"{config} targets {config.targets}, and the model has no such matrix in its blocks."
        )
    if original is not None:
        if fingerprint(original) != fingerprint(model):
            raise IncompatibleError("The original is not the model that this one was packed from.")
        before = sites_of(original)
        chosen = [matrix._replace(original=before[matrix.name].matrix.rows) for matrix in chosen]
    shared = config.shared(chosen)
    changes = {matrix.name: config.change(matrix, generator, shared) for matrix in chosen}
    made = Adapter(config, model, changes, name)
    made.shared = shared
    return made


def geometry_of(model: Transformer) -> Geometry:
    """What beginnings have to know of a model; zeros where nothing can be put before its texts."""
    mixers = [block.mixer for block in model.blocks if isinstance(block, Block)]
    shapes = {
        (mixer.config.num_kv_heads, mixer.config.head_dim) if isinstance(mixer, Attention) else None
        for mixer in mixers
    }
    ropes = [mixer.heads.rope for mixer in mixers if isinstance(mixer, Attention)]
    config = model.config
    (shape,) = shapes if len(shapes) == 1 else (None,)
    is_plain = all(rope is None or rope.rule is None for rope in ropes) and config.embedding_scale == 1.0
    if shape is None or not is_plain or config.learned_positions or config.embedding_width is not None:
        return Geometry(0, 0, 0, 0)
    return Geometry(config.width, len(mixers), *shape)


def fingerprint(model: Transformer) -> str:
    """What tells models apart that adapters are for: the shape, and the weights of the last norm.

    Packed and plain copies of one model have the same.
    """
    config = model.config
    shape = [config.family, config.vocab_size, config.width, len(config.blocks)]
    shape += [[site.matrix.outputs, site.matrix.inputs] for site in sites_of(model).values()]
    digest = hashlib.sha256(json.dumps(shape).encode())
    weight = getattr(model.norm, "weight", None)
    if weight is not None:
        digest.update(weight.detach().to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _install(model: Transformer) -> None:
    """Let the products of a model look up adapters; those of rows without one stay the same, to the bit."""
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        if isinstance(block.mixer, Attention):
            block.mixer.layer = layer
        for linear, parts in _linears(block):
            if linear.hook is None:
                linear.hook = PartHook([(f"blocks.{layer}.{name}", count) for name, count in parts])


def _native_form(adapter: Adapter) -> Any:
    by_product: dict[tuple[int, int], list[tuple[int, Site, Change]]] = {}
    for name, change in adapter.at.items():
        site = adapter._sites[name]
        number = _NATIVE[site.matrix.place]
        # Gate and up are one layer here, and two products of the program.
        first = 0 if number in (2, 3) else site.first
        by_product.setdefault((site.layer, number), []).append((first, site, change))
    made = native.extension().Adapter(1 + max(site.layer for site in adapter._sites.values()))
    for (layer, number), parts in by_product.items():
        linear = parts[0][1].linear
        inputs = linear.weight.shape[1]
        outputs = parts[0][1].matrix.outputs if number in (2, 3) else linear.weight.shape[0]
        scale, bias = torch.ones(outputs), torch.zeros(outputs)
        has_scale = has_bias = False
        input_scale: Tensor | None = None
        low: list[tuple[int, Tensor, Tensor]] = []
        neck: tuple[Tensor, Tensor, Tensor, Tensor, int, bool] | None = None
        for first, site, change in parts:
            delta, rows = change.fixed(), slice(first, first + site.matrix.outputs)
            if delta.input_scale is not None:
                if number not in (1, 4):
                    return None
                input_scale = delta.input_scale
            if delta.output_scale is not None:
                scale[rows], has_scale = delta.output_scale, True
            if delta.bias is not None:
                bias[rows], has_bias = delta.bias, True
            if delta.down is not None and delta.up is not None:
                low.append((first, delta.down.contiguous(), delta.up.t().contiguous()))
            if delta.bottleneck is not None:
                down, down_bias, up, up_bias, activation, reads_output = delta.bottleneck
                neck = (
                    down,
                    down_bias,
                    up.t().contiguous(),
                    up_bias,
                    native.ACTIVATIONS[activation],
                    reads_output,
                )
        made.set(
            layer, number, inputs, outputs, input_scale, scale if has_scale else None, bias if has_bias else None, low,
            neck,
        )  # fmt: skip
    return made
