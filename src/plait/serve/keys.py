"""API keys: kept as hashes, compared in constant time; each key is a tenant."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping

__all__ = ["Keys"]


class Keys:
    """The keys that open the server.

    Args:
        keys: each a key, or `sha256:` and the hash of one in hex. None at all opens the server to everybody.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self.hashes = [
            bytes.fromhex(key.removeprefix("sha256:")) if key.startswith("sha256:") else _hash(key)
            for key in dict.fromkeys(keys)
        ]

    @property
    def are_set(self) -> bool:
        """Whether a client needs a key."""
        return bool(self.hashes)

    def tenant(self, headers: Mapping[str, str]) -> str | None:
        """On whose behalf a request with these headers (lower-case names) is made; None for a wrong or missing key.

        The name of a tenant is a part of its key's hash, which says nothing of the key.
        """
        if not self.hashes:
            return ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        digest = _hash(given.strip())
        # All are compared, so that the time does not tell which one was close.
        matches = [hmac.compare_digest(digest, known) for known in self.hashes]
        return digest.hex()[:12] if any(matches) else None


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
