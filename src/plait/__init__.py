"""Plait: efficient sequence models built on one memory of strands.

import plait
lm = plait.load("smollm2")
print(lm.generate("The history of computing", max_new_tokens=64).text)
"""

from __future__ import annotations

__version__ = "0.1.0"
