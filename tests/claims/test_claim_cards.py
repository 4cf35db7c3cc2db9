"""Every card is well-formed, and the cheap ones hold here and can fail."""

from __future__ import annotations

import importlib
import math
import re
import subprocess
import sys

import pytest
import torch

from plait import ops
from plait.claims import Claim, Quantity, Run, all_claims, run_claim
from plait.memory import DenseStrand
from plait.ops import Partial

CLAIMS = all_claims()


def verdict_of(name: str) -> tuple[str, str | None]:
    """Verdict and error of a quick run."""
    result = run_claim(CLAIMS[name], Run(quick=True), lambda line: None)
    return result.verdict, result.error


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS.keys())
def test_every_card_is_well_formed(claim: Claim) -> None:
    sentences = [claim.headline, claim.scale, *(bar.why for bar in claim.bars)]
    assert all(re.fullmatch(r"[A-Za-z0-9].*\.", sentence) for sentence in sentences)
    assert claim.title[0].isupper()
    assert not claim.title.endswith(".")
    assert all(bar.relation in (">=", "<=") and math.isfinite(bar.value) for bar in claim.bars)
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", bar.quantity) for bar in claim.bars)
    for module in claim.needs:
        assert importlib.util.find_spec(module) is not None


def test_every_module_of_cards_is_a_claim() -> None:
    cards = importlib.import_module("plait.claims.cards")
    assert list(CLAIMS) == sorted(CLAIMS)
    for name, claim in CLAIMS.items():
        module = importlib.import_module(f"{cards.__name__}.{name.replace('-', '_')}")
        assert module.CLAIM is claim


def test_listing_claims_does_not_load_numerical_packages() -> None:
    code = (
        "import sys; from plait.claims import all_claims; assert all_claims(); "
        "print([m for m in ('torch', 'numpy', 'transformers', 'tokenizers') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout == "[]\n"


@pytest.mark.parametrize("name", ["exact-merge", "frames"])
def test_a_cheap_claim_holds(name: str) -> None:
    assert verdict_of(name) == ("holds", None)


def test_the_same_seed_measures_the_same() -> None:
    first, second = (run_claim(CLAIMS["exact-merge"], Run(quick=True), lambda line: None) for _ in range(2))
    other = run_claim(CLAIMS["exact-merge"], Run(quick=True, seed=1), lambda line: None)
    assert first.quantities == second.quantities
    assert first.quantities != other.quantities


def test_exact_merge_notices_a_merge_that_loses_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    merge_all = ops.merge_all
    monkeypatch.setattr(ops, "merge_all", lambda parts: merge_all(list(parts)[:1]))
    assert verdict_of("exact-merge")[0] == "misses"


def test_exact_merge_notices_one_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    merge_all = ops.merge_all

    def textbook(parts: list[Partial]) -> Partial:
        parts = list(parts)
        merged = merge_all(parts)
        is_empty = any(bool((part.lse == -math.inf).all()) for part in parts)
        return Partial(merged.out * torch.nan, merged.lse) if is_empty else merged

    monkeypatch.setattr(ops, "merge_all", textbook)
    verdict, error = verdict_of("exact-merge")
    assert verdict == "failed"
    assert error == "max_error was measured as nan, which is not a finite number."


def test_frames_notices_a_strand_that_did_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DenseStrand, "moved", lambda strand, by: strand)
    assert verdict_of("frames")[0] == "misses"


def test_the_largest_of_values_does_not_hide_a_nan() -> None:
    assert Quantity.largest([1.0, 3.0, 2.0], "") == Quantity(3.0, "", samples=3)
    assert math.isnan(Quantity.largest([1.0, math.nan, 2.0], "").value)
