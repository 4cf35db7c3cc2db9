"""Beam search: that of Transformers, and with groups that of a naive program that reads all anew."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plait.decode.search import BeamSearch, Hypothesis, beam_search
from plait.errors import CapacityError, ConfigError
from plait.memory import MemoryPlan, Rows
from plait.nn import Transformer, load_transformer
from plait.nn.checkpoints.safetensors import SafetensorsCheckpoint
from plait.weights.ggml import FP32

SIZE = 13
# Rounding of fp32 logits, summed over a dozen tokens.
NATS = 1e-4
FULL = MemoryPlan()


@pytest.fixture(scope="module")
def theirs() -> Any:
    """A small model with logits that vary by a few units, made by Transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.6,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ours(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    """The same model."""
    folder: Path = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    with SafetensorsCheckpoint(folder) as checkpoint:
        return load_transformer(checkpoint, FP32())


def prompt_of(seed: int, length: int = 5) -> list[int]:
    return np.random.default_rng(seed).integers(1, SIZE, length).tolist()


@pytest.mark.parametrize("end", [None, 3, [3, 7]])
@pytest.mark.parametrize(
    "options",
    [{}, {"length_penalty": 2.0}, {"length_penalty": 0.0}, {"early_stopping": True}],
    ids=["plain", "longer", "raw", "early"],
)
def test_one_group_is_the_beam_search_of_transformers(
    theirs: Any, ours: Transformer, end: Any, options: dict[str, Any]
) -> None:
    for seed in range(5):
        prompt = prompt_of(seed)
        answer = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            num_beams=4,
            num_return_sequences=4,
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=end,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        ends = frozenset({end} if isinstance(end, int) else end or ())
        found = beam_search(ours, FULL, prompt, BeamSearch(**options), max_new_tokens=12, end_tokens=ends)
        rows = answer.sequences[:, len(prompt) :].tolist()
        for row, score, hypothesis in zip(rows, answer.sequences_scores.tolist(), found, strict=True):
            assert row[: len(hypothesis.tokens)] == list(hypothesis.tokens)
            # What they fill up with.
            assert set(row[len(hypothesis.tokens) :]) <= {0, *ends}
            assert hypothesis.score == pytest.approx(score, abs=NATS)
            assert hypothesis.ended == (hypothesis.tokens[-1] in ends)


def law_after(model: Transformer, tokens: list[int]) -> Tensor:
    """Log-probabilities of what follows, read anew from the first token."""
    with torch.inference_mode():
        hidden = model(torch.tensor(tokens), Rows([(len(tokens), 0)]))
        return model.logits(hidden[-1:])[0].double().log_softmax(0)


def naive_penalty(
    model: Transformer, kind: str, beam: list[int], token: int, earlier: list[list[list[int]]]
) -> float:
    """The diversity term of one candidate, term by term from its definition."""
    others = [other for group in earlier for other in group]
    same = -float(sum(other[-1] == token for other in others))
    if kind == "hamming":
        return same
    if kind == "ngram":
        return -float(
            sum(
                pair == (beam[-1:], token)
                for other in others
                for pair in zip([[first] for first in other], other[1:], strict=False)
            )
        )
    if kind == "cumulative":
        apart = 0.0
        for group in earlier if beam else []:
            if group:
                apart += sum(
                    sum(a != b for a, b in zip(beam, other[:-1], strict=True)) / len(beam) for other in group
                ) / len(group)
        return same * math.exp(-apart / len(earlier))
    rows = model.embed(torch.arange(SIZE)).double()
    return -sum(
        max(0.0, float(torch.nn.functional.cosine_similarity(rows[token], rows[other[-1]], dim=0)))
        for other in others
    )


def naive_search(
    model: Transformer, prompt: list[int], settings: BeamSearch, max_new_tokens: int, end: int | None
) -> list[Hypothesis]:
    """Diverse beam search as its definition says, with lists and without memory."""
    size = settings.num_beams // settings.num_groups
    live: list[list[tuple[list[int], float, float]]] = [[([], 0.0, 0.0)] for _ in range(settings.num_groups)]
    finished: list[list[Hypothesis]] = [[] for _ in live]
    for length in range(1, max_new_tokens + 1):
        for g in range(len(live)):
            if not live[g]:
                continue
            earlier = [[beam for beam, _, _ in group] for group in live[:g]]
            candidates = []
            for b, (beam, total, logprob) in enumerate(live[g]):
                law = law_after(model, prompt + beam)
                for token in range(SIZE):
                    score = total + float(law[token])
                    if earlier:
                        score += settings.diversity_penalty * naive_penalty(
                            model, settings.diversity, beam, token, earlier
                        )
                    candidates.append((-score, b, token, logprob + float(law[token])))
            candidates.sort()
            going = []
            for rank, (score, b, token, logprob) in enumerate(candidates):
                tokens = [*live[g][b][0], token]
                if token == end or length == max_new_tokens:
                    if rank < size:
                        finished[g].append(
                            Hypothesis(
                                tuple(tokens),
                                logprob,
                                -score / length**settings.length_penalty,
                                g,
                                token == end,
                            )
                        )
                elif len(going) < size:
                    going.append((tokens, -score, logprob))
            finished[g] = sorted(finished[g], key=lambda h: -h.score)[:size]
            full = len(finished[g]) == size
            if full and (
                settings.early_stopping
                or not going
                or going[0][1] / length**settings.length_penalty <= finished[g][-1].score
            ):
                going = []
            live[g] = going
    return [hypothesis for group in finished for hypothesis in group]


@pytest.mark.parametrize("diversity", ["hamming", "cumulative", "ngram", "embedding"])
@pytest.mark.parametrize("seed", range(12))
def test_groups_equal_a_naive_search(ours: Transformer, diversity: Any, seed: int) -> None:
    random = np.random.default_rng(seed)
    groups = int(random.integers(1, 5))
    settings = BeamSearch(
        num_beams=groups * int(random.integers(1, 4)),
        num_groups=groups,
        diversity_penalty=float(random.choice([0.0, 0.3, 0.8, 3.0])),
        diversity=diversity,
        length_penalty=float(random.choice([0.0, 1.0])),
        early_stopping=bool(random.integers(2)),
    )
    steps = int(random.integers(1, 8))
    end = None if seed % 3 == 0 else int(random.integers(SIZE))
    prompt = prompt_of(seed)
    ends = frozenset() if end is None else frozenset({end})
    found = beam_search(ours, FULL, prompt, settings, max_new_tokens=steps, end_tokens=ends)
    expected = naive_search(ours, prompt, settings, steps, end)
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.score == pytest.approx(other.score, abs=NATS)
        assert one.logprob == pytest.approx(other.logprob, abs=NATS)
        assert (one.group, one.ended) == (other.group, other.ended)


def test_without_a_penalty_all_groups_are_one_narrow_beam_search(ours: Transformer) -> None:
    narrow = beam_search(ours, FULL, prompt_of(1), BeamSearch(num_beams=2), max_new_tokens=8)
    grouped = beam_search(
        ours,
        FULL,
        prompt_of(1),
        BeamSearch(num_beams=6, num_groups=3, diversity_penalty=0.0),
        max_new_tokens=8,
    )
    assert [each.tokens for each in grouped] == [each.tokens for each in narrow] * 3
    diverse = beam_search(ours, FULL, prompt_of(1), BeamSearch(num_beams=6, num_groups=3), max_new_tokens=8)
    assert [each.tokens for each in diverse[:2]] == [each.tokens for each in narrow]
    assert len({each.tokens for each in diverse}) > len({each.tokens for each in grouped})


@pytest.mark.parametrize("memory", ["dense:dtype=fp32", "window:size=6,sinks=1"])
def test_beams_work_with_any_memory(ours: Transformer, memory: str) -> None:
    settings = BeamSearch(num_beams=4, num_groups=2)
    found = beam_search(ours, MemoryPlan.parse(memory), prompt_of(2), settings, max_new_tokens=10)
    assert len(found) == 4
    # The log-probability that was summed up is that of reading the text once.
    past = ours.new_past(MemoryPlan.parse(memory))
    ids = torch.tensor([*prompt_of(2), *found[-1].tokens])
    nats = 0.0
    with torch.inference_mode():
        for place in range(len(ids) - 1):
            hidden = ours(ids[place : place + 1], Rows([(1, place)]), [past])
            past.commit()
            if place >= 4:
                nats += float(ours.logits(hidden)[0].double().log_softmax(0)[ids[place + 1]])
    assert found[-1].logprob == pytest.approx(nats, abs=NATS)


def test_the_prompt_is_read_once_and_each_step_is_one_pass(ours: Transformer) -> None:
    fed: list[int] = []
    hook = ours.register_forward_pre_hook(lambda _, inputs: fed.append(len(inputs[1])))
    beam_search(ours, FULL, prompt_of(1), BeamSearch(num_beams=6, num_groups=3), max_new_tokens=5)
    hook.remove()
    assert fed == [5, 6, 6, 6, 6]


def test_more_beams_than_tokens_and_the_end_of_the_context(ours: Transformer) -> None:
    found = beam_search(ours, FULL, prompt_of(0), BeamSearch(num_beams=20), max_new_tokens=1)
    assert len(found) == SIZE
    long = beam_search(ours, FULL, prompt_of(0, 60), BeamSearch(num_beams=2), max_new_tokens=50)
    assert [len(each.tokens) for each in long] == [4, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 5, "num_groups": 2}, "5 and 2"),
        ({"num_beams": 2, "num_groups": 4}, "2 and 4"),
        ({"diversity_penalty": -0.1}, "diversity_penalty"),
        ({"diversity_penalty": math.nan}, "diversity_penalty"),
        ({"diversity": "levenshtein"}, "hamming"),
        ({"num_beams": 0}, "num_beams"),
    ],
)
def test_bad_settings_say_what_is_allowed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BeamSearch(**settings)


def test_bad_prompts_are_refused(ours: Transformer) -> None:
    for prompt, count, message in [([], 3, "prompt"), ([1], 0, "max_new_tokens"), ([1, SIZE], 3, str(SIZE))]:
        with pytest.raises(ConfigError, match=message):
            beam_search(ours, FULL, prompt, BeamSearch(), max_new_tokens=count)
    with pytest.raises(CapacityError, match="64"):
        beam_search(ours, FULL, [1] * 64, BeamSearch(), max_new_tokens=1)
