"""Names of models on the Hugging Face hub: `owner/name`, `owner/name@revision`, `owner/name:file.gguf`."""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["HubId", "parse_hub_id"]

MAX_LENGTH = 200
WEIGHT_SUFFIXES = (".gguf", ".safetensors")

# A segment starts with a letter, digit or underscore, so it is never `.`, `..` or an option.
SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
PATH = rf"{SEGMENT}(?:/{SEGMENT})*"
HUB_ID = re.compile(rf"(?P<repo>{SEGMENT}/{SEGMENT})(?:@(?P<revision>{PATH}))?(?::(?P<file>{PATH}\.gguf))?")


class HubId(NamedTuple):
    """A repository on the hub at a revision, or one GGUF file of it.

    `str()` gives the shortest name that parses to the same id.
    """

    repo: str
    revision: str = "main"
    file: str | None = None

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return self.repo + revision + (f":{self.file}" if self.file else "")


def parse_hub_id(text: str) -> HubId | None:
    """Read `owner/name[@revision][:file.gguf]`; None when `text` is not of that form.

    A name that ends like a weight file, such as `models/x.gguf`, is a path and not a hub id.
    """
    match = HUB_ID.fullmatch(text) if len(text) <= MAX_LENGTH and ".." not in text else None
    if match is None or match["repo"].endswith(WEIGHT_SUFFIXES):
        return None
    return HubId(match["repo"], match["revision"] or "main", match["file"])
