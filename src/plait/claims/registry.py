"""All claims, found by looking into the folder of cards."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType

from plait.claims import cards
from plait.claims.claim import Claim
from plait.errors import UnknownNameError, suggestion

__all__ = ["all_claims", "find_claim"]


@functools.cache
def all_claims() -> Mapping[str, Claim]:
    """Every claim by name, sorted: the `CLAIM` of each module in `plait.claims.cards`."""
    claims: dict[str, Claim] = {}
    for module in pkgutil.iter_modules(cards.__path__):
        claim: Claim = importlib.import_module(f"{cards.__name__}.{module.name}").CLAIM
        assert claim.name == module.name.replace("_", "-"), f"{module.name}.py holds {claim.name}"
        claims[claim.name] = claim
    return MappingProxyType(dict(sorted(claims.items())))


def find_claim(name: str) -> Claim:
    """The claim of that name.

    Raises:
        UnknownNameError: there is none; close names are suggested.
    """
    claims = all_claims()
    if name not in claims:
        raise UnknownNameError(
            f"Unknown claim {name!r}.{suggestion(name, claims)} Known: {', '.join(claims)}."
        )
    return claims[name]
