"""Things that are described in a line, and the kind that each of them is: scikit-learn's bundled sets as text."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

__all__ = ["NEEDS", "LabelledSet", "labelled_sets"]

# A claim that uses the sets lists it.
NEEDS = ("sklearn",)

_SIZES = ("tiny", "small", "medium", "large", "huge")
# Loader, the columns that are told with their names, and what the kinds are called: the first token of each is its own.
_SETS: dict[str, tuple[str, dict[int, str], tuple[str, ...]]] = {
    "iris": (
        "load_iris",
        {2: "petal length", 3: "petal width", 0: "sepal length"},
        ("setosa", "versicolor", "virginica"),
    ),
    "wine": (
        "load_wine",
        {0: "alcohol", 6: "flavanoids", 9: "color", 12: "proline"},
        ("first", "second", "third"),
    ),
    "breast_cancer": (
        "load_breast_cancer",
        {20: "radius", 26: "concavity", 21: "texture"},
        ("malignant", "benign"),
    ),
}


class LabelledSet(NamedTuple):
    """Lines such as `petal length tiny, petal width small:`, and the kind that is right behind each.

    Attributes:
        name: of the set.
        kinds: all that there are.
        of_kind: descriptions by their kind.
    """

    name: str
    kinds: tuple[str, ...]
    of_kind: dict[str, list[str]]

    def taken(self, count: int) -> list[tuple[str, str]]:
        """So many descriptions with their kinds, each kind in turn; they are not given again."""
        chosen = [self.kinds[number % len(self.kinds)] for number in range(count)]
        return [(self.of_kind[kind].pop(), kind) for kind in chosen]

    def examples(self, count: int, pick: random.Random) -> str:
        """So many lines of examples, in random order."""
        lines = self.taken(count)
        pick.shuffle(lines)
        return "".join(f"{description} {kind}\n" for description, kind in lines)


def labelled_sets(pick: random.Random) -> list[LabelledSet]:
    """Iris, wine and breast cancer, in random order. A number is told by the fifth of its column that it is in."""
    datasets: Any = importlib.import_module("sklearn.datasets")
    found = []
    for name, (loader, columns, kinds) in _SETS.items():
        data = getattr(datasets, loader)()
        of_kind: dict[str, list[str]] = {kind: [] for kind in kinds}
        told = [_in_fifths(data.data[:, column].tolist()) for column in columns]
        for target, *sizes in zip(data.target, *told, strict=True):
            words = (f"{column} {size}" for column, size in zip(columns.values(), sizes, strict=True))
            of_kind[kinds[int(target)]].append(", ".join(words) + ":")
        for descriptions in of_kind.values():
            pick.shuffle(descriptions)
        found.append(LabelledSet(name, kinds, of_kind))
    return found


def _in_fifths(column: Sequence[float]) -> list[str]:
    """Each number of a column as a word for the fifth that it is in; equal numbers are in the same one."""
    rank = {value: number for number, value in reversed([*enumerate(sorted(column))])}
    return [_SIZES[len(_SIZES) * rank[value] // len(column)] for value in column]
