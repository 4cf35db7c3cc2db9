"""The claims, one a file; every module here holds a `CLAIM`."""

from __future__ import annotations
