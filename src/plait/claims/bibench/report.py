"""Running the benchmark: scores of all tracks, what the paper found and whether it is so here, and the picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.claims.bibench.cells import FULL_PRECISION, Grid
from plait.claims.bibench.expected import EXPECTED
from plait.claims.bibench.networks import NETWORKS
from plait.claims.bibench.tracks import TRACKS, Scores
from plait.errors import ConfigError, UnknownNameError, import_extra, suggestion
from plait.files import replacing

__all__ = ["Finding", "Report", "check_radar", "draw_radar", "measure"]

# A method that has no scale of weights at all.
_UNSCALED = "bnn"


@dataclass(frozen=True)
class Finding:
    """Something that is expected of methods, and whether it was so here.

    Args:
        name: one of `EXPECTED`.
        found: the number that it is about.
    """

    name: str
    found: float

    @property
    def is_so(self) -> bool:
        """Whether it was so."""
        return self.found >= EXPECTED[self.name].least


@dataclass(frozen=True)
class Report:
    """Scores of every method by track, and findings.

    Args:
        scale: its name.
        scores: by track, then method.
        findings: what could be checked with the tracks and methods that were run.
    """

    scale: str
    scores: dict[str, Scores]
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON holds it; null where there is no number."""
        return {
            "scale": self.scale,
            "tracks": {
                track: {
                    method: {
                        "overall": _number(score.overall),
                        "parts": {name: _number(value) for name, value in score.parts.items()},
                        "measured": {name: _number(value) for name, value in score.raw.items()},
                    }
                    for method, score in scores.items()
                }
                for track, scores in self.scores.items()
            },
            "findings": [
                {
                    "name": one.name,
                    "expected": EXPECTED[one.name].says,
                    "found": _number(one.found),
                    "reproduced": one.is_so,
                }
                for one in self.findings
            ],
        }

    def lines(self) -> list[str]:
        """A table of overall metrics, and a line for each finding."""
        methods = list(next(iter(self.scores.values())))
        width = max(map(len, methods))
        found = [f"{'method':{width}}  " + "  ".join(f"{track:>12}" for track in self.scores)]
        for method in methods:
            values = (scores[method].overall for scores in self.scores.values())
            found.append(
                f"{method:{width}}  "
                + "  ".join(
                    f"{value:12.3f}" if math.isfinite(value) else f"{'failed':>12}" for value in values
                )
            )
        found += [
            f"{'reproduced' if one.is_so else 'not reproduced'}: {EXPECTED[one.name].says} Here: {one.found:.3f}."
            for one in self.findings
        ]
        return found


def measure(grid: Grid, tracks: Sequence[str] = ()) -> Generator[str, None, Report]:
    """Run tracks, all when left out, one after the other; says a line for each cell that is trained.

    Raises:
        UnknownNameError: a track that there is not.
    """
    for track in tracks:
        if track not in TRACKS:
            raise UnknownNameError(
                f"Unknown track {track!r}.{suggestion(track, TRACKS)} Known: {', '.join(TRACKS)}."
            )
    scores: dict[str, Scores] = {}
    for name in tracks or TRACKS:
        yield f"track {name}: {TRACKS[name].title}"
        scores[name] = yield from TRACKS[name](grid)
    return Report(grid.scale.name, scores, tuple(_findings(scores)))


def _findings(scores: dict[str, Scores]) -> list[Finding]:
    """What the paper's setting lets one expect, checked on the accuracies of the learning track."""
    kept = {method: score for method, score in scores.get("task", {}).items() if method != FULL_PRECISION}
    if not kept:
        return []
    full = scores["task"][FULL_PRECISION].raw
    share = {
        method: {network: score.raw[network] / full[network] for network in NETWORKS}
        for method, score in kept.items()
    }
    found = [Finding("kept_by_the_best", max(of["digits-cnn"] for of in share.values()))]
    mean = {method: statistics.fmean(of.values()) for method, of in share.items()}
    if _UNSCALED in mean and len(mean) > 1:
        last = min(value for method, value in mean.items() if method != _UNSCALED)
        found.append(Finding("scaled_ahead_of_bnn", last - mean[_UNSCALED]))
    both = {
        family: {
            method: statistics.fmean(of[f"{task}-{family}"] for task in ("digits", "lines"))
            for method, of in share.items()
        }
        for family in ("cnn", "transformer")
    }
    better = [both["cnn"][method] > both["transformer"][method] for method in share]
    found.append(Finding("better_with_convolutions", statistics.fmean(better)))
    if len(share) > 1:
        spread = {family: statistics.pstdev(of.values()) for family, of in both.items()}
        found.append(Finding("wider_in_transformers", spread["transformer"] - spread["cnn"]))
    return found


def check_radar(path: Path) -> None:
    """Whether a picture can be drawn into such a file, before anything is measured for it.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: a suffix that is none of .svg, .png and .pdf.
    """
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise ConfigError(f"A picture is a .svg, .png or .pdf file. Got {path.name!r}.")
    import_extra("matplotlib", extra="plot", purpose="Drawing a picture")


def draw_radar(report: Report, path: Path) -> None:
    """Draw a spoke for each track and a polygon for each method, as shares of the best of a track.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: a suffix that is none of .svg, .png and .pdf, or a file that cannot be written.
    """
    check_radar(path)
    from matplotlib.figure import Figure

    tracks = list(report.scores)
    methods = list(report.scores[tracks[0]])
    best = {
        track: max((s.overall for s in of.values() if math.isfinite(s.overall)), default=1.0)
        for track, of in report.scores.items()
    }
    turns = [2 * math.pi * number / len(tracks) for number in range(len(tracks))]
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    panels = figure.subplots(1, 2, subplot_kw={"projection": "polar"})
    binary = [method for method in methods if method != FULL_PRECISION]
    for panel, shown in zip(panels, (binary[: len(binary) // 2], binary[len(binary) // 2 :]), strict=True):
        for method in [FULL_PRECISION, *shown]:
            values = [report.scores[track][method].overall / best[track] for track in tracks]
            values = [value if math.isfinite(value) else 0.0 for value in values]
            style = {"linestyle": ":", "color": "grey"} if method == FULL_PRECISION else {}
            panel.plot([*turns, turns[0]], [*values, values[0]], label=method, **style)
        panel.set_xticks(turns, [f"{track}\n{best[track]:.2f}" for track in tracks])
        panel.tick_params(axis="x", pad=14)
        panel.set_ylim(0, 1.02)
        panel.set_yticks([0.25, 0.5, 0.75, 1.0], [])
        panel.legend(loc="lower left", bbox_to_anchor=(-0.25, -0.12), fontsize=8)
    try:
        with replacing(path) as beside:
            figure.savefig(beside, format=path.suffix[1:])
    except OSError as error:
        raise ConfigError(f"{path} could not be written: {error.strerror}.") from None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
