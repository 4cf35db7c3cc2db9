"""Networks of one bit: methods to train them, one file each, and the packed form in which they run.

The layers are torch's own, replaced by `binarize`; the methods are those of BiBench (Qin et al. 2023, arXiv:2301.11233).
"""

from __future__ import annotations

from plait.weights.binary.base import BINARIZERS, Binarizer, Place, Rule
from plait.weights.binary.bireal import BiReal
from plait.weights.binary.bnn import BNN
from plait.weights.binary.dorefa import DoReFa
from plait.weights.binary.fda import FDA
from plait.weights.binary.layers import BinaryLayer, Window, begin_epoch, binarize, binary_layers
from plait.weights.binary.packed import BinaryMatrix, PackedBinary, export
from plait.weights.binary.react import ReAct
from plait.weights.binary.recu import ReCU
from plait.weights.binary.xnor import XNOR
from plait.weights.binary.xnorpp import XNORpp

__all__ = [
    "BINARIZERS",
    "BNN",
    "FDA",
    "XNOR",
    "BiReal",
    "BinaryLayer",
    "BinaryMatrix",
    "Binarizer",
    "DoReFa",
    "PackedBinary",
    "Place",
    "ReAct",
    "ReCU",
    "Rule",
    "Window",
    "XNORpp",
    "begin_epoch",
    "binarize",
    "binary_layers",
    "export",
]
