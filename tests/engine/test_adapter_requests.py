"""Requests with adapters: chosen by name, side by side, and never sharing what another has read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from plait.engine import LanguageModel
from plait.errors import ConfigError, IncompatibleError, UnknownNameError
from plait.nn import new_adapter, save_adapter
from plait.nn.lowered import Lowered
from plait.weights.adapters import ADAPTERS

Make = Callable[..., LanguageModel]

SPECS = {
    "one": "lora:rank=4", "two": "lora:rank=4", "three": "dora:rank=2", "four": "ia3", "five": "vera:rank=16",
    "six": "bitfit", "seven": "lora:rank=9,targets=value+up", "eight": "adalora:first_rank=3,rank=2",
    "nine": "prefix:tokens=5,spread=1.0", "ten": "prompt:tokens=4,spread=1.0",
    "eleven": "serial:size=4", "twelve": "parallel:size=3",
}  # fmt: skip
PROMPT = "A text that is long enough to be shared by several requests, and then some more."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp("adapters") / name for name in SPECS}


@pytest.fixture
def adapted(make_packed: Make, folders: dict[str, Path]) -> LanguageModel:
    """A model with adapters that were written and read again."""
    lm = make_packed()
    for seed, (name, folder) in enumerate(folders.items()):
        if not folder.exists():
            made = new_adapter(ADAPTERS.parse(SPECS[name]), lm.model, seed=seed)
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape))
            save_adapter(made, lm.model, folder)
        lm.adapters.add(folder)
    return lm


def test_adapters_of_one_batch_answer_as_each_alone(adapted: LanguageModel) -> None:
    names = [*SPECS, "none"]
    options = {"max_new_tokens": 10, "ignore_end": True, "logprobs": 1}
    engine = adapted.new_engine()
    running = [engine.submit(adapted.request(adapted.encode(PROMPT), adapter=n, **options)) for n in names]
    for _ in engine.run():
        engine.check_integrity()
    together = [sequence.result() for sequence in running]
    # Bit for bit where the model is one native program.
    exact = isinstance(adapted.model.program, Lowered)
    for name, found in zip(names, together, strict=True):
        alone = adapted.generate(PROMPT, adapter=name, **options)
        assert found.tokens == alone.tokens, name
        assert found.shared_tokens == 0
        for one, other in zip(found.choices, alone.choices, strict=True):
            assert one.logprob == (other.logprob if exact else pytest.approx(other.logprob, abs=1e-4))
    assert len({found.tokens for found in together}) > 4


def test_requests_share_a_beginning_with_their_own_adapter_only(adapted: LanguageModel) -> None:
    engine = adapted.new_engine(memory_bytes=1 << 22)
    ids = adapted.encode(PROMPT)
    for names, shared in ((["one", "nine", "ten", "none"], False), (["ten", "nine", "one", "none"], True)):
        for name in names:
            sequence = engine.submit(adapted.request(ids, adapter=name, max_new_tokens=2))
            for _ in engine.run():
                engine.check_integrity()
            assert (sequence.shared_tokens > 0) == shared
            assert sequence.result().tokens == adapted.generate(PROMPT, adapter=name, max_new_tokens=2).tokens


def test_a_session_keeps_its_adapter(adapted: LanguageModel) -> None:
    wanted = {
        name: adapted.generate(PROMPT, adapter=name, max_new_tokens=6).tokens for name in ("one", "none")
    }
    assert wanted["one"] != wanted["none"]
    with adapted.session(adapter="one") as session:
        session.read(PROMPT)
        (twin,) = session.fork()
        assert session.generate(max_new_tokens=6).tokens == wanted["one"]
        assert twin.generate(max_new_tokens=6).tokens == wanted["one"]
        with pytest.raises(IncompatibleError, match="another adapter than 'two'"):
            session.generate(max_new_tokens=1, adapter="two")


def test_the_adapter_in_use_answers_where_none_is_chosen(adapted: LanguageModel) -> None:
    named = adapted.generate(PROMPT, adapter="one", max_new_tokens=6).tokens
    plain = adapted.generate(PROMPT, max_new_tokens=6).tokens
    score = adapted.score(PROMPT).nats
    adapted.model.use(adapted.adapters["one"])
    try:
        assert adapted.generate(PROMPT, max_new_tokens=6).tokens == named
        assert adapted.generate(PROMPT, adapter="none", max_new_tokens=6).tokens == plain
        assert adapted.score(PROMPT).nats != score
        assert adapted.beam_search(PROMPT, num_beams=1, max_new_tokens=6)[0].tokens == named
    finally:
        adapted.model.use(None)
    assert adapted.score(PROMPT).nats == score


def test_drafts_do_not_change_what_an_adapter_answers(adapted: LanguageModel, make_packed: Make) -> None:
    guessing = make_packed(draft="prompt-lookup")
    guessing.adapters.update(adapted.adapters)
    text = PROMPT * 2
    for name in ("one", "three", "nine"):
        plain = adapted.generate(text, adapter=name, max_new_tokens=12)
        assert guessing.generate(text, adapter=name, max_new_tokens=12).tokens == plain.tokens


def test_what_an_adapter_puts_before_a_text_is_never_hidden(
    make_packed: Make, folders: dict[str, Path], adapted: LanguageModel
) -> None:
    windowed = make_packed(memory="window:size=16")
    windowed.adapters.update(adapted.adapters)
    assert windowed.generate(PROMPT, adapter="one", max_new_tokens=2).tokens
    engine = windowed.new_engine()
    with pytest.raises(IncompatibleError, match=r"window.*might hide"):
        engine.submit(windowed.request(windowed.encode(PROMPT), adapter="nine"))
    assert engine.is_idle
    with adapted.session(adapter="nine") as session:
        wanted = session.generate(PROMPT, max_new_tokens=4).tokens
        session.rewind(0)
        assert session.generate(PROMPT, max_new_tokens=4).tokens == wanted


def test_names_are_checked(adapted: LanguageModel, folders: dict[str, Path]) -> None:
    with pytest.raises(UnknownNameError, match=r"'on'.*Did you mean 'one'.*There are: eight, eleven, five"):
        adapted.generate(PROMPT, adapter="on")
    with pytest.raises(UnknownNameError, match="Did you mean 'seven'"):
        adapted.session(adapter="sevn")
    with pytest.raises(ConfigError, match="the name is taken"):
        adapted.adapters.add(folders["two"], "one")
    with pytest.raises(ConfigError, match="cannot be called 'none'"):
        adapted.adapters.add(folders["two"], "none")
