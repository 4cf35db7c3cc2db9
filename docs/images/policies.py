"""Draw what queries see under each policy, and at which distance, as the policies themselves answer.

`python docs/images/policies.py` writes policies.svg, for a light page, and policies-dark.svg beside it.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from plait.memory import Heads, Memory, MemoryPlan

TOKENS = 96
PANELS = {
    "full": "full",
    "window": "window:size=24,sinks=4",
    "lm-infinite": "lm-infinite:local=24,initial=4",
    "infllm": "infllm:local=24,initial=4,block=8,topk=2,representatives=2,execution=8",
    "prflash": "prflash:block=8",
}
# Text, what is not seen, what is seen where it stands, what is seen as if it stood nearer.
LIGHT = ("#1f2430", "#eef0f3", "#1a7f72", "#b26a00")
DARK = ("#e8e8ea", "#2b303a", "#4cc9b0", "#f0b04a")


def seen(spec: str) -> Tensor:
    """(T, T): 0 where a query does not see a key, 1 where it does, 2 where it sees it as if it stood nearer."""
    plan = MemoryPlan.parse(spec)
    random = torch.Generator().manual_seed(3)
    # Values that name their token turn an answer into the weight of every token.
    memory = Memory(Heads(1, 1, 16, scale=1.0, value_dim=TOKENS), plan)
    q, k = (torch.randn(TOKENS, 1, 16, generator=random) for _ in range(2))
    weights = []
    for token in range(TOKENS):
        rows = slice(token, token + 1)
        weights.append(memory.attend(q[rows] / 4, k[rows] / 4, torch.eye(TOKENS)[rows, None])[:, 0])
        memory.commit()
    is_seen = torch.cat(weights) > 0
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    limit = plan.policy.max_distance
    return is_seen.int() + (is_seen & (distance > limit)).int() if limit is not None else is_seen.int()


def draw(colours: tuple[str, str, str, str]) -> Figure:
    """One panel for each policy: a row for each query, a column for each key."""
    text, *cells = colours
    figure, panels = plt.subplots(1, len(PANELS), figsize=(9.6, 2.5))
    for axes, (name, spec) in zip(panels, PANELS.items(), strict=True):
        axes.imshow(seen(spec), cmap=ListedColormap(cells), vmin=0, vmax=2, interpolation="nearest")
        axes.set_title(name, size=9.5, color=text, weight="bold")
        axes.set_xticks([])
        axes.set_yticks([])
        for side in axes.spines.values():
            side.set_visible(False)
    panels[0].set_ylabel("query", size=8, color=text)
    panels[0].set_xlabel("key", size=8, color=text)
    words = ("not seen", "seen where it stands", "seen as if it stood at the limit of distances")
    handles = [Patch(color=colour, label=label) for colour, label in zip(cells, words, strict=True)]
    figure.legend(
        handles=handles, loc="lower center", ncols=3, frameon=False, fontsize=8, labelcolor=text, borderpad=0
    )
    figure.subplots_adjust(0.03, 0.13, 0.995, 0.9, wspace=0.07)
    return figure


def main() -> None:
    """Write both versions; the same bytes every time."""
    folder = Path(__file__).parent
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "plait"}):
        for name, colours in (("policies.svg", LIGHT), ("policies-dark.svg", DARK)):
            figure = draw(colours)
            figure.savefig(folder / name, transparent=True, metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
