from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from plait.code import Example, PACSets, PartialProgram, Prediction, language
from plait.code.partial import predicted_tree
from plait.errors import ConfigError, IncompatibleError


def prediction(*pieces: str | bytes, logprobs: tuple[float, ...] | None = None) -> Prediction:
    data = tuple(piece.encode() if isinstance(piece, str) else piece for piece in pieces)
    return Prediction(data, logprobs or (-0.5,) * len(data))


def cost_of(one: Prediction, name: str = "python") -> dict[str, float | None]:
    tree, syntax = predicted_tree(one, language(name)) or pytest.fail("does not parse")
    source = one.source
    return {
        source[slice(*span)].decode(): cost
        for span, cost in zip(syntax.spans, tree.nats, strict=True)
        if span is not None and tree.nodes[0].label != ""
    }


def test_tokens_cost_the_nodes_they_touch() -> None:
    one = prediction("return", " a", " +", " f", "(b", ")", logprobs=(0.0, -1.0, -2.0, -3.0, -4.0, -5.0))
    costs = cost_of(one)
    # `a` and `f` own one token; `(b` touches the call and its argument; the plus is the expression's own.
    assert costs == {"return a + f(b)": 0.0, "a": 1.0, "a + f(b)": 2.0, "f": 3.0, "f(b)": 9.0, "b": 4.0}


def test_places_are_bytes_also_behind_letters_that_are_not_ascii() -> None:
    one = prediction("return 'é漢'", " +", " naïve", logprobs=(-0.25, -1.0, -2.0))
    costs = cost_of(one)
    assert costs["'é漢'"] == 0.25
    assert costs["naïve"] == 2.0
    split = "é".encode()
    assert cost_of(prediction("x = '", split[:1], split[1:], "'"))["'é'"] == 2.0


@pytest.mark.parametrize(
    "source",
    ["x = 1\r\ny = 2", "# a comment\n(a,\n  b)", "f'{a + 1:>{w}} {b!r}'", "\n\n  return x", "match x:\n case {'a': 1, **r}: pass",
     "f(*a, **{'k': v}, **k)", "def f(a, *, b, c=1): pass", "[x async for x in y]", "x: int", "a\x0c = 1"],
)  # fmt: skip
def test_a_program_is_in_its_own_set_and_every_byte_may_be_a_token(source: str) -> None:
    data = source.encode()
    one = Prediction(tuple(data[index : index + 1] for index in range(len(data))), (-0.01,) * len(data))
    sets = PACSets(holes=2).sets(one)
    assert sets[0].tree is not None
    for found in sets:
        assert found.contains(source)
        # No span ends outside of the program, nor in the middle of a character.
        found.text.encode()
    whole = PACSets().sets(Prediction(one.pieces, (0.0,) * len(data)))[-1]
    assert (whole.removed, whole.text) == (0.0, source)


def test_a_set_without_holes_holds_what_is_the_same_tree_and_nothing_else() -> None:
    whole = PACSets().sets(prediction("return f(a, 1)", logprobs=(0.0,)))[0]
    assert whole.contains("return f( a,1 )  # the same")
    for other in (
        "return f(a, 1.0)",
        "return f(a, True)",
        "return g(a, 1)",
        "return f(a)",
        "f(a, 1)",
        "return (",
    ):
        assert not whole.contains(other)


def test_unlikely_parts_become_holes_that_hold_other_parts() -> None:
    one = prediction("return ", "total", " +", " wrong", logprobs=(-0.01, -0.01, -0.01, -5.0))
    found = PACSets(holes=1).sets(one)[50]
    assert found.text == "return total + ??"
    assert found.removed == pytest.approx(1 / 5)
    assert found.contains("return total + other(1, 2)")
    assert not found.contains("return total - wrong")
    again = language("python").parse(found.text.replace("??", "hole").encode())
    assert again is not None
    assert found.holds(again.root)


def test_what_does_not_parse_is_everything() -> None:
    found = PACSets().sets(prediction("return (((", logprobs=(-1.0,)))[0]
    assert (found.text, found.removed, found.holes) == ("??", 1.0, ())
    assert found.contains("x = 1")
    deep = prediction("(" * 5000 + "a" + ")" * 5000)
    assert PACSets().sets(deep)[0].removed == 1.0
    assert PACSets().sets(prediction(b"\xff\xfe", b"x"))[0].removed == 1.0


