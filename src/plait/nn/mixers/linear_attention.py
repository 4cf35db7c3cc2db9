"""Linear attention: softmax is replaced by a feature map, so the past folds into a state of constant size.

For each head, token t with feature rows q_t, k_t and value v_t updates and reads a state S:

    S_t = a S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

Sources: Katharopoulos et al. 2020, arXiv:2006.16236 (elu + 1, normalised by the sum of the weights);
Arora et al. 2024, arXiv:2402.18668 (Based: the second-order Taylor map); Sun et al. 2023,
arXiv:2307.08621 (RetNet: fixed decay, normalised heads, gate); Qin et al. 2024, arXiv:2401.04658
(Lightning Attention: decay by ALiBi slopes).
Shapes: N packed rows, H heads, T tokens, D size of a query or key, F features of one, V value size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from plait import ops
from plait.errors import ConfigError, IncompatibleError
from plait.memory import Causal, LinearState, Memory, MemoryPlan, Rows, State, check_pasts
from plait.nn.config import Count, MixerConfig, NormConfig
from plait.nn.layers import Norm
from plait.nn.mixers.base import Mixer
from plait.nn.parameters import Parameters

__all__ = [
    "LinearAttention",
    "LinearAttentionConfig",
    "Tokens",
    "chunk",
    "features",
    "fold",
    "num_features",
    "parallel",
    "step",
]

FeatureMap = Literal["elu", "relu", "taylor", "silu", "identity"]

# Tokens of a chunk: the work within a chunk grows with its square, the loop over chunks shrinks.
_CHUNK = 64
# Added to the sum of the weights, which is 0 where relu leaves a query no feature.
_EPSILON = 1e-6


class Tokens(NamedTuple):
    """What the recurrence sees of a run of tokens.

    Attributes:
        q, k: (H, T, F) feature rows of queries and keys.
        v: (H, T, V) values.
    """

    q: Tensor
    k: Tensor
    v: Tensor


def parallel(tokens: Tokens, sums: Tensor, log_decay: Tensor) -> Tensor:
    """Outputs of all tokens at once, in O(T^2): the definition of the other forms.

    Args:
        tokens: a run of tokens.
        sums: (H, F, V) state before the first token.
        log_decay: (H,) natural log of the decay a, at most 0.

    Returns:
        (H, T, V).
    """
    steps = torch.arange(tokens.q.shape[1], device=tokens.q.device)
    distance = steps[:, None] - steps
    # The future is masked before exp: its factor would overflow, and inf * 0 is NaN.
    factor = (log_decay[:, None, None] * distance).masked_fill(distance < 0, -math.inf).exp()
    within = (tokens.q @ tokens.k.transpose(1, 2) * factor) @ tokens.v
    return within + (log_decay[:, None] * (steps + 1)).exp()[..., None] * (tokens.q @ sums)


def fold(tokens: Tokens, sums: Tensor, log_decay: Tensor) -> Tensor:
    """The state (H, F, V) after a run of tokens; shapes as in `parallel`."""
    length = tokens.k.shape[1]
    behind = torch.arange(length - 1, -1, -1, device=tokens.k.device)
    keys = tokens.k * (log_decay[:, None] * behind).exp()[..., None]
    return (log_decay * length).exp()[:, None, None] * sums + keys.transpose(1, 2) @ tokens.v


def chunk(tokens: Tokens, sums: Tensor, log_decay: Tensor, size: int = _CHUNK) -> tuple[Tensor, Tensor]:
    """Outputs (H, T, V) and the state after the last token, in O(T size): for training and prefill.

    Args:
        tokens, sums, log_decay: as in `parallel`.
        size: tokens of a chunk.
    """
    outs = [tokens.v[:, :0]]
    for piece in map(Tokens, *(part.split(size, dim=1) for part in tokens)):
        outs.append(parallel(piece, sums, log_decay))
        sums = fold(piece, sums, log_decay)
    return torch.cat(outs, dim=1), sums


def step(tokens: Tokens, sums: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Output (H, 1, V) and new state of a single token, in O(1): for decoding. Arguments as in `parallel`."""
    sums = log_decay.exp()[:, None, None] * sums + tokens.k.transpose(1, 2) * tokens.v
    return tokens.q @ sums, sums


def num_features(dim: int, feature_map: FeatureMap) -> int:
    """Size F of a feature row of `dim` numbers."""
    return 1 + dim + dim * (dim + 1) // 2 if feature_map == "taylor" else dim


def features(x: Tensor, feature_map: FeatureMap) -> Tensor:
    """Feature rows of x (..., D): (..., F).

    Inner products of `taylor` rows are 1 + z + z^2 / 2 with z = x.y / sqrt(D), never below 1/2.
    """
    if feature_map == "elu":
        return F.elu(x) + 1
    if feature_map == "relu":
        return F.relu(x)
    if feature_map == "silu":
        return F.silu(x)
    if feature_map == "identity":
        return x
    dim = x.shape[-1]
    x = x * dim**-0.25
    rows, columns = torch.triu_indices(dim, dim, device=x.device)
    # Of the symmetric products only one half is kept; the others, off the diagonal, count twice.
    weight = torch.where(rows == columns, x.new_tensor(math.sqrt(0.5)), x.new_tensor(1.0))
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., rows] * x[..., columns] * weight], dim=-1)


@dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig(MixerConfig, name="linear-attention"):
    """Linear attention: constant time and memory for each token; no token can be taken back alone.

    Args:
        num_heads: heads H.
        head_dim: size V of a value.
        key_dim: size D of a query or key before the feature map; `head_dim` when None.
        feature_map: `elu` (elu(x) + 1), `relu`, `taylor` (second-order Taylor map of exp; choose a
            `key_dim` near 16), `silu` or `identity`.
        decay: what the state is multiplied with at each token: `none` (1), `retnet`
            (1 - 2^(-5 - h) in head h) or `lightning` (exp(-2^(-8 (h + 1) / H))).
        normaliser: `sum` divides by the sum of the weights and needs a feature map without negative
            weights; `rms` normalises each head's output.
        gate: activation of a gate on the heads' outputs, or `none`.
    """

    num_heads: Count
    head_dim: Count
    key_dim: Count | None = None
    feature_map: FeatureMap = "elu"
    decay: Literal["none", "retnet", "lightning"] = "none"
    normaliser: Literal["sum", "rms"] = "sum"
    gate: Literal["none", "silu", "sigmoid"] = "none"

    def check(self) -> None:
        if self.normaliser == "sum" and self.feature_map in ("silu", "identity"):
            raise ConfigError(
                f"LinearAttentionConfig.normaliser 'sum' cannot divide by the signed weights of feature_map "
                f"{self.feature_map!r}. Choose normaliser 'rms', or feature_map elu, relu or taylor."
            )

    def log_decay(self) -> Tensor:
        """Natural log of each head's decay, (H,) fp32."""
        heads = torch.arange(self.num_heads, dtype=torch.float64)
        if self.decay == "retnet":
            return torch.log1p(-(2.0 ** (-5 - heads))).float()
        if self.decay == "lightning":
            return -(2.0 ** (-8 * (heads + 1) / self.num_heads)).float()
        return torch.zeros(self.num_heads)

    def build(self, width: int, norm: NormConfig, parameters: Parameters) -> LinearAttention:
        return LinearAttention(self, width, parameters)


class LinearAttention(Mixer):
    """Linear attention whose past is a `LinearState`."""

    log_decay: Tensor

    def __init__(self, config: LinearAttentionConfig, width: int, parameters: Parameters) -> None:
        super().__init__()
        self.config = config
        h, v = config.num_heads, config.head_dim
        self.key_dim = config.key_dim or v
        self.num_features = num_features(self.key_dim, config.feature_map)
        # The sum of the weights is folded as a column of ones behind the values.
        self.value_size = v + 1 if config.normaliser == "sum" else v
        self.qkv = parameters.linear(
            ["query", "key", "value"], width, [h * self.key_dim, h * self.key_dim, h * v], False
        )
        self.gate = None if config.gate == "none" else parameters.linear(["gate"], width, [h * v], False)
        self.head_norm = (
            Norm(NormConfig(kind="rms"), v, parameters.under("head_norm"))
            if config.normaliser == "rms"
            else None
        )
        self.output = parameters.linear(["output"], h * v, [width], False)
        self.register_buffer("log_decay", config.log_decay(), persistent=False)

    def forward(self, x: Tensor, rows: Rows, past: Sequence[Memory | State] | None = None) -> Tensor:
        for segment in rows.segments:
            if not isinstance(segment.mask, Causal):
                raise IncompatibleError(
                    f"linear-attention reads a sequence once, from left to right, and cannot follow a "
                    f"{type(segment.mask).__name__} mask. Use runs of tokens, or attention in every block."
                )
        states = None if past is None else [state for state in past if isinstance(state, LinearState)]
        if states is not None:
            check_pasts(rows, states)
        tokens = self.project(x)
        outs = [tokens.v[:, :0]]
        for index, segment in enumerate(rows.segments):
            piece = Tokens(*(part[:, segment.rows] for part in tokens))
            sums = self._empty_sums(piece) if states is None else states[index].sums
            form = step if segment.length == 1 else chunk
            out, sums = form(piece, sums, self.log_decay)
            if states is not None:
                states[index].advance(sums, segment.length)
            outs.append(out)
        return self.output(self._finished(torch.cat(outs, dim=1), x))

    def new_memory(self, plan: MemoryPlan) -> LinearState:
        """An empty state on the plan's device. Codec and policy choose among strands; a state has none."""
        return LinearState.empty(self.log_decay.to(plan.device), self.num_features, self.value_size)

    def project(self, x: Tensor) -> Tokens:
        """What the recurrence sees of rows x (N, width). Values are of `value_size`."""
        h, d, v = self.config.num_heads, self.key_dim, self.config.head_dim
        parts = self.qkv(x).split([h * d, h * d, h * v], dim=-1)
        q, k, values = (part.unflatten(1, (h, -1)).transpose(0, 1) for part in parts)
        if self.config.normaliser == "sum":
            values = F.pad(values, (0, 1), value=1.0)
        return Tokens(features(q, self.config.feature_map), features(k, self.config.feature_map), values)

    def summary(self, tokens: Tokens) -> LinearState:
        """The state of a run of tokens alone; `compose` joins the states of consecutive runs."""
        sums = fold(tokens, self._empty_sums(tokens), self.log_decay)
        return LinearState(self.log_decay, sums, tokens.k.shape[1])

    def _empty_sums(self, tokens: Tokens) -> Tensor:
        return tokens.k.new_zeros(self.config.num_heads, self.num_features, self.value_size)

    def _finished(self, out: Tensor, x: Tensor) -> Tensor:
        """Normalise and gate the heads' outputs (H, N, value_size): (N, H V)."""
        if self.config.normaliser == "sum":
            out = out[..., :-1] / (out[..., -1:] + _EPSILON)
        if self.head_norm is not None:
            out = self.head_norm(out)
        mixed = out.transpose(0, 1).flatten(1)
        if self.gate is None:
            return mixed
        gate = self.gate(x)
        return mixed * (torch.sigmoid(gate) if self.config.gate == "sigmoid" else ops.activate(gate, "silu"))
