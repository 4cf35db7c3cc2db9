"""The server as a deployment of Ray Serve, for more than one machine.

`serve run plait.serve.ray_deployment:app model=smollm2 num_replicas=4`, or the same in a Serve config file. Ray
starts the replicas, spreads requests over them and starts them again; each is a whole server with its own limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plait.errors import ConfigError, import_extra
from plait.serve.settings import Settings, read_settings

__all__ = ["app"]

# What Ray decides in place of the server's settings.
_OF_RAY = ("host", "port", "replicas")


def app(args: Mapping[str, Any]) -> Any:
    """An application for `ray.serve.run`, or for the command `serve run`.

    Ray sends each request to any replica, so sessions, which live in one, are switched off where there are
    several, unless `max_sessions_per_key` is given.

    Args:
        args: `num_replicas` (1) and `num_cpus` of each (1); all else are settings of the server by name.

    Raises:
        ConfigError: a setting that is unknown, wrong, or Ray's own to make.
        MissingExtraError: Ray is not installed.

    Example:
        >>> ray.serve.run(app({"model": "smollm2", "num_replicas": 2}))  # doctest: +SKIP
    """
    serve = import_extra("ray.serve", extra="ray", purpose="A deployment of Ray Serve")
    given = dict(args)
    num_replicas, num_cpus = (_positive(given, name) for name in ("num_replicas", "num_cpus"))
    if wrong := [name for name in _OF_RAY if name in given]:
        raise ConfigError(
            f"{wrong[0]} is not a setting here: Ray starts replicas and listens. Give it to Ray."
        )
    if unknown := [name for name in given if name not in Settings.model_fields]:
        raise ConfigError(f"There is no setting {unknown[0]!r}. plait serve --help lists them.")
    if num_replicas > 1:
        given.setdefault("max_sessions_per_key", 0)
    settings = read_settings(given, {})

    def build() -> Any:
        # In the replica's process, which is where the model is.
        from plait.engine import load
        from plait.serve.app import create_app
        from plait.serve.logs import set_up_logging

        set_up_logging(settings.log_format)
        lm = load(
            settings.model,
            weights=settings.weights,
            memory=settings.memory,
            draft=settings.draft,
            draft_model=settings.draft_model,
            offline=settings.offline or None,
        )
        return create_app(lm, settings)

    class Server:
        """A replica; the application does everything."""

    deployment = serve.deployment(
        name="plait",
        num_replicas=num_replicas,
        ray_actor_options={"num_cpus": num_cpus},
        # The server refuses what is too much by itself, with a reason.
        max_ongoing_requests=2 * settings.max_requests,
        graceful_shutdown_timeout_s=settings.drain_seconds,
    )
    return deployment(serve.ingress(build)(Server)).bind()


def _positive(given: dict[str, Any], name: str) -> int:
    """Take a number of Ray's out of the settings; on the command line it comes as text."""
    value = given.pop(name, 1)
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1. Got {value!r}.")
    return number
