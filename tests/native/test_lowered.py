"""A transformer as one native program: close to the modules, and the same bits however rows are batched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from native_support import extension, running, switched_off
from torch import Tensor

from plait.engine.context_store import fingerprint
from plait.errors import ConfigError, IncompatibleError
from plait.memory import Memory, MemoryPlan, Past, Policy, Rows, Segment, Visit
from plait.nn.config import BlockConfig, FeedForwardConfig, NormConfig, TransformerConfig
from plait.nn.distance_bias import DistanceBiasConfig
from plait.nn.lowered import Lowered, lower, obstacle
from plait.nn.mixers.attention import AttentionConfig
from plait.nn.parameters import RandomParameters
from plait.nn.rotary import RopeConfig
from plait.nn.transformer import Transformer
from plait.ops import Causal, Tree
from plait.weights import VQ, WeightFormat
from plait.weights.ggml import Q4_1, Q8_0

pytestmark = switched_off

# Rounding activations to 8 bits moves a product by about half a percent of its size; some ten products follow
# each other. A wrong norm, frame, mask or matrix moves the logits by tens of percent.
TOLERANCE = 0.03


def model(
    kind: str = "plain",
    format: WeightFormat | None = None,
    bias: DistanceBiasConfig | None = None,
    **changes: Any,
) -> Transformer:
    is_rich = kind == "rich"
    mixers = [
        AttentionConfig(
            num_heads=4, num_kv_heads=2, head_dim=32, rope=RopeConfig(dim=32 if not is_rich else 16),
            distance_bias=bias, qkv_bias=is_rich, output_bias=is_rich, qk_norm=is_rich, softcap=20.0 if is_rich else None, window=window,
        )
        for window in ((None, 6) if is_rich else (None, None))
    ]  # fmt: skip
    feed_forward = FeedForwardConfig(
        size=96, activation="gelu_tanh" if is_rich else "silu", gated=kind != "ungated", bias=is_rich
    )
    blocks = [
        BlockConfig(mixer=mixer, feed_forward=feed_forward, norms="sandwich" if is_rich else "pre")
        for mixer in mixers
    ]
    config = TransformerConfig(
        family="llama", vocab_size=101, width=64, blocks=tuple(blocks), norm=NormConfig(epsilon=1e-5),
        max_positions=512, tied_head=is_rich, embedding_scale=3.0 if is_rich else 1.0, head_bias=False,
        logit_softcap=9.0 if is_rich else None, **changes,
    )  # fmt: skip
    with torch.no_grad():
        return Transformer(config, RandomParameters(1, format or (Q8_0() if is_rich else Q4_1()))).eval()


def distance(found: Tensor, wanted: Tensor) -> float:
    """Size of the difference, as a part of the size of what is wanted."""
    return float((found - wanted).norm() / wanted.norm())


def new_past(of: Transformer, memory: str = "full") -> Past:
    return of.new_past(MemoryPlan.parse(memory))


@pytest.mark.parametrize("memory", ["full", "full,dense:dtype=bf16", "window:size=9,sinks=2"])
@pytest.mark.parametrize("kind", ["plain", "rich", "ungated"])
@torch.inference_mode()
def test_logits_are_close_to_those_of_the_modules(kind: str, memory: str) -> None:
    plain = model(kind)
    lowered = Lowered(model(kind))
    tokens = torch.randint(0, 101, (25,))
    mine, theirs = new_past(plain, memory), new_past(plain, memory)
    for start, stop in [(0, 12), (12, 13), (13, 25)]:
        rows = Rows([(stop - start, start)])
        hidden, logits = lowered(tokens[start:stop], rows, [mine], with_logits=True)
        wanted = plain(tokens[start:stop], rows, [theirs])
        assert distance(logits, plain.logits(wanted)) <= TOLERANCE
        assert distance(hidden, wanted) <= TOLERANCE
        mine.commit()
        theirs.commit()
        assert len(mine) == len(theirs) == stop


@torch.inference_mode()
def test_a_row_has_the_same_bits_in_200_mixes_of_batch_chunks_verify_widths_and_threads() -> None:
    plain = model()
    lowered = Lowered(model())
    sequences = [torch.randint(0, 101, (length,)) for length in (1, 9, 40, 300)]
    alone = []
    for tokens in sequences:
        past = new_past(plain)
        alone.append(lowered(tokens, Rows([(len(tokens), 0)]), [past], with_logits=True)[1])
    generator = torch.Generator().manual_seed(5)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    sets = extension().isas()
    for trial in range(200):
        chosen = [pick(0, len(sequences)) for _ in range(pick(1, 5))]
        pasts, done = [new_past(plain) for _ in chosen], [0] * len(chosen)
        with running(threads=1 + trial % 3, isa=sets[trial % min(3, len(sets))]):
            while True:
                # Each sequence reads a chunk, a draft of which some tokens are wrong, or waits.
                active = [i for i, s in enumerate(chosen) if done[i] < len(sequences[s])]
                if not active:
                    break
                take = {i: min(pick(1, 120), len(sequences[chosen[i]]) - done[i]) for i in active}
                drafts = {i: pick(0, 4) for i in active}
                tokens = [
                    torch.cat(
                        [
                            sequences[chosen[i]][done[i] : done[i] + take[i]],
                            torch.randint(0, 101, (drafts[i],)),
                        ]
                    )
                    for i in active
                ]
                rows = Rows([(len(t), done[i], Causal()) for i, t in zip(active, tokens, strict=True)])
                _, logits = lowered(torch.cat(tokens), rows, [pasts[i] for i in active], with_logits=True)
                for i, segment in zip(active, rows.segments, strict=True):
                    found = logits[segment.start : segment.start + take[i]]
                    assert torch.equal(found, alone[chosen[i]][done[i] : done[i] + take[i]])
                    pasts[i].commit(range(take[i]))
                    done[i] += take[i]


@pytest.mark.parametrize("kind", ["plain", "rich"])
@torch.inference_mode()
def test_a_model_of_vector_codes_runs_as_a_program(kind: str) -> None:
    plain = model(kind, VQ(books=1, group=4))
    lowered = Lowered(plain)
    tokens = torch.randint(0, 101, (40,))
    wanted = plain.logits(plain(tokens, Rows([(40, 0)]), None))
    whole = lowered(tokens, Rows([(40, 0)]), [new_past(plain)], with_logits=True)[1]
    assert distance(whole, wanted) <= TOLERANCE
    past = new_past(plain)
    for start, stop in [(0, 37), (37, 38), (38, 39), (39, 40)]:
        step = lowered(tokens[start:stop], Rows([(stop - start, start)]), [past], with_logits=True)[1]
        past.commit()
        assert torch.equal(step, whole[start:stop])


@torch.inference_mode()
def test_branches_of_a_tree_have_the_bits_of_plain_decoding() -> None:
    plain = model()
    lowered = Lowered(model())
    prompt, a, b = torch.randint(0, 101, (20,)), [5, 6, 7], [5, 8]

    def after(tokens: list[int]) -> Tensor:
        past = new_past(plain)
        lowered(prompt, Rows([(20, 0)]), [past])
        past.commit()
        return lowered(torch.tensor(tokens), Rows([(len(tokens), 20)]), [past], with_logits=True)[1]

    past = new_past(plain)
    lowered(prompt, Rows([(20, 0)]), [past])
    past.commit()
    tree = Tree([-1, 0, 1, 0])  # 5, then 6 7 or 8
    _, logits = lowered(torch.tensor([5, 6, 7, 8]), Rows([(4, 20, tree)]), [past], with_logits=True)
    assert torch.equal(logits[:3], after(a))
    # The node stands behind its siblings in the strand, but its score in the slot of its depth.
    assert torch.equal(logits[3], after(b)[1])


@pytest.mark.parametrize("kind", ["plain", "rich"])
@torch.inference_mode()
def test_a_row_has_the_same_bits_in_any_tree_and_behind_any_cut_of_its_past(kind: str) -> None:
    """Random trees at the borders of chunks, pasts that are forked, frozen, cut and shared at random places."""
    plain = model(kind)
    lowered = Lowered(model(kind))
    generator = torch.Generator().manual_seed(8)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    text = torch.randint(0, 101, (300,), generator=generator)
    whole = lowered(text, Rows([(300, 0)]), [new_past(plain)], with_logits=True)[1]
    saved = 0
    for _ in range(25):
        length = [pick(1, 290), pick(250, 258)][pick(0, 2)]
        past = new_past(plain)
        at = 0
        while at < length:
            stop = min(length, at + pick(1, 200))
            lowered(text[at:stop], Rows([(stop - at, at)]), [past])
            past.commit()
            at = stop
            if pick(0, 2):
                cut = sorted((pick(0, at + 1), pick(0, at + 1)))
                for layer in past.layers:
                    layer.run(*cut)
        others = [past.fork() for _ in range(pick(1, 4))]
        # The true continuation is one path of a random tree.
        path, parents, tokens = [], [], []
        for node in range(pick(2, 40)):
            is_next = length + len(path) < 300 and (node == 0 or pick(0, 3) == 0)
            parents.append((path[-1] if path else -1) if is_next else pick(0, node))
            tokens.append(int(text[length + len(path)]) if is_next else pick(0, 101))
            if is_next:
                path.append(node)
        count = len(tokens)
        rows = Rows([(count, length, Tree(parents)), *((1, length) for _ in others)])
        fed = torch.tensor(tokens + [tokens[0]] * len(others))
        logits = lowered(fed, rows, [past, *others], with_logits=True)[1]
        saved += lowered.saved_visits
        for depth, node in enumerate(path):
            assert torch.equal(logits[node], whole[length + depth])
        for row in range(count, len(fed)):
            assert torch.equal(logits[row], whole[length])
    assert saved > 0


@pytest.mark.parametrize(
    "memory",
    [
        "gear:bits=4,group=16,buffer=16",
        "saq:steps=rest@4,group=16",
        "think:ratio=0.4,gear:group=16,buffer=16",
        "snapkv:capacity=300",
        "snapkv:capacity=300,think:ratio=0.4,gear:group=16,buffer=16",
    ],
)
@torch.inference_mode()
def test_codes_that_sequences_share_are_visited_once_with_the_same_bits(memory: str) -> None:
    plain = model()
    lowered = Lowered(model())
    text = torch.randint(0, 101, (600,))
    past = new_past(plain, memory)
    # A codec that chooses by the prompt's queries is asked for them by the modules only.
    for at in range(0, 600, 200):
        plain(text[at : at + 200], Rows([(200, at)]), [past])
        past.commit(is_prompt=at < 400)
    alone = past.fork()
    wanted = []
    for at, token in enumerate((5, 6, 7)):
        wanted.append(lowered(torch.tensor([token]), Rows([(1, 600 + at)]), [alone], with_logits=True)[1][0])
        alone.commit(None)
    forks = [past.fork() for _ in range(4)]
    # The first sequence drafts the same three tokens among others, the rest read the first of them.
    tree = Tree([-1, 0, 0, 1, 1, 2])
    rows = Rows([(6, 600, tree), *((1, 600) for _ in forks[1:])])
    logits = lowered(torch.tensor([5, 8, 6, 6, 9, 7, 5, 5, 5]), rows, forks, with_logits=True)[1]
    assert lowered.saved_visits > 0
    for row, depth in ((0, 0), (2, 1), (5, 2), (6, 0), (7, 0), (8, 0)):
        assert torch.equal(logits[row], wanted[depth])


@pytest.mark.parametrize("kind", ["plain", "rich"])
@torch.inference_mode()
def test_first_tokens_at_a_pinned_distance_equal_the_modules(kind: str) -> None:
    plain = model(kind)
    lowered = Lowered(model(kind))
    tokens = torch.randint(0, 101, (40,))
    mine, theirs = (new_past(plain, "lm-infinite:local=8,initial=3") for _ in range(2))
    for past in (mine, theirs):
        plain(tokens[:11], Rows([(11, 0)]), [past])
        past.commit()
    for start, stop in [(11, 12), (12, 20), (20, 40)]:
        rows = Rows([(stop - start, start)])
        answer = lowered(tokens[start:stop], rows, [mine])
        assert answer is not None
        assert distance(answer[0], plain(tokens[start:stop], rows, [theirs])) <= TOLERANCE
        mine.commit()
        theirs.commit()


@torch.inference_mode()
def test_first_tokens_among_the_new_rows_are_not_read_before_they_are_written() -> None:
    fast = model()
    program = Lowered(fast)
    past = new_past(fast, "lm-infinite:local=8,initial=3")
    rows = Rows([(20, 0)])
    assert program(torch.arange(20), rows, [past]) is None
    assert len(past) == 0
    assert fast(torch.arange(20), rows, [past]).isfinite().all()


@pytest.mark.parametrize("memory", ["full", "window:size=4,sinks=3"])
@torch.inference_mode()
def test_trees_under_windows_equal_the_modules(memory: str) -> None:
    plain = model("rich")
    lowered = Lowered(model("rich"))
    tree = Tree([-1, 0, 0, 1, 3, 2, 4, 0, 7])
    tokens = torch.randint(0, 101, (11,))
    for prompt in (0, 2):
        mine, theirs = new_past(plain, memory), new_past(plain, memory)
        for rows, chunk in [(Rows([(prompt, 0)]), tokens[:prompt]), (Rows([(9, prompt, tree)]), tokens[2:])]:
            if len(chunk):
                hidden, _ = lowered(chunk, rows, [mine])
                assert distance(hidden, plain(chunk, rows, [theirs])) <= TOLERANCE
                mine.commit([0] if rows.segments[0].mask is tree else None)
                theirs.commit([0] if rows.segments[0].mask is tree else None)


@torch.inference_mode()
def test_chosen_rows_only_and_embeddings_in_place_of_tokens() -> None:
    plain = model("rich")
    lowered = Lowered(model("rich"))
    tokens = torch.randint(0, 101, (7,))
    _, everything = lowered(tokens, Rows([(7, 0)]), [new_past(plain)], with_logits=True)
    hidden, logits = lowered(
        tokens, Rows([(7, 0)]), [new_past(plain)], wanted=torch.tensor([6, 2]), with_logits=True
    )
    assert torch.equal(logits, everything[[6, 2]])
    again, nothing = lowered(
        None, Rows([(7, 0)]), [new_past(plain)], embeddings=plain.embed(tokens), wanted=torch.tensor([6, 2])
    )  # fmt: skip
    assert nothing is None
    assert torch.equal(again, hidden)


@torch.inference_mode()
def test_wrong_input_is_refused() -> None:
    plain = model()
    lowered = Lowered(model())
    with pytest.raises(ConfigError, match="101"):
        lowered(torch.tensor([101]), Rows([(1, 0)]), [new_past(plain)])
    with pytest.raises(ConfigError, match="needs tokens"):
        lowered(None, Rows([(1, 0)]), [new_past(plain)])
    with pytest.raises(ConfigError, match="one row"):
        lowered(torch.tensor([1, 2]), Rows([(1, 0)]), [new_past(plain)])
    with pytest.raises(ValueError, match="logit row"):
        lowered(torch.tensor([1]), Rows([(1, 0)]), [new_past(plain)], wanted=torch.tensor([1]))


def test_a_model_without_a_native_form_says_why() -> None:
    with torch.no_grad():
        dense = Transformer(model().config, RandomParameters(0)).eval()
    reason = obstacle(dense)
    assert reason is not None
    assert "float32" in reason
    with pytest.raises(IncompatibleError, match="float32"):
        Lowered(dense)


@torch.inference_mode()
def test_a_lowered_model_answers_through_its_program_or_without_it() -> None:
    plain, fast = model("rich"), model("rich")
    assert lower(fast)
    tokens = torch.randint(0, 101, (9,))
    rows = Rows([(9, 0)])
    wanted = torch.tensor([3, 8])
    expected = plain.answer(tokens, rows, [new_past(plain)], wanted=wanted)
    assert distance(fast.answer(tokens, rows, [new_past(fast)], wanted=wanted), expected) <= TOLERANCE
    # Without a past, and with one that the program cannot read, the modules compute with the same matrices.
    assert distance(fast.answer(tokens, rows, wanted=wanted), expected) <= TOLERANCE
    past = new_past(fast)
    for layer in past.layers:
        layer.plan = replace(layer.plan, policy=Pinned())
    assert distance(fast.answer(tokens, rows, [past], wanted=wanted), expected) <= TOLERANCE
    assert len(past) == 9
    assert fast.embedding.weight.nbytes() < plain.embedding.weight.unpack().nbytes / 3


class Pinned(Policy):
    """Says that it changes nothing, in a way that the program does not know."""

    def visits(self, memory: Memory, segment: Segment) -> list[Visit]:
        return [Visit(strand, memory.window, Causal()) for strand in memory.all_strands()]


def test_context_stores_tell_lowered_models_apart() -> None:
    one, same, other = model(), model(), model()
    for part in other.blocks[0].mixer.qkv.weight.pieces():
        part.blocks = part.blocks.roll(1, dims=0)
    assert all(lower(each) for each in (one, same, other))
    assert fingerprint(one) == fingerprint(same)
    assert fingerprint(one) != fingerprint(other)


LOOKING_BACK = "infllm:local=16,initial=3,block=5,topk=2,representatives=2,execution=8"
# What the modules compute with the same matrices in native form differs by the rounding of activations alone.
SAME_MATRICES = 1e-3


IN_A_FILE = f"{LOOKING_BACK},cached=3,cold=file"
CODED = "gear:bits=8,group=16"


@pytest.mark.parametrize(
    "memory", [LOOKING_BACK, f"{LOOKING_BACK},{CODED}", IN_A_FILE, f"{IN_A_FILE},{CODED}"]
)
@pytest.mark.parametrize("kind", ["plain", "rich"])
@torch.inference_mode()
def test_blocks_are_looked_up_inside_the_program_as_by_the_modules(kind: str, memory: str) -> None:
    fast = model(kind)
    program = Lowered(fast)
    tokens = torch.randint(0, 101, (90,))
    mine, theirs = new_past(fast, memory), new_past(fast, memory)
    for start, stop in [(0, 24), (24, 48), *((at, at + 1) for at in range(48, 90))]:
        rows = Rows([(stop - start, start)])
        fast.program = program
        found = fast(tokens[start:stop], rows, [mine])
        fast.program = None
        assert distance(found, fast(tokens[start:stop], rows, [theirs])) <= SAME_MATRICES
        mine.commit()
        theirs.commit()
        assert mine.layers[0].policy_notes.chosen == theirs.layers[0].policy_notes.chosen
    # It was the program that answered, and not the modules in its place.
    assert program(tokens[:1], Rows([(1, 90)]), [mine]) is not None
    assert len(mine.layers[0].policy_notes.blocks) == 14


@torch.inference_mode()
def test_a_codec_that_learns_from_a_prompt_is_told_by_the_program() -> None:
    fast = model()
    program = Lowered(fast)
    tokens = torch.randint(0, 101, (300,))
    mine, theirs = (new_past(fast, "think:ratio=0.4,gear:group=16,buffer=16") for _ in range(2))
    for start, stop in [(0, 200), (200, 300)]:
        rows = Rows([(stop - start, start)])
        assert program(tokens[start:stop], rows, [mine]) is not None
        fast(tokens[start:stop], rows, [theirs])
        for past in (mine, theirs):
            past.commit(is_prompt=stop < 300)
    for ours, other in zip(mine.layers, theirs.layers, strict=True):
        assert torch.equal(ours.codec_notes.key_channels, other.codec_notes.key_channels)


@pytest.mark.parametrize(
    ("stored", "tolerance"),
    [
        ("dense", SAME_MATRICES),
        ("dense:dtype=fp16", SAME_MATRICES),
        ("think:ratio=0.4", SAME_MATRICES),
        # Numbers that are nearly the same may fall on either side of a step.
        ("gear:group=16,buffer=16", 10 * SAME_MATRICES),
    ],
)
@torch.inference_mode()
def test_tokens_that_are_kept_of_a_prompt_are_those_of_the_modules_and_read_by_the_program(
    stored: str, tolerance: float
) -> None:
    fast = model()
    program = Lowered(fast)
    tokens = torch.randint(0, 101, (300,))
    mine, theirs = (new_past(fast, f"snapkv:capacity=80,window=16,chunk=8,{stored}") for _ in range(2))
    for start, stop in [(0, 200), (200, 280), *((at, at + 1) for at in range(280, 300))]:
        rows = Rows([(stop - start, start)])
        found = program(tokens[start:stop], rows, [mine], with_logits=True)
        assert found is not None
        wanted = fast.logits(fast(tokens[start:stop], rows, [theirs]))
        # Behind the prompt both see what each has kept.
        if start >= 280:
            assert distance(found[1], wanted) <= tolerance
        for past in (mine, theirs):
            past.commit(is_prompt=stop < 280)
    for ours, other in zip(mine.layers, theirs.layers, strict=True):
        assert (
            [len(strand) for strand in ours.held()] == [len(strand) for strand in other.held()] == [264, 36]
        )
        assert ours.nbytes() == other.nbytes()


@pytest.mark.parametrize("coded", ["", f",{CODED}", ",saq:group=4,steps=rest@4"])
@torch.inference_mode()
def test_blocks_in_a_file_change_no_bit_and_stay_counted(coded: str) -> None:
    fast = model()
    assert lower(fast)
    program = fast.program
    assert isinstance(program, Lowered)
    tokens = torch.randint(0, 101, (120,))
    inside, outside = (new_past(fast, memory + coded) for memory in (LOOKING_BACK, IN_A_FILE))
    for start, stop in [*((at, at + 8) for at in range(0, 80, 8)), *((at, at + 1) for at in range(80, 120))]:
        rows = Rows([(stop - start, start)])
        found = [program(tokens[start:stop], rows, [past]) for past in (inside, outside)]
        assert found[0] is not None
        assert found[1] is not None
        assert torch.equal(found[0][0], found[1][0])
        for past in (inside, outside):
            past.commit()
        # A fork reads the same file, and goes back to where some blocks have not been made.
        if stop == 100:
            outside = outside.fork()
    for layer in outside.layers:
        notes = layer.policy_notes
        assert len(notes.resident) == 3
        held = sum(tensor.nbytes for tensor in notes.resident.values())
        assert held == sum(notes.blocks[number].nbytes for number in notes.resident)


@torch.inference_mode()
def test_looking_up_gives_the_same_bits_alone_and_in_a_batch() -> None:
    plain = model()
    program = Lowered(model())
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(0, 101, (120,), generator=generator) for _ in range(3)]

    def read(chosen: list[int], sets: list[str]) -> list[list[Tensor]]:
        pasts = [new_past(plain, LOOKING_BACK) for _ in chosen]
        outs: list[list[Tensor]] = [[] for _ in chosen]
        for at in [*range(0, 40, 8), *range(40, 120)]:
            take = 8 if at < 40 else 1
            with running(threads=1 + at % 3, isa=sets[at % len(sets)]):
                rows = Rows([(take, at) for _ in chosen])
                answer = program(torch.cat([texts[i][at : at + take] for i in chosen]), rows, pasts)
            assert answer is not None
            for out, segment, past in zip(outs, rows.segments, pasts, strict=True):
                out.append(answer[0][segment.rows].clone())
                past.commit()
        return outs

    sets = extension().isas()
    together = read([0, 1, 2], sets[: min(3, len(sets))])
    for index in range(3):
        for one, other in zip(read([index], sets[:1])[0], together[index], strict=True):
            assert torch.equal(one, other)


@torch.inference_mode()
def test_what_is_attended_through_a_choice_equals_the_fold() -> None:
    """The first layer reads the same numbers in both forms, so that nothing but attention differs."""
    fast = model()
    assert lower(fast)
    program = fast.program
    assert isinstance(program, Lowered)
    tokens = torch.randint(0, 101, (100,))
    past = new_past(fast, LOOKING_BACK)
    for at in range(100):
        found = program(tokens[at : at + 1], Rows([(1, at)]), [past])
        assert found is not None
        notes = past.layers[0].policy_notes
        asked = notes.pending[-1] if notes.pending else None
        if at in (30, 60, 99):
            assert asked is not None
            lse, queries, chosen = asked.lse.clone(), asked.queries.clone(), notes.chosen
            past.truncate(at)
            saved, fast.program = fast.program, None
            fast(tokens[at : at + 1], Rows([(1, at)]), [past])
            fast.program = saved
            again = past.layers[0].policy_notes
            assert torch.allclose(again.pending[-1].lse, lse, atol=1e-4)
            assert torch.allclose(again.pending[-1].queries, queries, atol=1e-4)
            assert again.chosen == chosen
        past.commit()


@torch.inference_mode()
def test_logits_of_rows_read_in_runs_are_those_of_the_runs_by_themselves() -> None:
    fast = model("rich")
    assert lower(fast)
    assert isinstance(fast.program, Lowered)
    tokens = torch.randint(0, 101, (40,))
    wanted = torch.tensor([39, 3, 17, 4, 39])
    found = fast.answer(tokens, Rows([(40, 0)]), [new_past(fast, LOOKING_BACK)], wanted=wanted)
    past = new_past(fast, LOOKING_BACK)
    logits = []
    for start in range(0, 40, 8):
        answer = fast.program(tokens[start : start + 8], Rows([(8, start)]), [past], with_logits=True)
        assert answer is not None
        assert answer[1] is not None
        logits.append(answer[1].clone())
    assert torch.equal(found, torch.cat(logits)[wanted])


@pytest.mark.parametrize(
    ("tokens", "message"), [([1] * 30 + [101], "Token ids must be"), ([1] * 30, "Each token needs one row")]
)
@torch.inference_mode()
def test_rows_read_in_runs_are_refused_before_any_is_written(tokens: list[int], message: str) -> None:
    fast = model()
    assert lower(fast)
    past = new_past(fast, LOOKING_BACK)
    rows = Rows([(31, 0)])
    with pytest.raises(ConfigError, match=message):
        fast(torch.tensor(tokens), rows, [past])
    with pytest.raises(ConfigError, match=message):
        fast.answer(torch.tensor(tokens), rows, [past], wanted=torch.tensor([30]))
    assert len(past) == 0
    assert past.layers[0].pending == 0
