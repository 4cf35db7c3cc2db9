"""Where results are kept: one JSON file for each claim, replaced in one step."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from plait import __version__
from plait.claims.claim import Claim
from plait.claims.result import Result
from plait.errors import ConfigError
from plait.files import write_text

__all__ = ["Store"]


class Store:
    """A folder of results.

    Args:
        folder: the folder, made when something is written; PLAIT_CLAIMS, or the user's data folder,
            when left out.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or _default_folder()

    def path(self, name: str) -> Path:
        """The file of a claim's result."""
        return self.folder / f"{name}.json"

    def parts(self, claim: Claim) -> Path:
        """The folder of what an interrupted run of a claim has done; another for another scale or version."""
        described = f"{__version__}\n{claim.scale}".encode()
        return self.folder / ".parts" / f"{claim.name}-{hashlib.sha256(described).hexdigest()[:12]}"

    def forget_parts(self, claim: Claim) -> None:
        """Remove what interrupted runs of a claim have left."""
        for folder in self.parts(claim).parent.glob(f"{claim.name}-{'[0-9a-f]' * 12}"):
            shutil.rmtree(folder, ignore_errors=True)

    def read(self, claim: Claim) -> Result | None:
        """The last full run of a claim in this folder; None if there is none.

        Raises:
            ConfigError: the file is damaged, or holds the result of something else.
        """
        path = self.path(claim.name)
        try:
            result = Result.parse(path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{path} could not be read: {error.strerror}.") from None
        except (ConfigError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not a result of a claim ({error}). {_again(claim)}") from None
        if result.claim != claim.name or result.quick:
            kind = f"a quick run of {result.claim}" if result.quick else f"a result of {result.claim}"
            raise ConfigError(f"{path} is {kind}. {_again(claim)}")
        return result

    def write(self, result: Result) -> Path:
        """Replace the result of a claim.

        Raises:
            ConfigError: the run was a quick one, or the file cannot be written; the old one is whole.
        """
        path = self.path(result.claim)
        if result.quick:
            raise ConfigError(
                f"A quick run of {result.claim} proves nothing and is not kept. Run it without --quick."
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(path, result.text())
        except OSError as error:
            raise ConfigError(f"{path} could not be written: {error.strerror}.") from None
        return path


def _again(claim: Claim) -> str:
    return f"Delete the file, or measure again: plait claims run {claim.name}"


def _default_folder() -> Path:
    if chosen := os.environ.get("PLAIT_CLAIMS"):
        return Path(chosen)
    import platformdirs

    return platformdirs.user_data_path("plait", appauthor=False) / "claims"
