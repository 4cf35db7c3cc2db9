"""Draw the past of a request: strands with frames of their own, and what a query merges.

`python docs/images/strands.py` writes strands.svg, for a light page, and strands-dark.svg beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle


@dataclass(frozen=True)
class Palette:
    """Colours of one version: text, remarks, one for each strand, and how opaque its filling is."""

    text: str
    remark: str
    strands: tuple[str, str, str, str]
    tint: float


LIGHT = Palette("#1f2430", "#5d6675", ("#1a7f72", "#b26a00", "#6250c4", "#c2442a"), 0.13)
DARK = Palette("#e8e8ea", "#a3abb8", ("#4cc9b0", "#f0b04a", "#a99bf5", "#ff8a6b"), 0.20)


@dataclass(frozen=True)
class Run:
    """A strand of the example: its position, its length, where its frame starts, and what it is."""

    start: int
    length: int
    offset: int
    name: str
    remark: str

    @property
    def middle(self) -> float:
        """Position of its centre."""
        return self.start + self.length / 2


RUNS = (
    Run(0, 12, 0, "instructions", "shared with other requests,\nread once for all of them"),
    Run(12, 16, 12, "report", "moved here from the start of a page:\nits keys were not touched"),
    Run(28, 12, 0, "conversation", "stored as the codec says,\nseen as the policy says"),
    Run(40, 5, 0, "tail", "dense: new tokens\nand drafts"),
)
QUERY = 44
# Heights of the rows, in the units of the vertical axis.
STRAND_Y, STRAND_HEIGHT, ROTATE_Y, PARTIAL_Y, MERGE_Y = 4.3, 0.72, 3.25, 1.75, 0.42
MERGE_X = 22.5


def box(
    axes: Axes, left: float, bottom: float, width: float, height: float, colour: str, tint: float
) -> None:
    """A box with round corners."""
    style = "round,pad=0,rounding_size=0.2"
    face = to_rgba(colour, tint)
    patch = FancyBboxPatch(
        (left, bottom), width, height, boxstyle=style, linewidth=1.4, edgecolor=colour, facecolor=face
    )
    axes.add_patch(patch)


def draw_strand(axes: Axes, run: Run, colour: str, palette: Palette) -> None:
    """One strand as a row of tokens, what it is above it, and its frame below it."""
    left, width = run.start + 0.18, run.length - 0.36
    box(axes, left, STRAND_Y, width, STRAND_HEIGHT, colour, palette.tint)
    for token in range(1, run.length):
        x = left + width * token / run.length
        axes.plot([x, x], [STRAND_Y, STRAND_Y + 0.13], color=colour, linewidth=0.7, alpha=0.75)
    name_y, remark_y, frame_y = STRAND_Y + 0.43, STRAND_Y + STRAND_HEIGHT + 0.16, STRAND_Y - 0.24
    axes.text(
        run.middle, name_y, run.name, ha="center", va="center", size=9.5, color=palette.text, weight="bold"
    )
    axes.text(run.middle, remark_y, run.remark, ha="center", va="bottom", size=7.4, color=palette.remark)
    first = run.start - run.offset
    axes.text(left + 0.1, frame_y, f"{first}", ha="left", va="center", size=7.5, color=colour)
    axes.text(
        left + width - 0.1,
        frame_y,
        f"{first + run.length - 1}",
        ha="right",
        va="center",
        size=7.5,
        color=colour,
    )


def draw_partial(axes: Axes, run: Run, colour: str, palette: Palette) -> None:
    """What the query gets from one strand, and the way of it to the merge."""
    down = FancyArrowPatch(
        (run.middle, STRAND_Y - 0.42),
        (run.middle, PARTIAL_Y + 0.58),
        arrowstyle="-|>",
        mutation_scale=9,
        linewidth=1.2,
        color=colour,
    )
    axes.add_patch(down)
    axes.text(
        run.middle - 0.45,
        ROTATE_Y,
        f"query at {QUERY - run.offset}",
        ha="right",
        va="center",
        size=8,
        color=palette.text,
    )
    for left, word in ((run.middle - 2.3, "out"), (run.middle, "lse")):
        face = to_rgba(colour, palette.tint)
        axes.add_patch(
            Rectangle((left, PARTIAL_Y), 2.3, 0.5, linewidth=1.2, edgecolor=colour, facecolor=face)
        )
        axes.text(left + 1.15, PARTIAL_Y + 0.24, word, ha="center", va="center", size=8.5, color=palette.text)
    arrival = MERGE_X + (run.middle - MERGE_X) / 12
    axes.plot([run.middle, arrival], [PARTIAL_Y - 0.06, MERGE_Y + 0.33], color=colour, linewidth=1.2)


def draw(palette: Palette) -> Figure:
    """The whole picture."""
    figure, axes = plt.subplots(figsize=(9.2, 3.9))
    for run, colour in zip(RUNS, palette.strands, strict=True):
        draw_strand(axes, run, colour, palette)
        draw_partial(axes, run, colour, palette)
    box(axes, MERGE_X - 2.2, MERGE_Y - 0.28, 4.4, 0.56, palette.text, 0.0)
    axes.text(MERGE_X, MERGE_Y - 0.015, "merge", ha="center", va="center", size=9.5, color=palette.text)
    axes.text(
        MERGE_X + 2.8,
        MERGE_Y - 0.015,
        "equals attention over all of them at once",
        ha="left",
        va="center",
        size=8,
        color=palette.remark,
    )
    rows = {
        "strands": STRAND_Y + 0.36,
        "own frame": STRAND_Y - 0.24,
        "rotate": ROTATE_Y,
        "partials": PARTIAL_Y + 0.25,
    }
    for words, y in rows.items():
        axes.text(-0.7, y, words, ha="right", va="center", size=8, color=palette.remark, style="italic")
    axes.set_xlim(-5.2, 45.6)
    axes.set_ylim(0.02, 5.85)
    axes.set_axis_off()
    figure.subplots_adjust(0, 0, 1, 1)
    return figure


def main() -> None:
    """Write both versions; the same bytes every time."""
    folder = Path(__file__).parent
    # Text as outlines looks the same on every machine; the salt makes the names inside repeatable.
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "plait"}):
        for name, palette in (("strands.svg", LIGHT), ("strands-dark.svg", DARK)):
            figure = draw(palette)
            figure.savefig(folder / name, transparent=True, metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
