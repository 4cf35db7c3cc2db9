"""Plans of memory are read from spec strings, and say what is wrong with one."""

from __future__ import annotations

import pytest
import torch
from memory_methods import CODEC_ENTRIES, POLICY_ENTRIES, CodecEntry, PolicyEntry

from plait.errors import ConfigError, IncompatibleError, UnknownNameError
from plait.memory import CODECS, POLICIES, MemoryPlan
from plait.memory.codecs import Dense
from plait.memory.policies import Full, Window


def test_methods_are_read_in_any_order_and_default_to_exact() -> None:
    plan = MemoryPlan.parse("dense:dtype=bf16,window:size=64,sinks=2")
    assert plan == MemoryPlan(codec=Dense(dtype="bf16"), policy=Window(size=64, sinks=2))
    assert plan == MemoryPlan.parse("window:sinks=2,size=64,dense:dtype=bf16")
    assert MemoryPlan() == MemoryPlan.parse("full") == MemoryPlan.parse("dense")
    assert (MemoryPlan().codec, MemoryPlan().policy) == (Dense(dtype="fp32"), Full())


def test_the_device_is_kept() -> None:
    assert MemoryPlan.parse("full", "meta").device == torch.device("meta")


def test_the_text_of_a_plan_names_what_was_changed() -> None:
    assert str(MemoryPlan.parse("dense:dtype=fp16,window")) == "window,dense:dtype=fp16"
    assert str(MemoryPlan()) == "full,dense"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("windw", r"Unknown memory method 'windw'. Did you mean 'window'\? Codecs: dense"),
        ("", "Empty method name in ''"),
        ("full,", "Empty method name in 'full,'"),
        ("full,window", "Two policies in 'full,window': full and window. Choose one"),
        ("dense,gear", "Codec dense cannot be followed by gear: it leaves no numbers .* Write dense last"),
        ("gear,full,gear", "Codec gear cannot be followed by gear"),
        ("saq:steps=64@16", "Staircase.steps must end with rest@bits, and only end so. Got '64@16'"),
        ("saq:steps=rest@8/rest@4", "Staircase.steps must end with rest@bits, and only end so"),
        ("saq:steps=64@4/rest@8", "Staircase.steps must not have more bits for older tokens.* use sink"),
        ("saq:steps=64@5/rest@4", "takes tokens@bits, such as 64@8, with 2, 3, 4, 8 or 16 bits. Got '64@5'"),
        ("saq:steps=", "Staircase.steps takes tokens@bits.* Got ''"),
        ("saq:steps=65@8/rest@4", "take multiples of group 64. Got 65 tokens"),
        ("saq:sink=32@8", "take multiples of group 64. Got 32 tokens"),
        ("saq:sink=rest@8", "Staircase.sink takes tokens@bits.* Got 'rest@8'"),
        ("gear:bits=5", "GEAR.bits must be 2, 3, 4 or 8. Got '5'"),
        ("gear:sparsity=0.5", r"GEAR.sparsity must be a number in \[0, 0.5\). Got '0.5'"),
        ("gear:buffer=100", "GEAR.buffer must be a multiple of GEAR.group for backbone=kivi. Got 100 and 64"),
        ("size=4", "'size=4' starts with a setting. Write the method first"),
        ("window:size", "'size' in '.*' is not a setting"),
        ("window:size=1,size=2", "'size' is given twice"),
        ("window:sise=4", r"Window has no setting 'sise'. Did you mean 'size'\? It takes size, sinks"),
        ("full:size=4", "Full has no setting 'size'. It takes no settings"),
        ("window:size=0", r"Window.size must be a whole number in \[1, inf\). Got '0'"),
        ("window:size=many", r"Window.size must be a whole number in \[1, inf\). Got 'many'"),
        ("window:size=2.5", r"Window.size must be a whole number"),
        ("window:sinks=-1", r"Window.sinks must be a whole number in \[0, inf\). Got '-1'"),
        ("dense:dtype=int4", "Dense.dtype must be fp32, bf16 or fp16. Got 'int4'"),
    ],
)
def test_a_wrong_plan_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MemoryPlan.parse(text)


def test_an_unknown_name_has_an_error_of_its_own() -> None:
    with pytest.raises(UnknownNameError):
        MemoryPlan.parse("gear2000")


def test_every_registered_method_is_in_the_matrix() -> None:
    def names(entries: list[CodecEntry] | list[PolicyEntry]) -> set[str]:
        return {entry.spec.partition(":")[0] for entry in entries}

    assert names(CODEC_ENTRIES) == set(CODECS.names())
    assert names(POLICY_ENTRIES) == set(POLICIES.names())


@pytest.mark.parametrize("codec", ["think:value_ratio=0.3", "think:ratio=0.4,value_ratio=0.3,gear:bits=4"])
def test_a_policy_that_stores_while_reading_refuses_a_codec_that_waits_for_the_end(codec: str) -> None:
    with pytest.raises(IncompatibleError, match=r"infllm.*think"):
        MemoryPlan.parse(f"infllm,{codec}")
    MemoryPlan.parse("infllm,think:ratio=0.4,gear:bits=4")
