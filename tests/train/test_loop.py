"""The loop: killed and resumed at any moment, the loss curve has the same bits."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import new_trainer, run_config, small_data

from plait.errors import ConfigError, ModelFileError, PlaitError
from plait.nn import RandomParameters, Transformer
from plait.train import Distillation, LexicalUnits, NextToken, Objective, RunConfig, Trainer, Training
from plait.train.checkpoint import load_checkpoint
from plait.train.loop import CHECKPOINT


def test_a_run_learns(tmp_path: Path) -> None:
    done = new_trainer(tmp_path, run_config(steps=40, learning_rate=1e-2)).run()
    assert done.losses[-1] < 0.8 * done.losses[0]
    assert done.held_out[-1][1] < 0.9 * done.held_out[0][1]
    assert [step for step, _ in done.held_out] == [*range(0, 41, 5)]
    assert done.tokens == 40 * 48


@pytest.mark.parametrize(
    "objective", [NextToken(), LexicalUnits(alpha=0.5, share=0.5)], ids=lambda objective: objective.name
)
def test_a_resumed_run_has_the_bits_of_one_that_went_through(tmp_path: Path, objective: Objective) -> None:
    config = run_config(objective)
    whole = new_trainer(tmp_path / "whole", config)
    curve = whole.run()
    broken = new_trainer(tmp_path / "broken", config)
    broken.save()
    for steps in (1, 3, 0, 5):
        for _ in range(steps):
            broken.losses.append(broken._update())
            broken.step += 1
        broken.save()
        # What is not saved is lost, as after a kill.
        broken._update()
        broken = Trainer.resume(small_data(), small_data(3, seed=9), tmp_path / "broken")
        assert broken.config == config
    broken.run()
    assert broken.losses == curve.losses
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, broken.model.get_parameter(name)), name


def forked(folder: Path, told: int) -> int:
    """Go on with the run in a folder, or start it, in another process; every step is written to `told`."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        started = (folder / CHECKPOINT).exists()
        trainer = (
            Trainer.resume(small_data(), small_data(3, seed=9), folder) if started else new_trainer(folder)
        )
        update = trainer._update

        def slow() -> float:
            time.sleep(0.01)
            loss = update()
            os.write(told, bytes([trainer.step]))
            return loss

        trainer._update = slow  # type: ignore[method-assign]
        trainer.run()
        os.write(told, bytes([255]))
    finally:
        os._exit(0)


def test_killed_at_any_moment_and_resumed_the_curve_is_the_same(tmp_path: Path) -> None:
    wanted = new_trainer(tmp_path / "whole").run()
    folder = tmp_path / "killed"
    for last in (0, 2, 5, 7, 10, 255):
        listening, told = os.pipe()
        child = forked(folder, told)
        os.close(told)
        while os.read(listening, 1) != bytes([last]):
            pass
        # In the middle of a step, of a measurement, or of writing a checkpoint.
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(listening)
        assert load_checkpoint(folder / CHECKPOINT).step <= min(last + 1, 12)
    found = json.loads((folder / "losses.json").read_text())
    assert found["losses"] == wanted.losses
    assert [tuple(pair) for pair in found["held_out"]] == wanted.held_out


def test_ctrl_c_saves_the_step_that_it_is_at(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path)
    update = trainer._update

    def interrupted() -> float:
        loss = update()
        if trainer.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    trainer._update = interrupted  # type: ignore[method-assign]
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert signal.getsignal(signal.SIGINT) is handler
    assert load_checkpoint(tmp_path / CHECKPOINT).step == 7
    wanted = new_trainer(tmp_path / "whole").run()
    assert Trainer.resume(small_data(), small_data(3, seed=9), tmp_path).run() == wanted


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path)
    trainer.run()
    kept = (tmp_path / CHECKPOINT).read_bytes()
    trainer.config = run_config(steps=20)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    with pytest.raises(PlaitError, match="The loss of step 12 is nan"):
        trainer.run()
    assert (tmp_path / CHECKPOINT).read_bytes() == kept


def test_a_checkpoint_of_other_data_or_another_model_is_refused(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path)
    trainer.save()
    with pytest.raises(ConfigError, match="other data"):
        Trainer.resume(small_data(5), None, tmp_path)
    from plait.train.checkpoint import restore

    tensors = load_checkpoint(tmp_path / CHECKPOINT).tensors
    other = Transformer(run_config().model, RandomParameters()).with_blocks([0])
    with pytest.raises(ConfigError, match=r"another model: blocks\.1"):
        restore(other, trainer.optimizer, tensors)


def test_a_damaged_checkpoint_is_one_error(tmp_path: Path) -> None:
    new_trainer(tmp_path).save()
    path = tmp_path / CHECKPOINT
    whole = path.read_bytes()
    for content in (
        b"",
        whole[:100],
        whole[:-1],
        b"GGUF" + whole[4:],
        whole.replace(b'"version', b'"vers1on'),
    ):
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match="no checkpoint to resume from"):
            load_checkpoint(path)
    path.write_bytes(whole.replace(b'\\"version\\": 1', b'\\"version\\": 2'))
    with pytest.raises(ModelFileError, match="of version 2"):
        load_checkpoint(path)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = new_trainer(tmp_path)
    trainer.save()
    kept = (tmp_path / CHECKPOINT).read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        trainer.save()
    assert (tmp_path / CHECKPOINT).read_bytes() == kept
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT, "losses.json"}


@settings(max_examples=30, deadline=None)
@given(
    steps=st.integers(1, 200),
    warmup=st.integers(0, 100),
    floor=st.floats(0, 1),
)
def test_the_learning_rate_rises_to_its_height_and_falls_to_its_floor(
    steps: int, warmup: int, floor: float
) -> None:
    training = Training(steps=steps, warmup=warmup, floor=floor, learning_rate=0.5)
    rates = [training.learning_rate_at(step) for step in range(steps + 1)]
    assert all(0 < rate <= 0.5 for rate in rates[: max(1, steps)])
    if warmup < steps:
        assert rates[warmup] == pytest.approx(0.5)
        assert rates[steps] == pytest.approx(0.5 * floor)
        assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))


@pytest.mark.parametrize("objective", [NextToken(), LexicalUnits(alpha=0.7, pads=2), Distillation(top=4)])
def test_configs_are_the_same_after_json(objective: Objective) -> None:
    config = run_config(objective, learning_rate=3e-4)
    again = RunConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config


@pytest.mark.parametrize(
    "setting",
    ["steps=0", "rows=1", "learning_rate=0", "beta1=1", "clip=0", "floor=2", "seed=-1", "save_every=0"],
)
def test_settings_outside_their_limits_are_named(setting: str) -> None:
    name = setting.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"Training\.{name} must be"):
        Training.from_settings(dict([setting.split("=")]))
