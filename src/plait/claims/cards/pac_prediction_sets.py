"""Predicted code with holes, and a promise of how often the truth fits."""

from __future__ import annotations

from collections.abc import Sequence

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run

__all__ = ["CLAIM"]

_PROMISES = {"tenth": 0.1, "fifth": 0.2}
_DELTA = 0.05


def _naive_index(covered: Sequence[Sequence[bool]], epsilon: float) -> int | None:
    """The smallest threshold with an error of epsilon in calibration, which gives no confidence."""
    shares = [sum(column) / len(covered) for column in zip(*covered, strict=True)]
    return next((index for index, share in enumerate(shares) if share >= 1 - epsilon), None)


def _measure(run: Run) -> Measurements:
    import math
    from functools import partial

    import numpy as np

    from plait.claims.returns import return_statements
    from plait.code import Example, PACSets, language, predict_line, with_prefix
    from plait.code.partial import predicted_tree
    from plait.decode.prediction_sets import GRID, calibrated_index
    from plait.engine import load

    grammar = language("python")
    statements = list(return_statements())[::3][: run.pick(800, 160)]
    lm = load("smollm2")
    examples = []
    for low in range(0, len(statements), 25):
        yield f"predicting {low} of {len(statements)}"
        some = statements[low : low + 25]
        found = predict_line(lm, [one.prompt for one in some], max_new_tokens=24)
        examples += [
            Example(with_prefix(prediction, "return"), one.statement.encode())
            for prediction, one in zip(found, some, strict=True)
        ]

    # Of each way to form sets, whether the truth is covered and what is removed: (examples, thresholds).
    covered: dict[str, list[list[bool]]] = {}
    removed: dict[str, list[list[float]]] = {}

    def add(name: str, holds: list[bool], gone: list[float]) -> None:
        covered.setdefault(name, []).append(holds)
        removed.setdefault(name, []).append(gone)

    right = 0
    for index, example in enumerate(examples):
        if index % 50 == 0:
            yield f"sets of {index} of {len(examples)}"
        for holes in (1, 2, 4, 8):
            sets = PACSets(holes=holes)
            add(
                f"holes_{holes}",
                sets.coverage(example),
                [one.removed for one in sets.sets(example.prediction)],
            )
        truth = grammar.parse(example.truth)
        parsed = predicted_tree(example.prediction, grammar)
        is_right = truth is not None and parsed is not None and parsed[1].root == truth.root
        right += is_right
        whole = [parsed is not None and example.prediction.nats <= -math.log(tau) for tau in GRID]
        add("whole", [is_right or not kept for kept in whole], [float(not kept) for kept in whole])
        node_wise = []
        for one in PACSets().sets(example.prediction):
            if one.tree is None:
                node_wise.append(one)
                continue
            # A node is kept by itself, whatever the program costs and however many holes there are.
            kept: list[bool] = []
            for parent, cost in zip(one.tree.parents, one.tree.nats, strict=True):
                kept.append((parent < 0 or kept[parent]) and (cost or 0.0) <= -math.log(one.tau))
            node_wise.append(one.at(kept, one.tau))
        add(
            "node_wise",
            [truth is not None and one.holds(truth.root) for one in node_wise],
            [one.removed for one in node_wise],
        )

    quantities = {"predictions_that_are_right": Quantity(right / len(examples), "", samples=len(examples))}
    draws, n = run.pick(200, 10), len(examples) // 4
    tables = {name: np.array(rows) for name, rows in covered.items()}
    shares = {name: np.array(rows) for name, rows in removed.items()}
    for promise, epsilon in _PROMISES.items():
        ways = {name: (name, partial(calibrated_index, epsilon=epsilon, delta=_DELTA)) for name in tables}
        ways["naive"] = ("holes_4", partial(_naive_index, epsilon=epsilon))
        for name, (kind, choose) in ways.items():
            rng = np.random.default_rng(run.seed)
            broken, coverage, gone = [], [], []
            for _ in range(draws):
                order = rng.permutation(len(examples))
                calibrating, judged = order[:n], order[n:]
                at = choose(tables[kind][calibrating].tolist())
                held = 1.0 if at is None else float(tables[kind][judged, at].mean())
                broken.append(held < 1 - epsilon)
                coverage.append(held)
                gone.append(1.0 if at is None else float(shares[kind][judged, at].mean()))
            quantities[f"{name}_{promise}_removed"] = Quantity(float(np.mean(gone)), "", samples=draws)
            quantities[f"{name}_{promise}_coverage"] = Quantity(float(np.mean(coverage)), "", samples=draws)
            quantities[f"{name}_{promise}_broken"] = Quantity(float(np.mean(broken)), "", samples=draws)
        ours = quantities[f"holes_4_{promise}_removed"].value
        for baseline in ("whole", "node_wise"):
            theirs = quantities[f"{baseline}_{promise}_removed"].value
            quantities[f"removed_{promise}_of_{baseline}"] = Quantity(ours / theirs, "x")
    return quantities


CLAIM = Claim(
    name="pac-prediction-sets",
    title="Predicted code with holes and a promise",
    source="Khakhar et al. 2023, arXiv:2302.08703",
    headline=(
        "Partial programs that hold the true program for at least a share 1 - epsilon of inputs, with confidence "
        "1 - delta, and that remove less than simpler sets do (the paper: PICARD on Spider, Codex on Python)."
    ),
    scale=(
        "SmolLM2-135M-Instruct completing 800 return statements of Python's standard library, one of a function, from "
        "about 50 tokens before each. 200 times they are split at random: 200 calibrate, and the other 600 are judged; "
        "delta 0.05, 4 holes. Baselines with the same calibration: the whole program or nothing, and each node by itself. "
        "The naive threshold is the one whose error in calibration is epsilon."
    ),
    bars=tuple(
        bar
        for promise, epsilon in _PROMISES.items()
        for bar in (
            Bar(
                quantity=f"holes_4_{promise}_coverage",
                relation=">=",
                value=1 - epsilon,
                unit="",
                why="The truth must be in the set as often as promised.",
            ),
            Bar(
                quantity=f"holes_4_{promise}_broken",
                relation="<=",
                value=_DELTA,
                unit="",
                why="The promise may be broken in a share delta of calibrations, though 600 examples stand for all.",
            ),
            Bar(
                quantity=f"removed_{promise}_of_whole",
                relation="<=",
                value=0.85,
                unit="x",
                why="Holes must remove clearly less than refusing whole programs does.",
            ),
        )
    ),
    measure=_measure,
)
