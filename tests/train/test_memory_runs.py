"""Runs that learn to read through a memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from small_runs import new_trainer, run_config, small_data

from plait.errors import ConfigError, IncompatibleError
from plait.memory import MemoryPlan, Rows
from plait.train import RunConfig, Trainer

MEMORY = "prflash:block=3,p=floor,rate=0.2,sink_blocks=0"


def config(**training: object) -> RunConfig:
    return dataclasses.replace(run_config(**training), memory=MEMORY)


def seen(trainer: Trainer) -> torch.Tensor:
    """What the model says of some tokens, as it is trained now."""
    ids = small_data().ids[:20].long()
    with torch.no_grad():
        return trainer.model(ids, Rows([(20, 0)]))


def test_a_run_learns_through_its_memory_and_is_measured_as_it_will_be_used(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, config(steps=40, learning_rate=1e-2))
    done = trainer.run()
    assert done.losses[-1] < 0.8 * done.losses[0]
    assert done.held_out[-1][1] < 0.9 * done.held_out[0][1]
    # The last thing that a run does is to measure: with the draws of the memory that a user loads.
    ids = small_data().ids[:20].long()
    past = trainer.model.new_past(MemoryPlan.parse(MEMORY))
    with torch.no_grad():
        used = trainer.model(ids, Rows([(20, 0)]), [past])
        full = trainer.model(ids, Rows([(20, 0)]), [trainer.model.new_past(MemoryPlan())])
    torch.testing.assert_close(seen(trainer), used, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(used, full, atol=1e-2)


def test_every_step_has_fresh_draws(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, config())
    shown = []
    for step in range(5):
        trainer.step = step
        trainer._update()
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        shown.append(seen(trainer))
    assert all(not torch.equal(a, b) for i, a in enumerate(shown) for b in shown[:i])


def test_a_resumed_run_has_the_bits_of_one_that_went_through(tmp_path: Path) -> None:
    wanted = new_trainer(tmp_path / "whole", config()).run()
    broken = new_trainer(tmp_path / "broken", config())
    for _ in range(5):
        broken.losses.append(broken._update())
        broken.step += 1
    broken.save()
    resumed = Trainer.resume(small_data(), small_data(3, seed=9), tmp_path / "broken")
    assert resumed.config.memory == MEMORY
    assert resumed.run().losses == wanted.losses


@pytest.mark.parametrize(
    ("memory", "error", "message"),
    [
        ("gear:bits=4", IncompatibleError, "No gradient flows"),
        ("infllm", IncompatibleError, "No gradient flows"),
        ("prflsh", ConfigError, "Did you mean"),
    ],
)
def test_memories_that_cannot_be_trained_through_are_refused_before_the_run(
    memory: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        dataclasses.replace(run_config(), memory=memory)
