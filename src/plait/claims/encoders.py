"""A sentence encoder whose weights were never rounded, packed in a weight format, and how far its embeddings move.

Shapes: N tokens of a sentence, W width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from plait.claims.texts import chapters

if TYPE_CHECKING:
    from torch import Tensor, nn

    from plait.weights import Linear, Stats, WeightFormat

__all__ = ["Likeness", "likeness", "sentences"]


class Likeness(NamedTuple):
    """What packing left of an encoder's embeddings.

    Attributes:
        cosines: of the embedding of each sentence with that in fp32.
        bits_per_weight: of the packed matrices, with all that is kept for them.
    """

    cosines: list[float]
    bits_per_weight: float

    @property
    def mean(self) -> float:
        """Mean cosine."""
        return sum(self.cosines) / len(self.cosines)


def sentences(count: int, *, calibration: bool = False) -> list[str]:
    """Sentences of English prose from Python's manual, 40 to 300 characters, spread over its chapters.

    Args:
        count: how many at most; no sentence is there twice.
        calibration: those of every second chapter, and not those of the others. Chapters repeat each other: what both
            have is for calibration.
    """
    texts = list(chapters().values())
    known = list(dict.fromkeys(sentence for text in texts[1::2] for sentence in _prose(text)))
    if not calibration:
        seen = set(known)
        others = dict.fromkeys(sentence for text in texts[::2] for sentence in _prose(text))
        known = [sentence for sentence in others if sentence not in seen]
    return known[:: max(1, len(known) // count)][:count]


def _prose(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        # Examples and grammar are indented, titles underlined.
        if re.match(r"[A-Z]", paragraph) and not re.search(r"\n[*=~^-]{3}|::=|>>>", paragraph):
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
                if 40 <= len(sentence) <= 300 and sentence.endswith("."):
                    yield sentence


def likeness(format: WeightFormat, judged: Sequence[str], calibration: Sequence[str] = ()) -> Likeness:
    """Pack all matrices of the layers of all-MiniLM-L6-v2, layer by layer, and compare embeddings with those in fp32.

    Later layers are calibrated on what the packed ones before them give.

    Args:
        judged: sentences whose embeddings are compared.
        calibration: sentences that formats are shown which look at inputs.
    """
    import torch

    from plait.claims.meaning import SentenceEncoder

    encoder = SentenceEncoder()
    exact = _exact(tuple(judged))
    weights = nbytes = 0
    with torch.no_grad():
        streams = [encoder.model.embeddings(encoder.ids(text)) for text in calibration if format.needs]
        for layer in encoder.model.encoder.layer:
            for linear in _packed_layer(layer, format, streams):
                weights += linear.weight.shape[0] * linear.weight.shape[1]
                nbytes += linear.weight.nbytes()
            streams = [_output(layer, stream) for stream in streams]
    cosines = (encoder.embeddings(judged) * exact).sum(dim=1)
    return Likeness(cosines.tolist(), 8 * nbytes / weights)


@cache
def _exact(texts: tuple[str, ...]) -> Tensor:
    """Embeddings in fp32, of which every format is judged."""
    from plait.claims.meaning import SentenceEncoder

    return SentenceEncoder().embeddings(texts)


def _output(layer: nn.Module, stream: Tensor) -> Tensor:
    """What a layer makes of one sentence, (1, N, W)."""
    found = layer(stream)
    output: Tensor = found[0] if isinstance(found, tuple) else found
    return output


def _packed_layer(layer: nn.Module, format: WeightFormat, streams: Sequence[Tensor]) -> list[Linear]:
    """Pack the matrices of one layer in place; its linear layers."""
    import torch

    from plait.weights import Linear, Stats

    dense = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
    stats: dict[str, Stats] = {}
    if streams:
        stats = {name: Stats(module.in_features, format.needs) for name, module in dense.items()}
    targets = _measured(layer, dense, stats, streams)
    packed = []
    for name, module in dense.items():
        weight = format.pack(module.weight.detach(), stats.get(name))
        packed.append(Linear(weight, module.bias.detach()))
        layer.set_submodule(name, packed[-1])
    if "block_io" in format.needs:
        format.refine(layer, _Run(layer, streams, targets))
    return packed


def _measured(
    layer: nn.Module, dense: dict[str, nn.Linear], stats: dict[str, Stats], streams: Sequence[Tensor]
) -> list[Tensor]:
    """What a layer makes of the sentences, while the inputs of its linear layers are added up."""
    hooks = [
        dense[name].register_forward_pre_hook(lambda _, given, kept=kept: kept.add(given[0]))
        for name, kept in stats.items()
    ]
    try:
        return [_output(layer, stream) for stream in streams]
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class _Run:
    """A `plait.weights.BlockRun` over sentences."""

    layer: nn.Module
    streams: Sequence[Tensor]
    targets: Sequence[Tensor]

    def __len__(self) -> int:
        return len(self.streams)

    def output(self, index: int) -> Tensor:
        return _output(self.layer, self.streams[index])

    def target(self, index: int) -> Tensor:
        return self.targets[index]
