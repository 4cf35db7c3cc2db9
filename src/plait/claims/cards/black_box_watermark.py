"""A watermark in words for text of any model."""

from __future__ import annotations

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run

__all__ = ["CLAIM"]


def _measure(run: Run) -> Measurements:
    import random
    from collections.abc import Callable, Sequence
    from statistics import mean, median

    from plait.claims.meaning import similarities
    from plait.claims.prose import (
        delete_words,
        manual_passages,
        model_passages,
        shuffle_sentences,
        substitute_words,
    )
    from plait.engine import load
    from plait.prose import Proposal, ThesaurusCandidates, Watermark
    from plait.prose.lexicon import english_lexicon
    from plait.text.words import Word

    lm = load("smollm2")
    lexicon = english_lexicon()
    source = ThesaurusCandidates(lm, lexicon)
    known: dict[str, list[list[Proposal]]] = {}

    class Known:
        """Proposals do not depend on the key, so the model reads each passage once for all keys."""

        def propose(self, text: str, words: Sequence[Word], wanted: Sequence[int]) -> list[list[Proposal]]:
            if text not in known:
                known[text] = source.propose(text, words, wanted)
            return known[text]

    class Free:
        """The baseline: every synonym is as good as any other."""

        def propose(self, text: str, words: Sequence[Word], wanted: Sequence[int]) -> list[list[Proposal]]:
            found = [[Proposal(one.word, 0.0) for one in options] for options in known[text]]
            for options in found:
                rng.shuffle(options)
            return found

    rng = random.Random(run.seed)
    each = run.pick(15, 1)
    yield "passages"
    passages = [*model_passages(lm, each, seed=run.seed), *manual_passages(lm, each)]
    keys = [rng.randbytes(32) for _ in range(run.pick(5, 2))]
    marks = [Watermark(key, lexicon, Known()) for key in keys]
    marked = []
    for index, text in enumerate(passages):
        yield f"passage {index + 1} of {len(passages)}"
        marked.append([mark.embed(text) for mark in marks])
    quantities: dict[str, Quantity] = {}

    def rate(name: str, verdicts: Sequence[bool]) -> None:
        quantities[name] = Quantity(mean(verdicts), "", samples=len(verdicts))

    every = [one for of_text in marked for one in of_text]
    rate("detected", [one.detection.is_watermarked for one in every])
    quantities["z"] = Quantity.median([one.z for one in every], "")
    quantities["replaced"] = Quantity(
        mean(len(one.replaced) / one.words for one in every), "", samples=len(every)
    )
    attacks: dict[str, Callable[[str], str]] = {
        "deleting_10_percent": lambda text: delete_words(text, 0.1, rng),
        "deleting_20_percent": lambda text: delete_words(text, 0.2, rng),
        "substituting_10_percent": lambda text: substitute_words(text, 0.1, rng, lexicon),
        "substituting_20_percent": lambda text: substitute_words(text, 0.2, rng, lexicon),
        "shuffling_sentences": lambda text: shuffle_sentences(text, rng),
    }
    for name, attack in attacks.items():
        yield name.replace("_", " ")
        rate(
            f"detected_after_{name}",
            [
                mark.detect(attack(one.text)).is_watermarked
                for of_text in marked
                for mark, one in zip(marks, of_text, strict=True)
            ],
        )

    yield "unmarked texts"
    windows = manual_passages(lm, run.pick(100, 4))
    unmarked = [Watermark(rng.randbytes(32), lexicon) for _ in range(run.pick(30, 2))]
    null = [mark.detect(text) for text in [*windows, *passages] for mark in unmarked]
    rate("false_positives", [found.is_watermarked for found in null])
    rate("false_positives_at_5_percent", [found.p_value <= 0.05 for found in null])
    rate(
        "detected_with_another_key",
        [mark.detect(one.text).is_watermarked for one in every for mark in unmarked[:4]],
    )

    yield "meaning"
    alike = similarities(
        [(text, one.text) for text, of_text in zip(passages, marked, strict=True) for one in of_text[:1]]
    )
    quantities["similarity"] = Quantity(mean(alike), "", (min(alike), max(alike)), len(alike))
    judge = load("gemma3-270m")
    judged = [*range(run.pick(5, 1)), *range(each, each + run.pick(5, 1))]
    baseline = [Watermark(keys[0], lexicon, Free()).embed(passages[index]) for index in judged]
    rises: dict[str, list[float]] = {"ours": [], "baseline": []}
    for place, index in enumerate(judged):
        yield f"likelihood of passage {place + 1} of {len(judged)}"
        texts = [passages[index], marked[index][0].text, baseline[place].text]
        before, after, random_after = (score.nats for score in judge.score(texts))
        rises["ours"].append(after / before - 1)
        rises["baseline"].append(random_after / before - 1)
    quantities["likelihood_rise"] = Quantity.median(rises["ours"], "")
    quantities["likelihood_rise_of_random_synonyms"] = Quantity.median(rises["baseline"], "")
    quantities["detected_with_random_synonyms"] = Quantity(
        mean(one.detection.is_watermarked for one in baseline), "", samples=len(baseline)
    )
    quantities["rise_over_random_synonyms"] = Quantity(median(rises["baseline"]) / median(rises["ours"]), "x")
    return quantities


CLAIM = Claim(
    name="black-box-watermark",
    title="A watermark in words for text of any model",
    source="Yang et al. 2023, arXiv:2305.08883",
    headline=(
        "Text is marked without access to the model that wrote it, by choosing among synonyms, and the mark is found "
        "again with a secret key, also after words were deleted or replaced (the paper: Chinese and English, 200 words)."
    ),
    scale=(
        "30 passages of 200 tokens, half SmolLM2-135M-Instruct's own answers and half Python's manual, each marked "
        "with 5 random keys; the fast detector at 1% false positives. Synonyms of WordNet 3.1, scored by SmolLM2. "
        "Attacks on random words. 3,900 tests of unmarked text. Meaning by all-MiniLM-L6-v2 (cosine), likelihood by "
        "Gemma-3-270M (nats of the whole text) on 10 passages, against the same synonyms chosen without a model."
    ),
    bars=(
        Bar(
            quantity="detected", relation=">=", value=0.95, unit="", why="A mark of 200 tokens must be found."
        ),
        Bar(
            quantity="detected_after_deleting_20_percent",
            relation=">=",
            value=0.8,
            unit="",
            why="Deleting a fifth of the words must not remove it.",
        ),
        Bar(
            quantity="detected_after_substituting_20_percent",
            relation=">=",
            value=0.8,
            unit="",
            why="Replacing a fifth of all words by synonyms must not remove it.",
        ),
        Bar(
            quantity="detected_after_shuffling_sentences",
            relation=">=",
            value=0.85,
            unit="",
            why="The bits of a sentence do not depend on its neighbours.",
        ),
        Bar(
            quantity="false_positives",
            relation="<=",
            value=0.01,
            unit="",
            why="The rate that is promised for unmarked text.",
        ),
        Bar(quantity="similarity", relation=">=", value=0.9, unit="", why="The meaning must be kept."),
        Bar(quantity="replaced", relation="<=", value=0.25, unit="", why="Most words must stay."),
        Bar(
            quantity="likelihood_rise",
            relation="<=",
            value=0.12,
            unit="",
            why="A model that took no part must find the text nearly as likely as before.",
        ),
        Bar(
            quantity="rise_over_random_synonyms",
            relation=">=",
            value=2.0,
            unit="x",
            why="Scoring the synonyms must pay for itself.",
        ),
    ),
    measure=_measure,
    needs=("lemminflect", "transformers"),
)
