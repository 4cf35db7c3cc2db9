"""A model that was trained here on units: verified answers are plain ones, lossy ones take fewer passes."""

from __future__ import annotations

import copy

import pytest
import torch

from plait.decode import Sampling
from plait.decode.speculate import LUD, SPECULATORS
from plait.engine import LanguageModel
from plait.memory import MemoryPlan
from plait.nn import Transformer, lower
from plait.text import Tokenizer
from plait.train import LexicalUnits, ModelShape, TokenData
from plait.train.runs import fresh_parameters

PHRASES = ("the cat sat on the mat. ", "of the united states. ", "for i in range(9): ", "once upon a time ")
PLACEHOLDER = 0


@pytest.fixture(scope="module")
def tuned(byte_tokenizer: Tokenizer) -> Transformer:
    """A model of bytes that knows four phrases by heart, with the end token as placeholder."""
    random = torch.Generator().manual_seed(0)
    order = torch.randint(0, len(PHRASES), (400,), generator=random).tolist()
    ids = byte_tokenizer.encode("".join(PHRASES[index] for index in order))
    data = TokenData.of([ids[start : start + 64] for start in range(0, 6400, 64)])
    shape = ModelShape(width=48, blocks=2, heads=2, kv_heads=1, inner=96, vocab_size=258, context=512)
    config = shape.transformer(257, PLACEHOLDER)
    model = Transformer(config, fresh_parameters(config.blocks, 0))
    objective = LexicalUnits(alpha=0.5, share=0.25, top=0)
    data = data.with_notes({"confidence": torch.ones(len(data))})
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    pieces = [data.piece(start, stop) for start, stop in data.pieces(64)]
    for step in range(160):
        batch = [pieces[index] for index in torch.randint(0, 100, (4,), generator=random).tolist()]
        optimizer.zero_grad()
        objective.loss(model, batch, torch.Generator().manual_seed(step)).value.backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


def language_model(
    model: Transformer, tokenizer: Tokenizer, draft: str, memory: str = "full"
) -> LanguageModel:
    """With drafts that guess all they can: what they bring would else depend on the machine's speed."""
    if draft != "none":
        draft += ",budget=off" if ":" in draft else ":budget=off"
    return LanguageModel(
        name="phrases", model=model, tokenizer=tokenizer, chat_template=None,
        plan=MemoryPlan.parse(memory), draft=SPECULATORS.parse(draft),
    )  # fmt: skip


def answers(lm: LanguageModel, temperature: float = 0.0, count: int = 60) -> tuple[list[list[int]], int]:
    """Answers to a batch of prompts, and the forward passes that it took."""
    engine = lm.new_engine()
    sampling = Sampling(temperature=temperature, seed=5)
    running = [
        engine.submit(lm.request(lm.encode(prompt), max_new_tokens=count, ignore_end=True, sampling=sampling))
        for prompt in ("the cat sa", "of the uni", "for i in range(9): once", "once upo")
    ]
    passes = 0
    while not engine.is_idle:
        engine.step()
        passes += 1
    return [list(sequence.result().tokens) for sequence in running], passes


@pytest.mark.parametrize("memory", ["full", "window:size=40,sinks=2", "dense:dtype=bf16"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_verified_answers_are_those_of_plain_decoding(
    tuned: Transformer, byte_tokenizer: Tokenizer, memory: str, temperature: float
) -> None:
    plain, _ = answers(language_model(tuned, byte_tokenizer, "none", memory), temperature)
    for draft in ("lud:beta=0.5", "lud:pads=7,beta=0.2", "lud:pads=1"):
        assert answers(language_model(tuned, byte_tokenizer, draft, memory), temperature)[0] == plain


def test_a_beta_above_1_is_plain_decoding_in_both_modes(
    tuned: Transformer, byte_tokenizer: Tokenizer
) -> None:
    plain = answers(language_model(tuned, byte_tokenizer, "none"))
    for mode in ("verified", "lossy"):
        assert answers(language_model(tuned, byte_tokenizer, f"lud:beta=1.01,mode={mode}")) == plain


def test_known_phrases_take_fewer_passes(tuned: Transformer, byte_tokenizer: Tokenizer) -> None:
    _, passes = answers(language_model(tuned, byte_tokenizer, "none"))
    for mode in ("verified", "lossy"):
        found, fewer = answers(language_model(tuned, byte_tokenizer, f"lud:beta=0.5,mode={mode}"))
        assert fewer < 0.6 * passes
        assert [len(answer) for answer in found] == [60] * 4


def test_lossy_guesses_are_taken_although_the_model_disagrees(
    tuned: Transformer, byte_tokenizer: Tokenizer
) -> None:
    plain, _ = answers(language_model(tuned, byte_tokenizer, "none"))
    found, _ = answers(language_model(tuned, byte_tokenizer, "lud:beta=0.01,mode=lossy"))
    assert found != plain


def test_lowered_models_answer_placeholders_too(tuned: Transformer, byte_tokenizer: Tokenizer) -> None:
    plain, _ = answers(language_model(tuned, byte_tokenizer, "none"))
    twin = copy.deepcopy(tuned)
    lower(twin)
    assert answers(language_model(twin, byte_tokenizer, "lud:beta=0.8"))[0] == plain


def test_what_a_sequence_remembers_has_no_trace_of_placeholders(
    tuned: Transformer, byte_tokenizer: Tokenizer
) -> None:
    plain, guessing = (language_model(tuned, byte_tokenizer, draft) for draft in ("none", "lud:beta=0.5"))
    pasts = []
    for lm in (plain, guessing):
        with lm.session() as session:
            session.read("of the united")
            session.generate(max_new_tokens=30, ignore_end=True)
            pasts.append(session.past)
    lengths = [len(past) for past in pasts]
    assert lengths[0] == lengths[1]
    for ours, theirs in zip(*(past.memories("compared") for past in pasts), strict=True):
        keys = [
            torch.cat([strand.keys[:, : len(strand)] for strand in memory.all_strands()], dim=1)  # type: ignore[attr-defined]
            for memory in (ours, theirs)
        ]
        assert torch.allclose(*keys, atol=1e-4)


def test_the_settings_are_those_of_the_spec_string() -> None:
    assert SPECULATORS.parse("lud:pads=3,beta=0.5,mode=lossy") == LUD(pads=3, beta=0.5, mode="lossy")
