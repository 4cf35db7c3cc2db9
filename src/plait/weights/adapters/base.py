"""What every adapter method offers: small changes of a frozen matrix's product, one at each place it is put.

Shapes: O outputs, I inputs, R rank, N rows; at the end of a branch O is the width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from plait import ops
from plait.errors import ConfigError
from plait.spec import Axis, Spec

__all__ = [
    "ADAPTERS",
    "PLACES",
    "AdapterConfig",
    "Beginning",
    "Bottleneck",
    "Change",
    "Delta",
    "Geometry",
    "Matrix",
    "check_rank",
    "check_shape",
    "number",
    "peft_settings",
    "uniform_",
]

ADAPTERS = Axis("adapter method")

# The matrices of a block, by the last word of their names, and what several of them together are called.
PLACES = ("query", "key", "value", "output", "gate", "up", "down")
_GROUPS = {"all": PLACES, "attention": PLACES[:4], "feed_forward": PLACES[4:]}


class Matrix(NamedTuple):
    """A matrix of a model that an adapter changes the product of.

    Attributes:
        name: in the architecture's words, such as `blocks.0.mixer.query`.
        outputs, inputs: O and I.
        rows: gives the rows of the frozen matrix, dense fp32; at most as many at once as are asked for.
        bias: (O,) of the product, or None.
        original: gives rows of the matrix that the frozen one was packed from, as `rows` does; None where it is not known.
    """

    name: str
    outputs: int
    inputs: int
    rows: Callable[[slice], Tensor]
    bias: Tensor | None = None
    original: Callable[[slice], Tensor] | None = None

    @property
    def place(self) -> str:
        """Which matrix of its block it is, such as `query`."""
        return self.name.rpartition(".")[2]


class Bottleneck(NamedTuple):
    """Two thin matrices with an activation between them, at the end of a branch: `y + up f(down z + b) + c`.

    Shapes: W the width of the model, R the numbers inside.

    Attributes:
        down: (R, W), and `down_bias`, b: (R,).
        up: (W, R), and `up_bias`, c: (W,).
        activation: f, a name that `ops.activate` knows.
        reads_output: whether z is y, what the branch comes to; else it is what the branch read.
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    activation: str
    reads_output: bool

    def of(self, z: Tensor) -> Tensor:
        """What is added to y."""
        inside = ops.activate(z @ self.down.t() + self.down_bias, self.activation)
        return inside @ self.up.t() + self.up_bias


