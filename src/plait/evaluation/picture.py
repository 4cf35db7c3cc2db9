"""A picture of an evaluation on long texts: one panel for each task, one line for each memory."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from plait.errors import ConfigError, import_extra
from plait.evaluation.long_tasks import TASKS
from plait.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from plait.evaluation.long import Report

__all__ = ["check_picture", "draw", "save_picture"]

_STRETCH = 512
_LABELS = {
    "found": "answers found",
    "chosen": "right answer likeliest",
    "completed": "similarity of the line",
}


def check_picture(path: Path) -> None:
    """Whether a picture can be drawn into such a file, before anything is measured for it.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: a suffix that is none of .svg, .png and .pdf, or a folder that is not there.
    """
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise ConfigError(f"A picture is a .svg, .png or .pdf file. Got {path.name!r}.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be drawn, since there is no folder {path.parent}. Make it first.")
    import_extra("matplotlib", extra="plot", purpose="Drawing a picture")


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure into a file that `check_picture` allows, whole or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        with replacing(path) as beside:
            figure.savefig(beside, format=path.suffix[1:])
    except OSError as error:
        raise ConfigError(f"{path} could not be written: {error.strerror}.") from None


def draw(report: Report, path: Path) -> None:
    """Write a picture; the file's suffix says which kind: .svg, .png or .pdf.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: a suffix that is none of these, or a file that cannot be written.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(one.task for one in report.outcomes.values()))
    memories = list(dict.fromkeys(one.memory for one in report.outcomes.values()))
    panels = len(tasks) + 1
    columns = min(panels, 3)
    figure = Figure(figsize=(4 * columns, 3 * -(-panels // columns)), layout="constrained")
    axes = figure.subplots(-(-panels // columns), columns, squeeze=False).ravel()
    rows = report.summary()
    for axis, task in zip(axes, tasks, strict=False):
        measures = TASKS[task].measures
        for color, memory in enumerate(memories):
            if measures:
                points = [
                    (row["length"], row["hit"])
                    for row in rows
                    if row["task"] == task and row["memory"] == memory and "hit" in row
                ]
            else:
                points = _curve(report, task, memory)
            if points:
                axis.plot(
                    *zip(*points, strict=True), marker="o", markersize=3, label=memory, color=f"C{color}"
                )
        axis.set_title(task)
        axis.set_ylabel(_LABELS.get(measures, "nats a token"))
        axis.set_xlabel("tokens read" if measures else "position")
        if measures:
            axis.set_ylim(-0.05, 1.05)
    held = axes[len(tasks)]
    for color, memory in enumerate(memories):
        points = sorted(
            {
                (row["length"], row["nbytes"] / 1e6)
                for row in rows
                if row["memory"] == memory and "nbytes" in row
            }
        )
        if points:
            held.plot(*zip(*points, strict=True), marker="o", markersize=3, label=memory, color=f"C{color}")
    held.set_title("memory")
    held.set_ylabel("MB held")
    held.set_xlabel("tokens read")
    held.set_ylim(bottom=0)
    for axis in axes[panels:]:
        axis.set_axis_off()
    figure.legend(*held.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save_picture(figure, path)


def _curve(report: Report, task: str, memory: str) -> list[tuple[float, float]]:
    """Mean nats of each stretch over the cases of the greatest length."""
    found = [
        one for one in report.outcomes.values() if one.task == task and one.memory == memory and one.curve
    ]
    longest = max((one.length for one in found), default=0)
    curves = [one.curve for one in found if one.length == longest]
    return [((at + 0.5) * _STRETCH, mean(values)) for at, values in enumerate(zip(*curves, strict=True))]
