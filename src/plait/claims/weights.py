"""Models packed anew in a folder of their own, and judged against the weights they were made of; for claims."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from plait.claims.claim import Run
    from plait.engine import LanguageModel
    from plait.engine.weight_quality import WeightJudge
    from plait.weights import DecoupleQ, Stats

__all__ = ["calibration_text", "judge_of", "matrices_of", "of_best_codes", "output_errors_of", "packed"]

_WINDOW = 512


def calibration_text(length: int = 400_000) -> str:
    """Chapters of Python's manual that `judge_of` does not read."""
    from plait.claims.texts import other_manual

    return "\n\n".join(other_manual())[:length]


def judge_of(run: Run, lm: LanguageModel, windows: int) -> WeightJudge:
    """A judge over windows of Python's manual, 512 tokens each, 96 in a quick run."""
    from plait.claims.texts import token_runs
    from plait.engine.weight_quality import WeightJudge

    tokens = run.pick(_WINDOW, 96)
    return WeightJudge(lm.model, token_runs(lm.tokenizer, [tokens] * run.pick(windows, 1)))


def packed(
    model: str, formats: Sequence[str], folder: Path, *, samples: int
) -> Generator[str, None, dict[str, Path]]:
    """Pack a model in every format, each into a folder of its own; a line before each."""
    from plait.engine import quantize

    text, made = calibration_text(), {}
    for number, format in enumerate(formats):
        yield f"packing in {format}"
        made[format] = folder / str(number)
        quantize(model, format, made[format], calibration=text, samples=samples)
    return made


def matrices_of(lm: LanguageModel) -> dict[str, Tensor]:
    """The matrices of a model in fp32 by the names of files, as views that can be written to."""
    from plait.nn.mixers import Attention
    from plait.nn.transformer import Block
    from plait.weights import Dense, Linear

    found: dict[str, Tensor] = {}

    def add(linear: Linear, names: list[str], sizes: list[int]) -> None:
        assert isinstance(linear.weight, Dense)
        parts = linear.weight.weight.detach().split(sizes)
        found.update({f"{name}.weight": part for name, part in zip(names, parts, strict=True)})

    for index, block in enumerate(lm.model.blocks):
        assert isinstance(block, Block)
        assert isinstance(block.mixer, Attention)
        mixer, inner = block.mixer.config, block.feed_forward.config.size
        q, kv = mixer.num_heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
        width, name = lm.model.config.width, f"blocks.{index}"
        add(block.mixer.qkv, [f"{name}.mixer.{part}" for part in ("query", "key", "value")], [q, kv, kv])
        add(block.mixer.output, [f"{name}.mixer.output"], [width])
        add(block.feed_forward.up, [f"{name}.feed_forward.{part}" for part in ("gate", "up")], [inner, inner])
        add(block.feed_forward.down, [f"{name}.feed_forward.down"], [width])
    return found


def of_best_codes(format: DecoupleQ, weight: Tensor, stats: Stats) -> list[float]:
    """The loss of each row in 2 bits, without groups, in that of the best of all its codes, each with its best levels.

    Args:
        format: what packs the rows.
        weight: (O, I), short rows: all 4^I codes are tried.
        stats: of the inputs.
    """
    import itertools

    import torch

    from plait.weights.decoupleq import best_levels, output_errors, row_losses
    from plait.weights.gptq import damped

    hessian = damped(stats.hessian, format.damping)
    reached = output_errors(format.pack(weight, stats).unpack() - weight, hessian)
    every = torch.tensor(list(itertools.product(range(4), repeat=weight.shape[1])), dtype=torch.uint8)
    ratios = []
    for row, loss in zip(weight, reached, strict=True):
        repeated = row.expand(len(every), -1)
        losses = row_losses(repeated, every, best_levels(repeated, every, hessian, 0), hessian, 0)
        ratios.append(float(loss / losses.min()))
    return ratios


def output_errors_of(
    lm: LanguageModel, packed_models: Mapping[str, Path], texts: Sequence[Sequence[int]]
) -> dict[str, float]:
    """What packing changes in the outputs of matrices, for the inputs that they have in the model as it was.

    Args:
        lm: in fp32.
        packed_models: folders of the same model, packed without factors on its columns.
        texts: token ids that the model reads.

    Returns:
        By the names of `packed_models`, the sum over all matrices of the blocks of D H D^T, with D the change of a
        matrix and H the mean of x x^T over its inputs.
    """
    import torch

    from plait.memory import Rows
    from plait.nn.checkpoints import PackedCheckpoint
    from plait.weights import Linear, Stats
    from plait.weights.decoupleq import output_errors

    dense = matrices_of(lm)
    linears = {name: module for name, module in lm.model.blocks.named_modules() if isinstance(module, Linear)}
    stats = {name: Stats(module.weight.shape[1]) for name, module in linears.items()}
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: stats[name].add(given[0]))
        for name, module in linears.items()
    ]
    try:
        with torch.no_grad():
            for ids in texts:
                lm.model(torch.as_tensor(ids, dtype=torch.int64), Rows([(len(ids), 0)]))
    finally:
        for hook in hooks:
            hook.remove()
    # Of fused layers, the parts have the inputs of the whole.
    fused = {"query": "qkv", "key": "qkv", "value": "qkv", "gate": "up"}
    errors = dict.fromkeys(packed_models, 0.0)
    for label, folder in packed_models.items():
        with PackedCheckpoint(folder) as file:
            for name, weight in dense.items():
                parent, _, place = name.removeprefix("blocks.").removesuffix(".weight").rpartition(".")
                hessian = stats[f"{parent}.{fused.get(place, place)}"].hessian
                errors[label] += float(output_errors(file.load_packed(name).unpack() - weight, hessian).sum())
    return errors
