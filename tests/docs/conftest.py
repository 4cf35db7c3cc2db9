"""What snippets find: one shared SmolLM2, two files to read, and registries that are put back afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import plait
from plait.decode.speculate import SPECULATORS
from plait.engine import LanguageModel
from plait.memory import CODECS, POLICIES, MemoryPlan
from plait.nn.config import MIXERS
from plait.weights import FORMATS

REPORT = """\
Hive seven gave twelve jars of honey in June and nine in July. Hive four gave three jars and lost its queen.
The meadow behind the barn was mown late, so clover was in bloom until August.
"""


@pytest.fixture(scope="session")
def load_once() -> Callable[..., LanguageModel]:
    """`plait.load`, with the parameters of each model held once whatever the memory and the draft."""
    loaded = functools.cache(plait.load)

    def load(name: str | Path, *, memory: str = "full", draft: str = "none", **options: Any) -> LanguageModel:
        options.pop("progress", None)
        path = plait.pull(str(name), offline=options.pop("offline", None))
        lm = loaded(path, **options)
        return LanguageModel(
            name=str(name),
            model=lm.model,
            tokenizer=lm.tokenizer,
            chat_template=lm.chat_template,
            plan=MemoryPlan.parse(memory),
            draft=SPECULATORS.parse(draft),
        )

    return load


@pytest.fixture
def _world_of_snippets(
    load_once: Callable[..., LanguageModel],
    smollm2_gguf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[None]:
    """A folder with `model.gguf` and `report.txt`, the shared model, and registries as they were."""
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").symlink_to(smollm2_gguf)
    Path("report.txt").write_text(REPORT, "utf-8")
    monkeypatch.setattr(plait, "load", load_once)
    monkeypatch.setattr(plait.engine, "load", load_once)
    axes = (CODECS, POLICIES, FORMATS, SPECULATORS, MIXERS)
    before = [dict(axis.methods) for axis in axes]
    yield
    for axis, methods in zip(axes, before, strict=True):
        axis.methods.clear()
        axis.methods.update(methods)
