"""What the paper lets one expect of methods of one bit, as numbers that a run either reaches or does not."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["EXPECTED", "Expectation"]


class Expectation(NamedTuple):
    """A number and what it must reach.

    Attributes:
        says: one sentence.
        least: the number that makes it so.
        unit: of the number.
    """

    says: str
    least: float
    unit: str


EXPECTED = {
    "kept_by_the_best": Expectation(
        "The best method keeps 0.90 of the accuracy on digits with convolutions.", 0.9, "of fp32"
    ),
    "scaled_ahead_of_bnn": Expectation(
        "Every method with a scale is ahead of bnn, in the mean of what networks keep.", 0.0, "of fp32"
    ),
    "better_with_convolutions": Expectation(
        "Six of eight methods keep more with convolutions than in transformers, on the tasks of both.",
        0.75,
        "of methods",
    ),
    "wider_in_transformers": Expectation(
        "What methods keep differs more in transformers than with convolutions.", 0.0, "of fp32"
    ),
}
