"""From a model name to a path on this machine.

`resolve("smollm2")` returns the path of a model file, downloading it once; `pull` does the same with
a progress bar. `ALIASES` lists the short names, `cached_models` what is here, and `remove` frees it.
"""

from __future__ import annotations

from plait.hub.aliases import ALIASES, Alias, Wheel
from plait.hub.cache import CachedModel, cache_dir, cached_models, remove
from plait.hub.lexicons import wordnet_folder
from plait.hub.progress import Progress, RichProgress
from plait.hub.resolve import pull, resolve

__all__ = [
    "ALIASES",
    "Alias",
    "CachedModel",
    "Progress",
    "RichProgress",
    "Wheel",
    "cache_dir",
    "cached_models",
    "pull",
    "remove",
    "resolve",
    "wordnet_folder",
]
