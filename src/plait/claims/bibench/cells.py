"""The grid of the benchmark: a method in a network under a setting, from a seed; each cell trained once and kept."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from plait.claims.bibench.corruptions import corrupted
from plait.claims.bibench.data import TASKS, Samples, Task
from plait.claims.bibench.networks import NETWORKS, binarized
from plait.claims.claim import MeasurementError
from plait.errors import ConfigError
from plait.files import write_text
from plait.weights.binary import BINARIZERS, begin_epoch

__all__ = ["FULL", "FULL_PRECISION", "QUICK", "TINY", "Cell", "Grid", "Outcome", "Scale", "Setting"]

# The network as it is, against which every method is compared.
FULL_PRECISION = "fp32"
_BATCH = 64
_STEP_AT = (0.5, 0.75)  # of the epochs, where the step schedule divides the rate by ten


@dataclass(frozen=True)
class Setting:
    """How a network is trained.

    Args:
        optimizer: Adam, or SGD with momentum 0.9.
        rate: of learning, at first.
        schedule: down to 0 along a cosine, or to a tenth at half and at three quarters of the epochs.
    """

    optimizer: Literal["adam", "sgd"] = "adam"
    rate: float = 1e-3
    schedule: Literal["cosine", "step"] = "cosine"

    def __str__(self) -> str:
        return f"{self.optimizer} {self.rate:g} {self.schedule}"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is run.

    Args:
        learned, held_out: samples of each task.
        epochs: over what is learned.
        width: of networks; each family takes a multiple of it.
        seeds: of every cell.
        settings: of the track on what training takes.
        rounds: times that each latency is taken.
        served_width: of the networks that are timed and counted, as they would be used.
    """

    name: str
    learned: int
    held_out: int
    epochs: int
    width: int
    seeds: tuple[int, ...]
    settings: tuple[Setting, ...]
    rounds: int
    served_width: int


_COSINE = (Setting("adam", 1e-3), Setting("adam", 1e-4), Setting("sgd", 1e-1), Setting("sgd", 1e-2))
_STEPS = tuple(dataclasses.replace(setting, schedule="step") for setting in _COSINE)
TINY = Scale(
    name="tiny", learned=128, held_out=64, epochs=1, width=8, seeds=(0,), settings=_COSINE[:2], rounds=2,
    served_width=32,
)  # fmt: skip
QUICK = Scale(
    name="quick", learned=1200, held_out=500, epochs=24, width=16, seeds=(0,), settings=_COSINE, rounds=15,
    served_width=128,
)  # fmt: skip
FULL = Scale(
    name="full", learned=4800, held_out=1600, epochs=40, width=32, seeds=(0, 1, 2), settings=_COSINE + _STEPS,
    rounds=51, served_width=128,
)  # fmt: skip

# Widths of networks of a family, for each unit of the scale's.
_WIDTHS = {"cnn": 1, "transformer": 2, "mlp": 1}


