"""Grids that other formats round to the nearest value of."""

from __future__ import annotations

from typing import Literal

from plait.errors import ConfigError
from plait.weights.bitmod import BitMoD
from plait.weights.format import WeightFormat
from plait.weights.nf4 import NF4
from plait.weights.uniform import Uniform

__all__ = ["Bits", "GridName", "rounding"]

Bits = Literal[2, 3, 4, 8]
GridName = Literal["uniform", "bitmod", "nf4"]


def rounding(caller: str, grid: GridName, bits: Bits, group: int) -> WeightFormat:
    """The format that rounds to a grid.

    Raises:
        ConfigError: the grid has no such bits; the message names `caller`.
    """
    if grid == "uniform":
        return Uniform(bits=bits, group=group)
    if grid == "nf4":
        if bits != 4:
            raise ConfigError(f"{caller}.bits must be 4 with grid=nf4. Got {bits}.")
        return NF4(group=group)
    if bits not in (3, 4):
        raise ConfigError(f"{caller}.bits must be 3 or 4 with grid=bitmod. Got {bits}.")
    return BitMoD(bits=bits, group=group)
