"""What users hold: generate, stream, score, sessions."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.decode.speculate import SPECULATORS
from plait.engine import LanguageModel, load
from plait.errors import CapacityError, ConfigError, IncompatibleError, ModelFileError, UnknownNameError
from plait.memory import MemoryPlan, Rows
from plait.nn.mixers.linear_attention import LinearAttentionConfig
from plait.text import Tokenizer
from small_models import small_transformer

Make = Callable[..., LanguageModel]

TEXTS = ["Once upon a time", "x", "The quick brown fox jumps over the lazy dog. " * 4, "é漢🙂"]


def test_a_batch_of_ragged_prompts_equals_each_alone(make_small: Make) -> None:
    lm = make_small()
    together = lm.generate(TEXTS, max_new_tokens=20)
    assert [each.tokens for each in together] == [
        lm.generate(text, max_new_tokens=20).tokens for text in TEXTS
    ]


def test_a_batch_is_one_forward_pass_a_step_without_padding(make_small: Make) -> None:
    lm = make_small()
    rows: list[int] = []
    hook = lm.model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[1])))
    lm.generate(TEXTS, max_new_tokens=5, ignore_end=True)
    hook.remove()
    assert rows == [sum(len(lm.encode(text)) for text in TEXTS), 4, 4, 4, 4]


def test_one_model_answers_with_several_memories(make_small: Make) -> None:
    lm = make_small()
    narrow = lm.with_memory("window:size=4,sinks=1")
    assert narrow.model is lm.model
    assert narrow.plan == MemoryPlan.parse("window:size=4,sinks=1")
    assert lm.plan == MemoryPlan()
    exact = [lm.generate(text, max_new_tokens=20).tokens for text in TEXTS]
    assert [lm.with_memory(MemoryPlan()).generate(text, max_new_tokens=20).tokens for text in TEXTS] == exact
    assert [narrow.generate(text, max_new_tokens=20).tokens for text in TEXTS] != exact
    with pytest.raises(UnknownNameError, match="windw"):
        lm.with_memory("windw")


def test_streamed_text_is_the_text(make_small: Make) -> None:
    lm = make_small()
    for text in TEXTS:
        pieces = list(lm.stream(text, max_new_tokens=40, temperature=1.0, seed=5))
        whole = lm.generate(text, max_new_tokens=40, temperature=1.0, seed=5)
        assert "".join(piece.text for piece in pieces) == whole.text
        assert [choice.token for piece in pieces for choice in piece.choices] == list(whole.tokens)
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish_reason == whole.finish_reason


def test_streamed_pieces_are_whole_characters(make_small: Make) -> None:
    lm = make_small()
    # Random bytes are rarely valid UTF-8, so force the bytes of known characters.
    wanted = list("a漢🙂é".encode())
    ids = {lm.tokenizer.token_bytes(id)[0]: id for id in range(1, 257)}
    seen = []
    for byte in wanted:
        bias = {ids[byte]: 100.0}
        seen.append(ids[byte])
        assert lm.generate("q", max_new_tokens=1, logit_bias=bias).tokens == (ids[byte],)
    from plait.text import StreamDecoder

    decoder = StreamDecoder(lm.tokenizer)
    pieces = [decoder.push(id) for id in seen]
    assert pieces == ["a", "", "", "漢", "", "", "", "🙂", "", "é"]


def test_the_same_seed_gives_the_same_text_and_another_seed_another(make_small: Make) -> None:
    lm = make_small()
    first, again, other = (
        lm.generate("abc", max_new_tokens=30, temperature=1.0, seed=seed).tokens for seed in (1, 1, 2)
    )
    assert first == again != other


def test_stop_strings_cut_the_text_also_across_tokens(make_small: Make) -> None:
    lm = make_small()
    whole = lm.generate(TEXTS[2], max_new_tokens=60, temperature=1.0, seed=3, ignore_end=True)
    printable = [i for i in range(10, len(whole.text) - 3) if whole.text[i : i + 3].isprintable()]
    stop = whole.text[printable[0] : printable[0] + 3]
    cut = lm.generate(TEXTS[2], max_new_tokens=60, temperature=1.0, seed=3, ignore_end=True, stop=stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert len(cut.tokens) < len(whole.tokens)


def test_log_probabilities_are_those_of_the_raw_logits(make_small: Make) -> None:
    lm = make_small()
    result = lm.generate("hello", max_new_tokens=6, temperature=0.7, top_p=0.9, seed=4, logprobs=3)
    ids = [*lm.encode("hello"), *result.tokens]
    with torch.inference_mode():
        law = lm.model.logits(lm.model(torch.tensor(ids), Rows([(len(ids), 0)]))).log_softmax(-1)
    start = len(ids) - len(result.tokens)
    for i, choice in enumerate(result.choices):
        row = law[start + i - 1]
        assert choice.logprob == pytest.approx(float(row[choice.token]), abs=1e-4)
        best = row.topk(3)
        assert [other.token for other in choice.alternatives] == best.indices.tolist()


def test_score_is_the_mean_of_the_log_probabilities(make_small: Make) -> None:
    lm = make_small()
    text = TEXTS[2]
    ids = torch.tensor(lm.encode(text))
    with torch.inference_mode():
        law = lm.model.logits(lm.model(ids, Rows([(len(ids), 0)]))).log_softmax(-1)
    nats = -float(law[:-1].gather(1, ids[1:, None]).sum())
    result = lm.score(text)
    assert result.nats == pytest.approx(nats, rel=1e-5)
    assert result.tokens == len(ids) - 1
    assert result.perplexity == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


@pytest.mark.parametrize(("context", "stride"), [(32, 32), (32, 8), (32, 31), (50, 1), (200, 200)])
def test_score_windows_score_each_token_once(make_small: Make, context: int, stride: int) -> None:
    lm = make_small()
    text = TEXTS[2][:101]
    ids = torch.tensor(lm.encode(text))
    # By hand: token i is predicted in the first window that holds it and something before it.
    nats, count = 0.0, 0
    with torch.inference_mode():
        for i in range(1, len(ids)):
            start = next(s for s in range(0, len(ids), stride) if i < s + context)
            if start == i:
                continue
            window = ids[start : i + 1]
            law = lm.model.logits(lm.model(window, Rows([(len(window), 0)]))[-2:-1]).log_softmax(-1)
            nats -= float(law[0, ids[i]])
            count += 1
    result = lm.score(text, context=context, stride=stride)
    assert result.tokens == count
    assert result.nats == pytest.approx(nats, rel=1e-4)


def test_a_session_reads_a_common_beginning_once(make_small: Make) -> None:
    lm = make_small()
    fed: list[int] = []
    hook = lm.model.register_forward_pre_hook(lambda _, inputs: fed.append(len(inputs[1])))
    with lm.session() as session:
        session.read(TEXTS[2])
        first = session.generate(max_new_tokens=4, ignore_end=True)
        length = len(session)
        fed.clear()
        session.follow([*session.tokens, 7, 8, 9])
        second = session.generate(max_new_tokens=3, ignore_end=True)
        assert fed == [4, 1, 1]
    hook.remove()
    ids = [*lm.encode(TEXTS[2]), *first.tokens]
    assert len(ids) == length
    assert second.tokens == _generate_ids(lm, [*ids, 7, 8, 9], 3)


def test_sessions_fork_and_rewind(make_small: Make) -> None:
    lm = make_small()
    with lm.session() as session:
        session.read("A long beginning that is shared. ")
        twins = session.fork(2)
        texts = ["Then one thing.", "But another."]
        answers = [
            twin.generate(text, max_new_tokens=8, ignore_end=True)
            for twin, text in zip(twins, texts, strict=True)
        ]
        for text, answer in zip(texts, answers, strict=True):
            ids = lm.encode("A long beginning that is shared. ") + lm.tokenizer.encode(text)
            assert answer.tokens == _generate_ids(lm, ids, 8)
        length = len(session)
        again = session.generate("X", max_new_tokens=5, ignore_end=True)
        session.rewind(length)
        assert session.generate("X", max_new_tokens=5, ignore_end=True).tokens == again.tokens
        with pytest.raises(ConfigError, match="rewind"):
            session.rewind(10_000)
        with pytest.raises(ConfigError, match="fork"):
            session.fork(0)
    with pytest.raises(ConfigError, match="closed"):
        session.generate("more")


@pytest.mark.parametrize("draft", ["token-recycling", "rsd-s:layers=1", "chain:layers=2"])
def test_sessions_with_drafts_answer_as_those_without(make_small: Make, draft: str) -> None:
    answers = []
    for each in ("none", draft):
        with make_small(draft=each).session() as session:
            session.read("A beginning that is shared. ")
            twin = session.fork(1)[0]
            tokens = [session.generate(max_new_tokens=9, ignore_end=True).tokens]
            tokens.append(session.generate("More.", max_new_tokens=9, ignore_end=True).tokens)
            session.rewind(20)
            tokens.append(session.generate(max_new_tokens=9, ignore_end=True).tokens)
            tokens.append(twin.generate("Other.", max_new_tokens=9, ignore_end=True).tokens)
            answers.append(tokens)
    assert answers[0] == answers[1]


def test_a_second_model_guesses_for_the_first(make_small: Make) -> None:
    lm = make_small()
    guessed = LanguageModel(
        name="small",
        model=lm.model,
        tokenizer=lm.tokenizer,
        chat_template=None,
        plan=lm.plan,
        draft=SPECULATORS.parse("chain"),
        draft_model=lm.model.with_blocks([1]),
    )
    assert (
        guessed.generate(TEXTS[2], max_new_tokens=9).tokens == lm.generate(TEXTS[2], max_new_tokens=9).tokens
    )
    with pytest.raises(IncompatibleError, match="prompt-lookup"):
        guessed.draft = SPECULATORS.parse("prompt-lookup")
    assert str(guessed.draft) == "chain"


def test_closing_a_stream_cancels_and_the_session_goes_on(make_small: Make) -> None:
    lm = make_small()
    session = lm.session()
    stream = session.stream("Some text", max_new_tokens=50, ignore_end=True)
    for _ in range(5):
        next(stream)
    stream.close()
    assert session.last is not None
    assert session.last.finish_reason == "cancelled"
    ids = list(session.tokens)
    assert session.generate(max_new_tokens=4, ignore_end=True).tokens == _generate_ids(lm, ids, 4)


@pytest.mark.parametrize("memory", ["full", "window:size=30,sinks=2"])
def test_a_session_goes_back_further_than_its_memory_can(make_small: Make, memory: str) -> None:
    lm = make_small(memory)
    session = lm.session()
    session.read("A long beginning. " * 20)
    session.generate(max_new_tokens=150, ignore_end=True)
    session.follow(lm.encode("A long ending. " * 3))
    answer = session.generate(max_new_tokens=6, ignore_end=True)
    assert answer.tokens == _generate_ids(lm, lm.encode("A long ending. " * 3), 6)


def test_sessions_work_with_a_recurrent_model(byte_tokenizer: Tokenizer) -> None:
    mixer = LinearAttentionConfig(num_heads=2, head_dim=16)
    lm = LanguageModel(
        name="recurrent",
        model=small_transformer(mixer, mixer, seed=1, vocab_size=257, width=32, inner=32, max_positions=256),
        tokenizer=byte_tokenizer,
        chat_template=None,
        plan=MemoryPlan(),
        draft=SPECULATORS.parse("none"),
    )
    session = lm.session()
    session.read("Some text to begin with.")
    twin = session.fork(1)[0]
    wanted = lm.generate("Some text to begin with.", max_new_tokens=5, ignore_end=True).tokens
    assert session.generate(max_new_tokens=5, ignore_end=True).tokens == wanted
    assert twin.generate(max_new_tokens=5, ignore_end=True).tokens == wanted
    session.rewind(10)
    assert session.generate(max_new_tokens=2, ignore_end=True).tokens == _generate_ids(
        lm, lm.encode("Some text to begin with.")[:10], 2
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": 1.0}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": 1e9}, "temperature"),
        ({"seed": -3}, "seed"),
        ({"logit_bias": {99999: 1.0}}, "99999"),
        ({"temprature": 1.0}, "Did you mean 'temperature'"),
        ({"stop": ""}, "stop"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
    ],
)
def test_absurd_options_are_refused_by_name(make_small: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_small().generate("x", **options)


def test_text_that_is_too_long_or_short_is_refused(make_small: Make) -> None:
    lm = make_small()
    with pytest.raises(CapacityError, match="512"):
        lm.generate("x" * 2000)
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        lm.score("x")
    with pytest.raises(ConfigError, match="context"):
        lm.score("xyz", context=1000)
    with pytest.raises(ConfigError, match="stride"):
        lm.score("xyz", context=10, stride=11)
    with pytest.raises(ConfigError, match="empty"):
        lm.generate("")
    with pytest.raises(ConfigError, match="chat template"):
        lm.chat("hello")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": "q4_O"}, UnknownNameError, "Did you mean 'q4_"),
        ({"memory": "ful"}, UnknownNameError, "Did you mean 'full'"),
        ({"memory": "full,window"}, ConfigError, "full and window"),
        ({"draft": "prompt"}, UnknownNameError, "prompt-lookup"),
        ({"draft": "prompt-lookup:match=99"}, ConfigError, "match"),
    ],
)
def test_load_names_what_is_wrong_before_it_loads(
    options: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load("smollm2", **options)  # type: ignore[arg-type]


def test_load_refuses_what_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises((ModelFileError, UnknownNameError)):
        load(tmp_path / "absent.gguf")
    (tmp_path / "model.bin").write_bytes(b"\x80\x04anything")
    with pytest.raises(ModelFileError, match="pickle"):
        load(tmp_path / "model.bin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFileError):
        load(tmp_path / "empty")


@pytest.mark.model
def test_smollm2_knows_the_capital_of_france(smollm2: LanguageModel) -> None:
    assert "Paris" in smollm2.chat("What is the capital of France?", max_new_tokens=32).text


@pytest.mark.model
@pytest.mark.parametrize("weights", ["file", "bf16", "q8_0", "q4_1"])
def test_smollm2_answers_in_every_weight_format(smollm2_gguf: Path, weights: str) -> None:
    lm = load(smollm2_gguf, weights=weights)
    assert "Paris" in lm.chat("What is the capital of France?", max_new_tokens=16).text


def _generate_ids(lm: LanguageModel, ids: list[int], count: int) -> tuple[int, ...]:
    pieces = lm.stream(ids, max_new_tokens=count, ignore_end=True)
    return tuple(choice.token for piece in pieces for choice in piece.choices)


def test_beams_are_texts_in_the_order_that_was_asked_for(make_small: Make) -> None:
    lm = make_small()
    beams = lm.beam_search("A beginning", num_beams=4, num_groups=2, max_new_tokens=6, ignore_end=True)
    assert [beam.group for beam in beams] == [0, 0, 1, 1]
    assert all(beam.text == lm.tokenizer.decode(beam.tokens, continues=True) for beam in beams)
    ranked = lm.beam_search(
        "A beginning", num_beams=4, num_groups=2, max_new_tokens=6, ignore_end=True, rank_by="logprob"
    )
    assert [beam.logprob for beam in ranked] == sorted((beam.logprob for beam in beams), reverse=True)
    one = lm.beam_search("A beginning", num_beams=1, max_new_tokens=6, ignore_end=True)[0]
    assert one.tokens == lm.generate("A beginning", max_new_tokens=6, ignore_end=True).tokens
    with pytest.raises(ConfigError, match="rank_by"):
        lm.beam_search("x", rank_by="length")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Did you mean 'num_beams'"):
        lm.beam_search("x", num_beam=3)


def test_suggestions_are_texts(make_small: Make) -> None:
    lm = make_small()
    ngrams = lm.count_ngrams(TEXTS)
    for counts in (None, ngrams):
        drafts = lm.suggest("A beginning", num_drafts=3, max_new_tokens=5, ngrams=counts)
        assert len(drafts) == 3
        assert all(draft.logprob < 0 for draft in drafts)
        assert len({draft.text for draft in drafts}) == 3
    with pytest.raises(ConfigError, match="Did you mean 'num_drafts'"):
        lm.suggest("x", num_draft=3)


def test_what_is_no_text_and_no_setting_is_refused_by_name(make_small: Make) -> None:
    lm: Any = make_small()
    wanted = lm.generate("abc", max_new_tokens=3).tokens
    for wrong in (
        lambda: lm.generate(None),
        lambda: lm.generate(5),
        lambda: lm.generate(b"abc"),
        lambda: lm.generate({"prompt": "abc"}),
        lambda: lm.generate([1, 2]),
        lambda: lm.generate("abc", stop=None),
        lambda: lm.generate("abc", stop=3),
        lambda: lm.generate("abc", stop=[3]),
        lambda: lm.generate("abc", sampling="temperature=1"),
        lambda: lm.generate("abc", branch="1"),
        lambda: lm.score(3),
        lambda: lm.with_memory(None),
        lambda: list(lm.stream(torch.tensor([1, 2]))),
        lambda: list(lm.stream([1.0])),
    ):
        with pytest.raises(ConfigError):
            wrong()
    assert [score.tokens for score in lm.score(text for text in ("abc", "de"))] == [2, 1]
    assert lm.generate("abc", max_new_tokens=3).tokens == wanted


def test_a_session_that_refuses_something_stays_as_it_was(make_small: Make) -> None:
    lm = make_small()
    session: Any = lm.session()
    session.read("A beginning.")
    text, ids = session.text, list(session.tokens)
    for wrong in (
        lambda: session.read_tokens([1, 257]),
        lambda: session.read_tokens([-1]),
        lambda: session.read_tokens([1.5]),
        lambda: session.follow([ids[0], 257]),
        lambda: session.edit_tokens(0, 1, [1.5]),
        lambda: session.edit_tokens(0.5, 1, [1]),
        lambda: session.edit(0.5, 2, "x"),
        lambda: session.edit(0, 2, None),
        lambda: session.apply(["x"]),
        lambda: session.rewind(1.5),
        lambda: session.fork(1.5),
        lambda: session.read_parallel(None, prefix="x"),
        lambda: session.read_parallel("text", prefix="x"),
        lambda: session.read_parallel([1], prefix="x"),
        lambda: session.generate(" more", max_new_tokens=0),
        lambda: session.generate(" more", stop=3),
        lambda: session.generate(" more", stopp="x"),
        lambda: session.generate(" more", logit_bias={300: 1.0}),
        lambda: session.generate("more " * 200),
    ):
        with pytest.raises((ConfigError, CapacityError)):
            wrong()
        assert (session.text, session.tokens) == (text, ids)
    assert session.generate(max_new_tokens=4, ignore_end=True).tokens == _generate_ids(lm, ids, 4)


def test_a_session_past_the_context_is_not_read(make_small: Make) -> None:
    lm = make_small()
    session = lm.session()
    session.read("x" * 600)
    with pytest.raises(CapacityError, match="context is 512"):
        session.fork()
    assert len(session.past) == 0
    session.rewind(512)
    session.fork()
    assert len(session.past) == 512


def test_nothing_uses_a_session_that_is_answering(make_small: Make) -> None:
    lm = make_small()
    session = lm.session()
    stream = session.stream("Some text", max_new_tokens=12, ignore_end=True)
    next(stream)
    for use in (
        lambda: session.generate("Other text", max_new_tokens=2),
        lambda: session.read("x"),
        lambda: session.rewind(2),
        lambda: session.fork(),
        lambda: session.follow([1]),
        lambda: session.edit(0, 1, "x"),
        lambda: session.score("x"),
    ):
        with pytest.raises(ConfigError, match="is just answering"):
            use()
    list(stream)
    ids = lm.encode("Some text")
    assert session.tokens == [*ids, *_generate_ids(lm, ids, 12)]
    stream = session.stream(" more", max_new_tokens=12)
    next(stream)
    session.close()
    assert list(stream) == []
    assert (session.tokens, session.nbytes()) == ([], 0)
    with pytest.raises(ConfigError, match="is closed"):
        session.generate("x")