class Cell(NamedTuple):
    """One network that is trained.

    Attributes:
        method: a spec string, or `fp32`.
        network: a name of `NETWORKS`.
    """

    method: str
    network: str
    setting: Setting
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, {self.network}, {self.setting}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What a cell came to.

    Args:
        accuracy: on what is held out, from 0 to 1.
        seconds: of training.
        losses: nats a sample, of each epoch.
        corrupted: accuracy on each corruption in each strength; of images only.
        failure: why there is no accuracy; empty where there is.
    """

    accuracy: float
    seconds: float
    losses: tuple[float, ...] = ()
    corrupted: dict[str, tuple[float, ...]] = field(default_factory=dict)
    failure: str = ""


class Grid:
    """Cells of a scale, trained when they are first asked for.

    Args:
        scale: how much is run.
        methods: of the benchmark, as spec strings; all when left out. Full precision always comes first.
        folder: keeps a file for each cell, and goes on where an earlier run was stopped; None to keep nothing.

    Raises:
        ConfigError: a method that is not known, or a folder with cells of another scale; from `run`, a damaged file in it.
    """

    def __init__(self, scale: Scale, methods: Iterable[str] = (), folder: Path | None = None) -> None:
        self.scale, self.folder = scale, folder
        self.methods = [str(BINARIZERS.parse(method)) for method in methods or BINARIZERS.names()]
        self.outcomes: dict[Cell, Outcome] = {}
        self._tasks: dict[str, Task] = {}
        self._is_warm = False
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            said = folder / "scale.json"
            described = self._description
            if said.exists() and said.read_text() != described:
                raise ConfigError(
                    f"{folder} holds cells of another scale. Choose another folder, or remove this one."
                )
            write_text(said, described)

    @property
    def everyone(self) -> list[str]:
        """Full precision, and the methods."""
        return [FULL_PRECISION, *self.methods]

    def task(self, name: str) -> Task:
        """A task, made at its first use."""
        if name not in self._tasks:
            self._tasks[name] = TASKS[name](self.scale.learned, self.scale.held_out)
        return self._tasks[name]

    def width(self, network: str, served: bool = False) -> int:
        """The width of a network, as it is trained or as it is served."""
        unit = self.scale.served_width // 2 if served else self.scale.width
        return unit * _WIDTHS[NETWORKS[network].family]

    def build(self, network: str, method: str, served: bool = False) -> nn.Module:
        """A new network with random numbers."""
        chosen = None if method == FULL_PRECISION else BINARIZERS.parse(method)
        found = NETWORKS[network]
        return binarized(found, self.task(found.task), self.width(network, served), chosen)

    def run(self, cells: Iterable[Cell]) -> Generator[str, None, dict[Cell, Outcome]]:
        """Train what is not trained yet; says a line for each. A cell that fails is kept as such, and others go on."""
        chosen = list(cells)
        for cell in chosen:
            if cell in self.outcomes:
                continue
            kept = self._kept(cell)
            if kept is None:
                kept = self._train(cell)
                self._keep(cell, kept)
                yield f"{cell}: {kept.failure or f'{kept.accuracy:.3f} after {kept.seconds:.1f} s'}"
            self.outcomes[cell] = kept
        return {cell: self.outcomes[cell] for cell in chosen}

    def _train(self, cell: Cell) -> Outcome:
        task = self.task(NETWORKS[cell.network].task)
        if not self._is_warm:
            # What torch loads at its first step is no part of any cell's time.
            self._is_warm = True
            _fit(nn.Linear(1, 2), Samples(torch.zeros(2, 1), torch.zeros(2).long()), cell.setting, 1, 0)
        torch.manual_seed(cell.seed)
        model = self.build(cell.network, cell.method)
        start = time.perf_counter()
        try:
            losses = _fit(model, task.learned, cell.setting, self.scale.epochs, cell.seed)
        except MeasurementError as error:
            return Outcome(math.nan, time.perf_counter() - start, failure=str(error))
        seconds = time.perf_counter() - start
        shaken: dict[str, tuple[float, ...]] = {}
        if task.learned.inputs.dim() == 4:
            for kind, _, images in corrupted(task.held_out.inputs, cell.seed):
                accuracy = _accuracy(model, Samples(images, task.held_out.labels))
                shaken[kind] = (*shaken.get(kind, ()), accuracy)
        return Outcome(_accuracy(model, task.held_out), seconds, tuple(losses), shaken)

    @cached_property
    def _description(self) -> str:
        return json.dumps(dataclasses.asdict(self.scale), indent=1)

    def _path(self, cell: Cell) -> Path | None:
        name = "".join(c if c.isalnum() or c in "-." else "_" for c in str(cell))
        return None if self.folder is None else self.folder / f"{name}.json"

    def _kept(self, cell: Cell) -> Outcome | None:
        path = self._path(cell)
        if path is None or not path.exists():
            return None
        try:
            data: dict[str, Any] = json.loads(path.read_text())
            data["losses"] = tuple(data["losses"])
            data["corrupted"] = {kind: tuple(values) for kind, values in data["corrupted"].items()}
            return Outcome(**data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{path} holds no outcome of a cell. Remove it to train the cell again."
            ) from error

    def _keep(self, cell: Cell, outcome: Outcome) -> None:
        path = self._path(cell)
        if path is not None:
            write_text(path, json.dumps(dataclasses.asdict(outcome)))


def _fit(model: nn.Module, data: Samples, setting: Setting, epochs: int, seed: int) -> list[float]:
    """Train in place; mean loss of each epoch, in nats."""
    optimizer: torch.optim.Optimizer
    if setting.optimizer == "adam":
        optimizer = torch.optim.Adam(model.parameters(), setting.rate)
    else:
        optimizer = torch.optim.SGD(model.parameters(), setting.rate, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    count = len(data.labels)
    model.train()
    losses = []
    for epoch in range(epochs):
        begin_epoch(model, epoch, epochs)
        for group in optimizer.param_groups:
            group["lr"] = setting.rate * _rate(setting.schedule, epoch / epochs)
        total = 0.0
        # The last, short batch is left out: norms cannot count on it.
        for batch in torch.randperm(count, generator=generator).split(_BATCH)[: max(1, count // _BATCH)]:
            loss = F.cross_entropy(model(data.inputs[batch]), data.labels[batch])
            if not torch.isfinite(loss):
                raise MeasurementError(f"The loss is {loss.item()} in epoch {epoch}.")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        losses.append(total / (max(1, count // _BATCH) * min(_BATCH, count)))
    return losses


def _rate(schedule: str, done: float) -> float:
    """The share of the first rate that is left when this share of the epochs is done."""
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return float(0.1 ** sum(done >= at for at in _STEP_AT))


@torch.no_grad()
def _accuracy(model: nn.Module, data: Samples) -> float:
    model.eval()
    right = sum(
        int((model(inputs).argmax(dim=1) == labels).sum())
        for inputs, labels in zip(data.inputs.split(256), data.labels.split(256), strict=True)
    )
    return right / len(data.labels)