def test_an_impossible_token_is_clipped_and_a_wrong_one_refused() -> None:
    assert cost_of(prediction("x", logprobs=(-math.inf,)))["x"] == 10.0
    for wrong in (math.nan, 0.5):
        with pytest.raises(ConfigError, match="log-probability must be 0 or less"):
            prediction("x", logprobs=(wrong,))
    with pytest.raises(ConfigError, match="Got 1 for 2 tokens"):
        prediction("x", "y", logprobs=(-1.0,))


def examples(count: int) -> list[Example]:
    """Nine of ten predictions are right, and the model is less sure of the others."""
    return [
        Example(prediction("return ", "right", logprobs=(-0.01, -0.02)), b"return right")
        if index % 10
        else Example(prediction("return ", "right", logprobs=(-0.01, -3.0)), b"return other")
        for index in range(count)
    ]


def test_calibration_keeps_its_promise_and_is_saved_and_read(tmp_path: Path) -> None:
    sets = PACSets(epsilon=0.1, delta=0.05, holes=2).calibrate(examples(100), model="m" * 64)
    assert sets.num_examples == 100
    assert sets.tau is not None
    sure, unsure = (sets.predict(one.prediction, model="m" * 64) for one in (examples(2)[1], examples(1)[0]))
    assert sure.text == "return right"
    assert unsure.text == "return ??"
    path = tmp_path / "sets.json"
    sets.save(path)
    assert PACSets.load(path) == sets
    with pytest.raises(IncompatibleError, match="calibrate again"):
        PACSets.load(path).predict(sure.prediction, model="other")


def test_everything_is_promised_where_the_model_is_always_wrong() -> None:
    wrong = [Example(prediction("a", logprobs=(-1e-9,)), b"b")] * 60
    sets = PACSets().calibrate(wrong)
    assert sets.tau == 1.0
    found = sets.predict(wrong[0].prediction)
    assert isinstance(found, PartialProgram)
    assert (found.text, found.contains("anything at all")) == ("??", True)


def test_refusals_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"at least 29 calibration examples\. Got 10"):
        PACSets().calibrate(examples(10))
    with pytest.raises(ConfigError, match="is not python"):
        PACSets().calibrate([Example(prediction("a"), b"return (")] * 40)
    with pytest.raises(ConfigError, match="no threshold yet"):
        PACSets().predict(prediction("a"))
    for settings in ({"epsilon": 0.0}, {"delta": 1.0}, {"holes": 0}, {"language": "cobol"}):
        with pytest.raises(ConfigError):
            PACSets(**settings)  # type: ignore[arg-type]
    path = tmp_path / "sets.json"
    for content in ("", "[]", json.dumps({"schema": 99}), json.dumps({"schema": 1, "tau": 2})):
        path.write_text(content)
        with pytest.raises(ConfigError):
            PACSets.load(path)


SQL = "SELECT name, COUNT(*) FROM users WHERE age > 30 AND city = 'Oslo' GROUP BY name"


def test_sql_is_compared_as_trees() -> None:
    whole = PACSets(language="sql").sets(prediction(SQL, logprobs=(0.0,)))[0]
    assert whole.contains("select name, count(*) from users\nwhere age > 30 and city = 'Oslo' group by name")
    for other in (
        SQL.replace("30", "31"),
        SQL.replace("age", "size"),
        SQL.replace(" AND ", " OR "),
        "SELECT",
    ):
        assert not whole.contains(other)


def test_an_unlikely_part_of_sql_becomes_a_hole() -> None:
    pieces = SQL.partition("30")
    one = prediction(*pieces, logprobs=(-0.001, -4.0, -0.001))
    found = PACSets(language="sql", holes=1).sets(one)[60]
    assert found.text == SQL.replace("30", "??")
    assert found.contains(SQL.replace("30", "(SELECT 1)"))
    assert not found.contains(SQL.replace("Oslo", "Rome"))