class Delta(NamedTuple):
    """A change in the one form that every method comes to, and that the native program computes:

    `y = output_scale * (W (input_scale * x) + b) + bias + up (down x)`, and behind that a bottleneck, which is the
    only part that cannot be merged.

    Attributes:
        down: (R, I), and `up`: (O, R); None for no low-rank part.
        output_scale: (O,), `input_scale`: (I,), `bias`: (O,); None for none.
        bottleneck: of the products that end a branch, `output` and `down`; None for none.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    output_scale: Tensor | None = None
    input_scale: Tensor | None = None
    bias: Tensor | None = None
    bottleneck: Bottleneck | None = None

    def detached(self) -> Delta:
        """The same numbers, contiguous and without gradients."""
        neck = self.bottleneck
        return self._replace(
            bottleneck=None if neck is None else neck._replace(**_still(neck._asdict())),
            **_still(self._asdict()),
        )


def _still(parts: Mapping[str, object]) -> dict[str, Any]:
    """The tensors among them, contiguous and without gradients."""
    return {name: part.detach().contiguous() for name, part in parts.items() if isinstance(part, Tensor)}


class Change(nn.Module):
    """What an adapter does at one matrix. Its parameters are all that is trained and stored.

    Attributes:
        peft_names: from the names of parameters to what files of the `peft` package call them, behind the
            name of the module.
        per_output: parameters with a row for each output; others are common to matrices that a file keeps as one.
        dropout: share of the inputs of the low-rank part that is dropped in training.
    """

    peft_names: ClassVar[dict[str, str]] = {}
    per_output: ClassVar[frozenset[str]] = frozenset()
    dropout: float = 0.0

    def __init__(self) -> None:
        super().__init__()
        self._fixed: Delta | None = None

    def delta(self) -> Delta:
        """The change as it is now; gradients flow to the parameters."""
        raise NotImplementedError

    def fix(self) -> None:
        """Compute the change once, for use without gradients."""
        with torch.inference_mode(False), torch.no_grad():
            self._fixed = self.delta().detached()

    def fixed(self) -> Delta:
        """The change without gradients; computed once."""
        if self._fixed is None:
            self.fix()
        assert self._fixed is not None
        return self._fixed

    def apply_to(
        self, x: Tensor, y: Tensor, product: Callable[[Tensor], Tensor], entry: Tensor | None = None
    ) -> Tensor:
        """Change what a product gave.

        Args:
            x: (N, I).
            y: (N, O), what the frozen matrix makes of them.
            product: makes y of other inputs.
            entry: (N, O), what the branch read that the product ends; None for other products.
        """
        found = self.delta() if self.training or torch.is_grad_enabled() else self.fixed()
        if found.input_scale is not None:
            y = product(x * found.input_scale)
        if found.output_scale is not None:
            y = y * found.output_scale
        if found.bias is not None:
            y = y + found.bias
        if found.down is not None and found.up is not None:
            if self.dropout and self.training and torch.is_grad_enabled():
                x = nn.functional.dropout(x, self.dropout)
            y = y + (x @ found.down.t()) @ found.up.t()
        if found.bottleneck is None:
            return y
        read = y if found.bottleneck.reads_output else entry
        assert read is not None, "a bottleneck beside a branch, at a product that does not end one"
        return y + found.bottleneck.of(read)

    def stored(self, name: str) -> Tensor:
        """A parameter in the shape in which files have it."""
        parameter: Tensor = getattr(self, name)
        return parameter

    @classmethod
    def rows_of(cls, name: str, tensor: Tensor, rows: slice) -> Tensor:
        """The part of a stored parameter that belongs to some outputs of a matrix that a file has fused."""
        return tensor[rows] if name in cls.per_output else tensor


class Geometry(NamedTuple):
    """What a model's layers are like, as far as beginnings have to know.

    Attributes:
        width: of a row.
        layers: how many.
        num_kv_heads, head_dim: of each.
    """

    width: int
    layers: int
    num_kv_heads: int
    head_dim: int


class Beginning(nn.Module):
    """What an adapter puts before every text.

    Args:
        numbers: the trained numbers, a row for each virtual token.
    """

    def __init__(self, numbers: Tensor) -> None:
        super().__init__()
        self.numbers = nn.Parameter(numbers)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Spec, axis=ADAPTERS):
    """A way to change a frozen model by few numbers, such as `lora:rank=8`; a value object.

    To add one: one file in `plait/weights/adapters/` with a frozen dataclass that derives from this class
    and the `Change` it makes, and one import in that folder's `__init__.py`.

    Args:
        targets: which matrices of each block: `all`, `attention`, `feed_forward`, or places joined by `+`,
            such as `query+value`.

    Attributes:
        peft_type: what `adapter_config.json` of the `peft` package calls it; empty for methods it has not.
        changes: the class of its changes.
        peft_shared: what files call the shared tensors.
        needs_original: whether new changes are made from the matrices that the frozen ones were packed from.
    """

    targets: str = "all"

    peft_type: ClassVar[str] = ""
    changes: ClassVar[type[Change]]
    peft_shared: ClassVar[dict[str, str]] = {}

    def check(self) -> None:
        self.places()

    @property
    def needs_original(self) -> bool:
        return False

    def places(self) -> frozenset[str]:
        """The places that `targets` names.

        Raises:
            ConfigError: an unknown place.
        """
        found: set[str] = set()
        for word in self.targets.split("+"):
            chosen = _GROUPS.get(word) or ((word,) if word in PLACES else None)
            if chosen is None:
                raise ConfigError(
                    f"{type(self).__name__}.targets names {word!r}. "
                    f"It must be made of {', '.join((*_GROUPS, *PLACES))}, joined by +."
                )
            found |= set(chosen)
        return frozenset(found)

    def shared(self, matrices: Sequence[Matrix]) -> dict[str, Tensor]:
        """Tensors that the changes of all these matrices have in common and that are never trained, by name."""
        return {}

    def change(self, matrix: Matrix, generator: torch.Generator, shared: Mapping[str, Tensor]) -> Change:
        """A new change of a matrix, which leaves its product as it is, or brings it nearer to the original's.

        Args:
            generator: of its random numbers.
            shared: as `shared` gave it.

        Raises:
            ConfigError: the matrix is too small for the settings.
        """
        raise NotImplementedError

    def restored(self, matrix: Matrix, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Change:
        """The change whose parameters are given, by the names in `peft_names` of its class.

        Raises:
            ConfigError: a parameter of a shape that the matrix does not allow.
        """
        raise NotImplementedError

    def beginning(self, geometry: Geometry, generator: torch.Generator) -> Beginning | None:
        """What is put before every text, for methods that do that instead of changing matrices."""
        return None

    def restored_beginning(self, tensors: Mapping[str, Tensor], geometry: Geometry) -> Beginning:
        """The beginning that a file holds.

        Raises:
            ConfigError: another shape than the model asks for.
        """
        raise NotImplementedError

    def checked_numbers(self, tensors: Mapping[str, Tensor], wanted: tuple[int, int]) -> Tensor:
        """The one tensor of a file that holds a beginning.

        Raises:
            ConfigError: it is missing, is not alone, or has another shape or NaN.
        """
        if tensors.keys() != {"prompt_embeddings"}:
            raise ConfigError(f"the file holds {sorted(tensors)[:3]}, and needs prompt_embeddings alone.")
        numbers = tensors["prompt_embeddings"].detach().float()
        if tuple(numbers.shape) != wanted:
            raise ConfigError(
                f"prompt_embeddings has shape {tuple(numbers.shape)}; this model needs {wanted}. The adapter belongs to "
                "another model."
            )
        if not torch.isfinite(numbers).all():
            raise ConfigError("prompt_embeddings holds NaN or infinity. The adapter is damaged.")
        return numbers.clone()

    def peft_geometry(self, geometry: Geometry) -> dict[str, Any]:
        """What `adapter_config.json` says of the model."""
        return {}

    def regularisation(self, changes: Mapping[str, Change]) -> Tensor | None:
        """What is added to the loss in training; None for nothing."""
        return None

    def after_backward(self, changes: Mapping[str, Change]) -> None:
        """Look at the gradients of a step, before the parameters are updated."""

    def after_step(self, changes: Mapping[str, Change], step: int, steps: int) -> None:
        """Change parameters after an update; `step` counts from 1 to `steps`."""

    def learning_rate_factor(self, parameter: str) -> float:
        """How much faster than others a parameter of a change learns."""
        return 1.0

    def to_peft(self) -> dict[str, Any]:
        """What `adapter_config.json` says of the method, beside what all methods have."""
        return {}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """The method that an `adapter_config.json` describes.

        Raises:
            ConfigError: a setting that is not implemented, or outside its limits.
        """
        raise NotImplementedError


def peft_settings(config: Mapping[str, Any], *, ignored: Mapping[str, Any]) -> None:
    """Refuse settings of an `adapter_config.json` that would change what is computed, and are not implemented.

    Args:
        ignored: from the names of such settings to the values that mean nothing is asked for; an empty or
            missing value always means that.

    Raises:
        ConfigError: one of them asks for something.
    """
    for name, nothing in ignored.items():
        value = config.get(name)
        if value not in (None, False, nothing) and value not in ({}, []):
            raise ConfigError(
                f"adapter_config.json sets {name} to {value!r:.60}, which is not implemented. "
                "Save the adapter without it."
            )


def number(config: Mapping[str, Any], name: str, default: float) -> Any:
    """A number of an `adapter_config.json`.

    Raises:
        ConfigError: it is something else.
    """
    value = config.get(name, default)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"adapter_config.json sets {name} to {value!r:.40}. It must be a number.")
    return value


def check_rank(rank: int, matrix: Matrix) -> None:
    """Refuse a rank that a matrix cannot have.

    Raises:
        ConfigError: it is larger than the smaller side of the matrix.
    """
    if not 1 <= rank <= min(matrix.outputs, matrix.inputs):
        raise ConfigError(
            f"{matrix.name} is {matrix.outputs} x {matrix.inputs}, so an adapter's rank must be from 1 to "
            f"{min(matrix.outputs, matrix.inputs)}. Got {rank}."
        )


def check_shape(what: str, tensor: Tensor, wanted: tuple[int, ...], matrix: Matrix) -> Tensor:
    """The tensor in fp32, where it has the shape that a matrix asks for and holds numbers only.

    Raises:
        ConfigError: another shape, or NaN or infinity.
    """
    if tuple(tensor.shape) != wanted:
        raise ConfigError(
            f"{what} of {matrix.name} has shape {tuple(tensor.shape)}; the matrix of {matrix.outputs} x "
            f"{matrix.inputs} needs {wanted}. The adapter belongs to another model."
        )
    tensor = tensor.detach().float()
    if not torch.isfinite(tensor).all():
        raise ConfigError(f"{what} of {matrix.name} holds NaN or infinity. The adapter is damaged.")
    return tensor.clone()


def uniform_(tensor: Tensor, inputs: int, generator: torch.Generator) -> Tensor:
    """Kaiming's uniform numbers as linear layers are initialised with: up to 1 / sqrt(inputs)."""
    bound = inputs**-0.5
    return tensor.uniform_(-bound, bound, generator=generator)
