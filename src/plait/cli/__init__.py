"""The command line: results on stdout, everything else on stderr."""

from __future__ import annotations

from plait.cli.main import main

__all__ = ["main"]
