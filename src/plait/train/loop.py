"""The training loop: batches in, a checkpoint and a loss curve out; killed and resumed, the same curve."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from plait.errors import ConfigError, PlaitError
from plait.files import write_text
from plait.nn import Adapter, RandomParameters, Transformer, Tuned
from plait.train.checkpoint import (
    Checkpoint,
    load_checkpoint,
    optimizer_tensors,
    restore,
    save_checkpoint,
)
from plait.train.config import RunConfig
from plait.train.data import Batches, TokenData
from plait.train.progress import Progress

__all__ = ["CHECKPOINT", "Trained", "Trainer"]

CHECKPOINT = "checkpoint.safetensors"
_CURVE = "losses.json"


class Trained(NamedTuple):
    """What a run came to.

    Attributes:
        steps, tokens: done, in all; tokens of the batches.
        losses: of every step, nats.
        held_out: step and held-out loss of every measurement.
    """

    steps: int
    tokens: int
    losses: list[float]
    held_out: list[tuple[int, float]]


class Trainer:
    """One run. What it computes depends on the config, the data and the number of threads only.

    A checkpoint is written at the start, every `save_every` steps, at the end, and on Ctrl-C.

    Args:
        config: the run.
        model: the model to train, whose parameters take gradients.
        data: to learn from.
        held_out: to measure on, or None.
        folder: of the checkpoint and the curve; it must exist.
        adapter: of `model`; it is trained, and the model stays as it is.
        tuned: what is trained of `model`, where that is packed.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Transformer,
        data: TokenData,
        held_out: TokenData | None,
        folder: Path,
        adapter: Adapter | None = None,
        tuned: Tuned | None = None,
    ) -> None:
        training = config.training
        self.config, self.model, self.folder, self.adapter = config, model, folder, adapter
        self.tuned, self.changed_codes = tuned, 0
        self.trained: nn.Module = adapter or tuned or model
        if adapter is not None:
            model.use(adapter.train())
        self.fingerprint = data.fingerprint()
        self.batches = Batches(data, rows=training.rows, context=training.context, seed=training.seed)
        self.held_out = held_out
        groups = self._groups()
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=training.learning_rate,
            betas=(training.beta1, training.beta2),
            weight_decay=training.weight_decay,
        )
        self.step = 0
        self.losses: list[float] = []
        self.evaluations: list[tuple[int, float]] = []

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters by whether they decay and how fast they learn, beside the others."""
        groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for name, parameter in self.trained.named_parameters():
            if parameter.requires_grad:
                factor = 1.0
                if self.adapter is not None:
                    factor = self.adapter.config.learning_rate_factor(name.rpartition(".")[2])
                groups.setdefault((parameter.dim() > 1, factor), []).append(parameter)
        return [
            {"params": parameters, "factor": factor, **({} if decays else {"weight_decay": 0.0})}
            for (decays, factor), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
        ]

    @classmethod
    def resume(
        cls,
        data: TokenData,
        held_out: TokenData | None,
        folder: Path,
        open_base: Callable[[RunConfig], tuple[Transformer, Adapter | None, Tuned | None]] | None = None,
    ) -> Trainer:
        """The run whose checkpoint is in a folder.

        Args:
            open_base: makes the model and a new adapter again, or a packed model to be tuned, for runs that train those.

        Raises:
            ModelFileError: there is no checkpoint, or it is damaged.
            ConfigError: the data is not that of the run.
        """
        checkpoint = load_checkpoint(folder / CHECKPOINT)
        if checkpoint.data != data.fingerprint():
            raise ConfigError(f"{folder} holds a run on other data. Give the same data, or another folder.")
        adapter = tuned = None
        config = checkpoint.config
        if (config.adapter is not None or config.tuner is not None) and open_base is not None:
            model, adapter, tuned = open_base(config)
        else:
            model = Transformer(checkpoint.config.model, RandomParameters())
        trainer = cls(checkpoint.config, model, data, held_out, folder, adapter, tuned)
        restore(trainer.trained, trainer.optimizer, checkpoint.tensors)
        trainer.step = checkpoint.step
        trainer.losses = checkpoint.losses.tolist()
        trainer.evaluations = [(int(step), loss) for step, loss in checkpoint.evaluations.tolist()]
        return trainer

    def run(self, what: str = "training") -> Trained:
        """Train up to the last step.

        Raises:
            KeyboardInterrupt: Ctrl-C; the step that was going on is finished and saved.
            PlaitError: the loss is no longer a number; the last checkpoint stands.
        """
        training = self.config.training
        if not self.evaluations:
            self._evaluate()
        if self.step == 0:
            self.save()
        with _interrupts() as interrupted, Progress(what, training.steps, self.step) as progress:
            while self.step < training.steps:
                loss = self._update()
                self.losses.append(loss)
                self.step += 1
                is_last = self.step == training.steps
                if is_last or self.step % training.evaluate_every == 0:
                    self._evaluate()
                if is_last or interrupted.is_set() or self.step % training.save_every == 0:
                    self.save()
                if interrupted.is_set():
                    raise KeyboardInterrupt
                held_out = f", held out {self.evaluations[-1][1]:.3f}" if self.evaluations else ""
                progress.tell(self.step, f"loss {loss:.3f}{held_out}")
        return Trained(self.step, self.step * training.rows, self.losses, self.evaluations)

    def save(self) -> None:
        """Write the checkpoint, and the curve so far."""
        save_checkpoint(
            self.folder / CHECKPOINT,
            Checkpoint(
                self.config,
                self.fingerprint,
                self.step,
                torch.tensor(self.losses, dtype=torch.float64),
                torch.tensor(self.evaluations, dtype=torch.float64).view(-1, 2),
                optimizer_tensors(self.trained, self.optimizer),
            ),
        )
        curve = {"losses": self.losses, "held_out": self.evaluations}
        write_text(self.folder / _CURVE, json.dumps(curve) + "\n")

    def _update(self) -> float:
        training = self.config.training
        random = torch.Generator().manual_seed(training.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = training.learning_rate_at(self.step) * group["factor"]
        self.optimizer.zero_grad(set_to_none=True)
        self.model.learns_through = self.config.plan(self.step)
        adapter = self.adapter
        # What dropout draws is a function of the step, as everything else is.
        with torch.random.fork_rng(devices=[], enabled=adapter is not None):
            if adapter is not None:
                torch.manual_seed(training.seed * 1_000_003 + self.step)
            loss = self.config.objective.loss(self.model, self.batches[self.step], random)
        value = float(loss.value.detach())
        whole = loss.value
        if adapter is not None and (extra := adapter.config.regularisation(adapter.at)) is not None:
            whole = whole + extra
        whole.backward()
        if adapter is not None:
            adapter.config.after_backward(adapter.at)
        norm = nn.utils.clip_grad_norm_(self.trained.parameters(), training.clip)
        if not (torch.isfinite(norm) and torch.isfinite(loss.value)):
            raise PlaitError(
                f"The loss of step {self.step} is {value}, its gradient {float(norm)}. "
                "Lower the learning rate and start again, or resume from the last checkpoint."
            )
        self.optimizer.step()
        if adapter is not None:
            adapter.config.after_step(adapter.at, self.step + 1, training.steps)
        if self.tuned is not None and self.config.tuner is not None:
            # Numbers first, then codes, which meet the numbers as they are now.
            share = training.learning_rate_at(self.step) / training.learning_rate
            self.changed_codes += self.config.tuner.after_step(self.tuned.matrices, self.step + 1, share)
        return value

    @torch.no_grad()
    def _evaluate(self) -> None:
        """The mean loss over held-out pieces, in batches of as many rows as the training ones."""
        if self.held_out is None:
            return
        training = self.config.training
        rows = min(training.rows, len(self.held_out))
        batches = Batches(self.held_out, rows=rows, context=training.context, seed=0)
        random = torch.Generator().manual_seed(0)
        self.model.learns_through = self.config.plan()
        losses = [
            float(self.config.objective.loss(self.model, batches[number], random).value.detach())
            for number in range(batches.per_epoch)
        ]
        self.evaluations.append((self.step, sum(losses) / len(losses)))


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; a second one interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
