"""The six tracks of BiBench: what a method is worth by each, relative to full precision, for which each gives 1.

Every overall metric is a quadratic mean of relative scores: QM(x) = sqrt(mean(x^2)), over groups of plain means.
Source: Qin et al. 2023, arXiv:2301.11233, section 3.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from plait.claims.bibench.cells import FULL_PRECISION, Cell, Grid, Outcome, Setting
from plait.claims.bibench.networks import NETWORKS
from plait.ops import native
from plait.weights.binary import BinaryLayer, begin_epoch, binary_layers, export

__all__ = [
    "TRACKS",
    "Score",
    "Scores",
    "Track",
    "counted",
    "in_turns",
    "quadratic_mean",
    "sample_of",
    "served",
    "stored_bytes",
]


_CALLS = 5  # of a network in its turn


class Score(NamedTuple):
    """What a method is worth by a track.

    Attributes:
        overall: the overall metric; 1 is as good as full precision, more is better.
        parts: the relative scores that it is the quadratic mean of.
        raw: what was measured.
    """

    overall: float
    parts: dict[str, float]
    raw: dict[str, float]


Scores = dict[str, Score]  # by method; full precision is one of them


class Track(Protocol):
    """One question of the benchmark."""

    title: str

    def __call__(self, grid: Grid) -> Generator[str, None, Scores]:
        """Measure it for full precision and every method of a grid."""
        ...


def quadratic_mean(values: Iterable[float]) -> float:
    """The square root of the mean of squares; NaN of none."""
    squares = [value * value for value in values]
    return math.sqrt(statistics.fmean(squares)) if squares else math.nan


class LearningTask:
    """How much accuracy is kept, by task; the mean over its networks and seeds."""

    title = "learning task"

    def __call__(self, grid: Grid) -> Generator[str, None, Scores]:
        kept = yield from _kept_accuracy(grid, lambda network: NETWORKS[network].task)
        return kept


class Architecture:
    """How much accuracy is kept, by family of network."""

    title = "neural architecture"

    def __call__(self, grid: Grid) -> Generator[str, None, Scores]:
        kept = yield from _kept_accuracy(grid, lambda network: NETWORKS[network].family)
        return kept


class Robustness:
    """How little accuracy corrupted images cost, by kind of corruption; above 1 less than at full precision.

    A loss counts as at least that of a single image, so that no ratio is infinite.
    """

    title = "corruption robustness"

    def __call__(self, grid: Grid) -> Generator[str, None, Scores]:
        networks = [name for name in NETWORKS if NETWORKS[name].task == "digits"]
        outcomes = yield from grid.run(_cells(grid, networks))
        least = 1 / len(grid.task("digits").held_out.labels)
        gaps: dict[str, dict[str, list[float]]] = {}
        for cell, outcome in outcomes.items():
            of_method = gaps.setdefault(cell.method, {})
            for kind, accuracies in outcome.corrupted.items():
                lost = outcome.accuracy - statistics.fmean(accuracies)
                of_method.setdefault(kind, []).append(max(least, lost))
        return _relative(gaps, lambda own, full: full / own, "accuracy lost to ")


class Consumption:
    """How long training takes, and how much its settings matter."""

    title = "training consumption"

    def __call__(self, grid: Grid) -> Generator[str, None, Scores]:
        network = "digits-cnn"
        cells = [
            Cell(method, network, setting, grid.scale.seeds[0])
            for setting in grid.scale.settings
            for method in grid.everyone
        ]
        outcomes = yield from grid.run(cells)
        found: dict[str, dict[str, list[float]]] = {}
        for method in grid.everyone:
            own = [outcome for cell, outcome in outcomes.items() if cell.method == method]
            # A setting under which nothing is learned is the worst that there is, not one to leave out.
            accuracies = [0.0 if outcome.failure else outcome.accuracy for outcome in own]
            found[method] = {
                "seconds": [outcome.seconds for outcome in own if not outcome.failure] or [math.nan],
                "spread": [max(1 / len(grid.task("digits").held_out.labels), statistics.pstdev(accuracies))],
            }
        return _relative(found, lambda own, full: full / own, "")


class Complexity:
    """How many times fewer bits are stored and operations made, as counted; 64 binary ones count as one."""

    title = "theoretical complexity"

    def __call__(self, grid: Grid) -> Generator[str, None, Scores]:
        found: dict[str, dict[str, list[float]]] = {
            method: {"bits": [], "operations": []} for method in grid.everyone
        }
        for network in NETWORKS:
            for method in grid.everyone:
                bits, operations = counted(served(grid, network, method), sample_of(grid, network))
                found[method]["bits"].append(bits)
                found[method]["operations"].append(operations)
        yield "counted bits and operations"
        return _relative(found, lambda own, full: full / own, "", by_network=True)


class Hardware:
    """How many times faster packed networks answer on this machine, on one thread, and how many times smaller they are.

    Networks as they are served, one sample and 32 at a time, in turns with full precision.
    """

    title = "hardware inference"

    def __call__(self, grid: Grid) -> Generator[str, None, Scores]:
        found: dict[str, dict[str, list[float]]] = {method: {} for method in grid.everyone}
        for network in NETWORKS:
            yield f"timing {network}"
            models = {method: served(grid, network, method) for method in grid.everyone}
            models = {
                method: export(model) if binary_layers(model) else model.eval()
                for method, model in models.items()
            }
            for method, model in models.items():
                found[method].setdefault("bytes", []).append(float(stored_bytes(model)))
            for batch in (1, 32):
                seconds = in_turns(models, sample_of(grid, network, batch), grid.scale.rounds)
                for method, taken in seconds.items():
                    found[method].setdefault(f"seconds, batch {batch}", []).append(taken)
        merged = _relative(found, lambda own, full: full / own, "", by_network=True)
        # Speed is one of two things that count, at whatever batch.
        return {method: _two_sided(score) for method, score in merged.items()}


TRACKS: dict[str, Track] = {
    "task": LearningTask(),
    "architecture": Architecture(),
    "robustness": Robustness(),
    "training": Consumption(),
    "complexity": Complexity(),
    "hardware": Hardware(),
}


def counted(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Bits that a network is stored in, and multiply-adds of its layers on x where 64 binary ones are one.

    Weights of binary layers are one bit; everything else, and a scale for each of their rows, is 32.
    """
    weights = [layer.weight for layer in binary_layers(model).values()]
    binary = sum(weight.numel() for weight in weights)
    packed = export(model) if weights else model
    plain = sum(t.numel() for t in packed.state_dict().values() if t.is_floating_point())
    operations = 0.0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal operations
        assert isinstance(layer, BinaryLayer | nn.Linear | nn.Conv1d | nn.Conv2d)
        made = output.numel() / len(layer.weight) * layer.weight.numel()
        operations += made / 64 if isinstance(layer, BinaryLayer) and layer.binarizer.binary_inputs else made

    layers = [m for m in model.modules() if isinstance(m, BinaryLayer | nn.Linear | nn.Conv1d | nn.Conv2d)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        for hook in hooks:
            hook.remove()
    return float(binary + 32 * plain), operations


def _cells(grid: Grid, networks: Iterable[str]) -> list[Cell]:
    """Cells under the first setting, full precision and methods in turns."""
    return [
        Cell(method, network, Setting(), seed)
        for seed in grid.scale.seeds
        for network in networks
        for method in grid.everyone
    ]


def _kept_accuracy(grid: Grid, group_of: Callable[[str], str]) -> Generator[str, None, Scores]:
    outcomes = yield from grid.run(_cells(grid, NETWORKS))
    ratios: dict[str, dict[str, list[float]]] = {method: {} for method in grid.everyone}
    raw: dict[str, dict[str, float]] = {method: {} for method in grid.everyone}
    for network in NETWORKS:
        full = _mean_accuracy(outcomes, FULL_PRECISION, network)
        for method in grid.everyone:
            own = _mean_accuracy(outcomes, method, network)
            ratios[method].setdefault(group_of(network), []).append(own / full)
            raw[method][network] = own
    parts = {m: {group: statistics.fmean(each) for group, each in of.items()} for m, of in ratios.items()}
    return {m: Score(quadratic_mean(parts[m].values()), parts[m], raw[m]) for m in grid.everyone}


def _mean_accuracy(outcomes: Mapping[Cell, Outcome], method: str, network: str) -> float:
    return statistics.fmean(
        outcome.accuracy
        for cell, outcome in outcomes.items()
        if (cell.method, cell.network, cell.setting) == (method, network, Setting())
    )


def _relative(
    found: Mapping[str, Mapping[str, list[float]]],
    relation: Callable[[float, float], float],
    prefix: str,
    *,
    by_network: bool = False,
) -> Scores:
    """Scores of measurements by method and group, where `relation` compares own ones with those of full precision.

    With `by_network` each number is compared with its counterpart, and the mean is of ratios.
    """
    full = found[FULL_PRECISION]
    scores = {}
    for method, groups in found.items():
        parts = {}
        for group, values in groups.items():
            if by_network:
                parts[group] = statistics.fmean(map(relation, values, full[group]))
            else:
                parts[group] = relation(statistics.fmean(values), statistics.fmean(full[group]))
        raw = {prefix + group: statistics.fmean(values) for group, values in groups.items()}
        scores[method] = Score(quadratic_mean(parts.values()), parts, raw)
    return scores


def _two_sided(score: Score) -> Score:
    """The overall metric over the mean speed and the size, which are alike in weight."""
    speed = statistics.fmean(value for name, value in score.parts.items() if name.startswith("seconds"))
    return score._replace(overall=quadratic_mean([speed, score.parts["bytes"]]))


def served(grid: Grid, network: str, method: str) -> nn.Module:
    """A network as it is served, in its last epoch, with random numbers: what it takes does not depend on them."""
    torch.manual_seed(0)
    model = grid.build(network, method, served=True)
    begin_epoch(model, 0, 1)
    return model


def sample_of(grid: Grid, network: str, batch: int = 1) -> Tensor:
    return grid.task(NETWORKS[network].task).held_out.inputs[:batch]


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a file of the network holds."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def in_turns(models: Mapping[str, nn.Module], x: Tensor, rounds: int) -> dict[str, float]:
    """The median seconds of a call of each, on one thread, in turns of several calls."""
    extension = native.module()
    threads, own = torch.get_num_threads(), None if extension is None else extension.threads()
    taken: dict[str, list[float]] = {method: [] for method in models}
    try:
        torch.set_num_threads(1)
        if extension is not None:
            extension.set_threads(1)
        with torch.inference_mode():
            for _ in range(rounds):
                for method, model in models.items():
                    # A network in use finds its own weights in the cache, not those of its rival.
                    model(x)
                    start = time.perf_counter()
                    for _ in range(_CALLS):
                        model(x)
                    taken[method].append((time.perf_counter() - start) / _CALLS)
    finally:
        torch.set_num_threads(threads)
        if extension is not None:
            extension.set_threads(own)
    return {method: statistics.median(times) for method, times in taken.items()}
