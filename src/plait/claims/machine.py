"""Facts about this machine, so that a number is never read without them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

__all__ = ["Machine", "memory_bandwidth", "native_is_on"]

# Packages whose version can change a result.
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and with what something was measured.

    Args:
        processor: model name of the CPU.
        cores: cores that this process may use.
        memory: bytes of main memory; None where the system does not say.
        system: operating system and its version.
        python: version.
        packages: versions of the packages that can change a result, where installed.
        threads: threads of torch.
        native: whether the native operations are on.
    """

    processor: str
    cores: int
    memory: int | None
    system: str
    python: str
    packages: dict[str, str]
    threads: int
    native: bool

    @classmethod
    def this(cls) -> Self:
        """This machine, as this process uses it now."""
        import torch

        return cls(
            processor=_processor(),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            memory=_memory(),
            system=f"{platform.system()} {platform.release()}",
            python=platform.python_version(),
            packages=_packages(),
            threads=torch.get_num_threads(),
            native=native_is_on(),
        )

    def __str__(self) -> str:
        memory = "" if self.memory is None else f", {self.memory / 2**30:.0f} GiB"
        packages = ", ".join(f"{name} {version}" for name, version in self.packages.items())
        return (
            f"{self.processor}, {self.cores} cores{memory}; {self.system}, Python {self.python}, {packages}; "
            f"{self.threads} threads, native operations {'on' if self.native else 'off'}"
        )


def native_is_on() -> bool:
    """Whether the native operations are built and not switched off with PLAIT_NATIVE=0."""
    return os.environ.get("PLAIT_NATIVE") != "0" and importlib.util.find_spec("plait._native") is not None


def memory_bandwidth() -> float:
    """Bytes per second at which torch's threads read main memory: the best of five sums over 1 GiB."""
    import torch

    block = torch.ones(2**28)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        block.sum()
        seconds.append(time.perf_counter() - start)
    return block.numel() * block.element_size() / min(seconds)


def _packages() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _processor() -> str:
    # Only Linux has this file.
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
