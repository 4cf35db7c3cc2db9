"""A watermark in words for text of any model."""

from __future__ import annotations

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run

__all__ = ["CLAIM"]

# Share of the held-out texts that must be found with a limit, for it to be chosen: a little more than the bar.
_WANTED = 0.97


def _measure(run: Run) -> Measurements:
    import random
    from collections.abc import Callable, Sequence
    from statistics import mean, median

    from scipy.stats import kstest

    from plait.claims.marking import LIMITS, Known, calibrated, smoothed, strengths
    from plait.claims.meaning import similarities
    from plait.claims.prose import (
        HELD_OUT_SUBJECTS,
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
    known = Known(ThesaurusCandidates(lm, lexicon))

    class Free:
        """The baseline: every synonym is as good as any other."""

        def propose(self, text: str, words: Sequence[Word], wanted: Sequence[int]) -> list[list[Proposal]]:
            found = [[Proposal(one.word, 0.0) for one in options] for options in known.of[text]]
            for options in found:
                rng.shuffle(options)
            return found

    rng = random.Random(run.seed)
    each = run.pick(15, 1)
    keys = [rng.randbytes(32) for _ in range(run.pick(5, 2))]
    yield "held-out passages"
    apart = run.pick(HELD_OUT_SUBJECTS, 1)
    held_out = [
        *model_passages(lm, apart, seed=run.seed, held_out=True),
        *manual_passages(lm, apart, held_out=True),
    ]
    of_limits = yield from strengths(held_out, [rng.randbytes(32) for _ in keys], lexicon, known)
    yield "passages"
    passages = [*model_passages(lm, each, seed=run.seed), *manual_passages(lm, each, held_out=False)]
    marks = [Watermark(key, lexicon, known) for key in keys]
    marked = []
    for index, text in enumerate(passages):
        yield f"passage {index + 1} of {len(passages)}"
        marked.append([mark.embed(text) for mark in marks])
    quantities: dict[str, Quantity] = {}

    def rate(name: str, verdicts: Sequence[bool]) -> None:
        quantities[name] = Quantity(mean(verdicts), "", samples=len(verdicts))

    quantities["calibrated_max_nats"] = Quantity(
        calibrated(of_limits, _WANTED), "nats", samples=len(held_out) * len(keys)
    )
    paper = next(one for one in of_limits if one.limit == LIMITS[0])
    quantities["held_out_detected_within_0_35_nats"] = Quantity(paper.detected, "")
    every = [one for of_text in marked for one in of_text]
    rate("detected", [one.detection.is_watermarked for one in every])
    rate("detected_at_5_percent", [one.detection.p_value <= 0.05 for one in every])
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
    quantities["uniformity_of_p_values"] = Quantity(
        float(kstest([smoothed(found, rng) for found in null], "uniform").pvalue), "", samples=len(null)
    )
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
        "with 5 random keys; the fast detector at 1% false positives. Synonyms of WordNet 3.1, scored by SmolLM2. The "
        "limit of 12 nats for a replacement must not be below the one that 10 held-out passages ask for, of other subjects "
        "and chapters and with other keys. "
        "Attacks on random words. 3,900 tests of unmarked text, with 30 other keys. Meaning by all-MiniLM-L6-v2 (cosine), likelihood by "
        "Gemma-3-270M (nats of the whole text) on 10 passages, against the same synonyms chosen without a model."
    ),
    bars=(
        Bar(
            quantity="detected", relation=">=", value=0.95, unit="", why="A mark of 200 tokens must be found."
        ),
        Bar(
            quantity="calibrated_max_nats",
            relation="<=",
            value=12.0,
            unit="nats",
            why="The default must suffice on texts that nothing else here is judged on.",
        ),
        Bar(quantity="z", relation=">=", value=3.0, unit="", why="A mark must be clear, not only found."),
        Bar(
            quantity="detected_after_deleting_10_percent",
            relation=">=",
            value=0.8,
            unit="",
            why="Deleting a tenth of the words must not remove it.",
        ),
        Bar(
            quantity="detected_after_substituting_10_percent",
            relation=">=",
            value=0.75,
            unit="",
            why="Replacing a tenth of all words by synonyms must not remove it.",
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
        Bar(
            quantity="false_positives_at_5_percent",
            relation="<=",
            value=0.065,
            unit="",
            why="The rate that is promised for unmarked text.",
        ),
        Bar(
            quantity="uniformity_of_p_values",
            relation=">=",
            value=0.01,
            unit="",
            why="Probabilities of unmarked text, ties broken at random, must be even (Kolmogorov-Smirnov).",
        ),
        Bar(
            quantity="detected_with_another_key",
            relation="<=",
            value=0.015,
            unit="",
            why="To whoever has another key, marked text is unmarked; of 600 tests 1 % is promised.",
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
    needs=("lemminflect", "scipy", "transformers"),
)
