from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "text"))
from tiny_wordnet import write_wordnet

import plait
from plait.errors import ConfigError
from plait.prose import Proposal, ThesaurusCandidates, Watermark
from plait.text.wordnet import WordNet
from plait.text.words import Lexicon, Word, needs_an, split_words

KEY = bytes(range(32))
SENTENCES = [
    "A big dog often helps the kid, and an enormous car quickly starts.",
    'They "buy a big car" rapidly; the hound begins to aid the child.',
    "Naïve people frequently purchase a quick automobile at https://example.org/big now.",
    "Large dogs often begin to help kids,\tand fast autos start quickly.",
]


@pytest.fixture
def lexicon(tmp_path: Path) -> Lexicon:
    return Lexicon(WordNet(write_wordnet(tmp_path / "dict")))


class Every:
    """Every alternative, at a cost that tells them apart."""

    def __init__(self, lexicon: Lexicon) -> None:
        self.lexicon = lexicon

    def propose(self, text: str, words: Sequence[Word], wanted: Sequence[int]) -> list[list[Proposal]]:
        return [
            [Proposal(word, 0.1 * len(word)) for word in self.lexicon.alternatives(words[index].text.lower())]
            for index in wanted
        ]


def passage(seed: int, sentences: int = 14) -> str:
    rng = random.Random(seed)
    return "\n\n".join(f"{rng.choice(SENTENCES)}  {rng.choice(SENTENCES)}" for _ in range(sentences // 2))


@pytest.mark.parametrize("seed", range(4))
def test_only_free_words_change_and_the_rest_stays_byte_for_byte(lexicon: Lexicon, seed: int) -> None:
    text = passage(seed)
    marked = Watermark(KEY, lexicon, Every(lexicon), max_replaced=1.0).embed(text)
    before, after = split_words(text), split_words(marked.text)
    assert len(before) == len(after)
    assert marked.words == len(before)
    changed = {one.start for one in marked.replaced}
    gaps = [
        [text_[one.stop : other.start] for one, other in itertools.pairwise(words)]
        for text_, words in ((text, before), (marked.text, after))
    ]
    assert gaps[0] == gaps[1]
    for one, other in zip(before, after, strict=True):
        if one.start in changed:
            assert one.is_free
            assert other.text.lower() in lexicon.alternatives(one.text.lower())
            assert one.text[0].isupper() == other.text[0].isupper()
        elif one.text != other.text:
            assert {one.text.lower(), other.text.lower()} == {"a", "an"}
    assert '"buy a big car"' in marked.text or '"' not in text
    for one, other in itertools.pairwise(after):
        if one.text.lower() in ("a", "an") and one.is_free and other.is_free:
            assert (one.text.lower() == "an") == needs_an(other.text)


def test_a_mark_is_found_with_its_key_and_no_other(lexicon: Lexicon) -> None:
    mark = Watermark(KEY, lexicon, Every(lexicon), max_replaced=1.0, target_z=20.0)
    text = passage(0, 40)
    marked = mark.embed(text)
    assert marked.detection == mark.detect(marked.text)
    assert marked.z > mark.detect(text).z + 2
    others = [Watermark(random.Random(seed).randbytes(32), lexicon) for seed in range(40)]
    assert sum(other.detect(marked.text).is_watermarked for other in others) <= 2


def test_both_sides_look_at_the_same_words(lexicon: Lexicon) -> None:
    mark = Watermark(KEY, lexicon, Every(lexicon), max_replaced=1.0)
    text = passage(1)
    before, after = (mark._eligible(split_words(one)) for one in (text, mark.embed(text).text))
    assert before == after


def test_embedding_is_deterministic_and_a_second_time_changes_almost_nothing(lexicon: Lexicon) -> None:
    mark = Watermark(KEY, lexicon, Every(lexicon), max_replaced=1.0)
    first = mark.embed(passage(2))
    assert mark.embed(passage(2)) == first
    second = mark.embed(first.text)
    assert len(second.replaced) <= 0.05 * first.words
    assert second.z >= first.z


def test_budgets_hold(lexicon: Lexicon) -> None:
    text = passage(3)
    few = Watermark(KEY, lexicon, Every(lexicon), max_replaced=0.05).embed(text)
    assert len(few.replaced) <= 0.05 * few.words
    cheap = Watermark(KEY, lexicon, Every(lexicon), max_nats=0.35, max_replaced=1.0).embed(text)
    assert all(one.nats <= 0.35 for one in cheap.replaced)
    enough = Watermark(KEY, lexicon, Every(lexicon), target_z=0.5).embed(text)
    assert len(enough.replaced) <= len(Watermark(KEY, lexicon, Every(lexicon)).embed(text).replaced)


def test_an_empty_text_and_one_without_words_stay_as_they_are(lexicon: Lexicon) -> None:
    mark = Watermark(KEY, lexicon, Every(lexicon))
    for text in ("", " \n", "12 + 30 = 42!", "漢字"):
        assert mark.embed(text).text == text
        assert mark.detect(text).verdict == "insufficient"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"key": b"x" * 15}, "16 bytes"),
        ({"language": "zh"}, "'en'"),
        ({"max_nats": 0.0}, "max_nats"),
        ({"target_z": -1.0}, "target_z"),
        ({"max_replaced": 1.5}, "max_replaced"),
        ({"alpha": 0.0}, "alpha"),
    ],
)
def test_bad_settings_are_refused(lexicon: Lexicon, settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Watermark(**{"key": KEY, "lexicon": lexicon, **settings})  # type: ignore[arg-type]


def test_what_needs_a_model_says_so(lexicon: Lexicon) -> None:
    mark = Watermark(KEY, lexicon)
    with pytest.raises(ConfigError, match="need a model"):
        mark.embed(SENTENCES[0])
    with pytest.raises(ConfigError, match="need a model"):
        mark.detect(SENTENCES[0], mode="precise")
    with pytest.raises(ConfigError, match="fast or precise"):
        mark.detect(SENTENCES[0], mode="slow")  # type: ignore[arg-type]


@pytest.mark.model
def test_a_branch_costs_what_reading_the_changed_text_costs(lexicon: Lexicon) -> None:
    lm = plait.load("smollm2")
    text = "The dog was tired. A big storm came, and they often help the kid."
    words = split_words(text)
    source = ThesaurusCandidates(lm, lexicon)
    wanted = [index for index, word in enumerate(words) if word.text in ("big", "often")]
    found = dict(zip(("big", "often"), source.propose(text, words, wanted), strict=True))
    ids = lm.tokenizer.encode
    start = ids("\n") if not lm.encode("") else lm.encode("")

    def nats(before: str, changed: str) -> float:
        return lm_nats(lm, [*start, *ids(before)], ids(changed))

    before, after = (
        "The dog was tired. A big storm came, and they",
        (" often help the", " frequently help the"),
    )
    rise = nats(before, after[1]) - nats(before, after[0])
    assert dict(found["often"])["frequently"] == pytest.approx(max(0.0, rise), abs=0.02)
    # Of the article that changes with its word, both are counted.
    rise = nats("The dog was tired.", " An enormous storm came") - nats(
        "The dog was tired.", " A big storm came"
    )
    assert dict(found["big"])["enormous"] == pytest.approx(max(0.0, rise), abs=0.02)


def lm_nats(lm: plait.LanguageModel, before: list[int], following: list[int]) -> float:
    import torch

    from plait.engine.scoring import nats_of_rows
    from plait.memory import Rows

    ids = torch.tensor([*before, *following])
    with torch.inference_mode():
        hidden = lm.model(ids, Rows([(len(ids), 0)]), [lm.model.new_past(lm.plan)])
        return float(nats_of_rows(lm.model, hidden[len(before) - 1 : -1], ids[len(before) :]).sum())
