"""Draft models: the text has the model's law, the draft's memory is right, and the shapes are as asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from plait.claims.toy_laws import (
    PROMPT,
    TableReader,
    chi_square,
    continuation,
    joint_law,
    logits_at,
    random_table,
)
from plait.decode import History, Sampler, Sampling
from plait.decode.speculate import RSDC, RSDS, SPECULATORS, Chain, Context, Tree
from plait.decode.speculate import rsd_s as rsd_s_module
from plait.decode.speculate.draft_model import DraftModelConfig, Level, Reader
from plait.errors import ConfigError
from plait.memory import Rows
from plait.memory import Tree as TreeMask
from plait.nn import Transformer
from plait.nn.mixers import AttentionConfig
from plait.nn.rotary import RopeConfig
from small_models import small_transformer

SIZE = 4
LENGTH = 3
SAMPLES = 2000
# Chance that a right method fails one such test.
RARE = 1e-4

TARGET = random_table(SIZE, 1)
DRAFT = random_table(SIZE, 2)


def outcomes(config: DraftModelConfig, sampling: dict[str, Any], budget: int = 50) -> list[tuple[int, ...]]:
    found = []
    for seed in range(SAMPLES):
        sampler = Sampler(Sampling(**sampling, seed=seed), SIZE)
        found.append(
            continuation(TARGET, sampler, config.guess_with(TableReader(DRAFT)).propose, LENGTH, budget)[0]
        )
    return found


@pytest.mark.parametrize(
    ("config", "sampling", "budget"),
    [
        (Chain(tokens=3), {}, 50),
        (RSDC(branch=(2, 2)), {}, 50),
        (RSDC(branch=(3, 2, 1)), {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2}, 50),
        (RSDS(width=3, depth=3), {}, 50),
        (RSDS(width=3, depth=3), {}, 5),
        (RSDS(width=2, depth=2), {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2}, 50),
    ],
    ids=["chain", "rsd-c", "rsd-c-warped", "rsd-s", "rsd-s-cut", "rsd-s-warped"],
)
def test_the_text_has_the_law_of_the_model(
    config: DraftModelConfig, sampling: dict[str, Any], budget: int
) -> None:
    law = joint_law(TARGET, Sampling(**sampling), LENGTH)
    assert chi_square(outcomes(config, sampling, budget), law) > RARE


def test_a_beam_that_is_cut_by_probability_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    grow = rsd_s_module._StochasticBeam.grow

    def cut_by_phi(beam: Any, level: Level) -> Any:
        beam.width, width = 16, beam.width
        children = grow(beam, level)
        beam.width = width
        kept = np.argsort(-beam.phi, kind="stable")[:width]
        beam.phi, beam.psi = beam.phi[kept], beam.psi[kept]
        return [children[place] for place in kept]

    monkeypatch.setattr(rsd_s_module._StochasticBeam, "grow", cut_by_phi)
    law = joint_law(TARGET, Sampling(), LENGTH)
    assert chi_square(outcomes(RSDS(width=3, depth=2), {}), law) < RARE


def shape_of(tree: Tree) -> list[int]:
    """Nodes of each level."""
    depths = tree.depths()
    return [depths.count(depth) for depth in range(max(depths) + 1)]


def proposed(config: DraftModelConfig, *, temperature: float = 1.0, budget: int = 50, seed: int = 0) -> Tree:
    sampler = Sampler(Sampling(temperature=temperature, seed=seed), SIZE)
    context = Context(PROMPT, budget, 1000, sampler, History(PROMPT))
    tree = config.guess_with(TableReader(DRAFT)).propose(context)
    tree.check(context, SIZE)
    return tree


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trees_have_the_shape_that_was_asked_for(temperature: float) -> None:
    assert shape_of(proposed(Chain(tokens=3), temperature=temperature)) == [1, 1, 1, 1]
    assert shape_of(proposed(RSDC(branch=(3, 2, 1)), temperature=temperature)) == [1, 3, 6, 6]
    assert shape_of(proposed(RSDS(width=3, depth=4), temperature=temperature)) == [1, 3, 3, 3, 3]
    # A vocabulary of four has four first tokens.
    assert shape_of(proposed(RSDS(width=9, depth=2), temperature=temperature)) == [1, 4, 9]
    for config in (Chain(tokens=5), RSDC(branch=(3, 2, 1)), RSDS(width=3, depth=4)):
        for budget in range(8):
            assert len(proposed(config, temperature=temperature, budget=budget)) <= budget + 1


def test_greedy_guesses_are_the_likeliest_and_not_declared_as_drawn() -> None:
    tree = proposed(RSDC(branch=(2, 1)), temperature=0.0)
    order = logits_at(DRAFT, PROMPT).argsort(descending=True).tolist()
    assert tree.tokens[1:3] == order[:2]
    assert tree.tokens[3] == int(logits_at(DRAFT, (PROMPT[-1], order[0])).argmax())
    assert not tree.drawn
    assert not tree.laws
    beam = proposed(RSDS(width=2, depth=2), temperature=0.0)
    scores = {
        (a, b): float(
            logits_at(DRAFT, PROMPT).log_softmax(0)[a] + logits_at(DRAFT, (PROMPT[-1], a)).log_softmax(0)[b]
        )
        for a in order[:2]
        for b in range(SIZE)
    }
    best = sorted(scores, key=lambda pair: -scores[pair])[:2]
    last = [(beam.tokens[beam.parents[node]], beam.tokens[node]) for node in (3, 4)]
    assert last == best


def test_draws_of_one_seed_are_the_same_and_of_another_differ() -> None:
    trees = [proposed(RSDS(width=3, depth=3), seed=seed).tokens for seed in (1, 1, 2, 3)]
    assert trees[0] == trees[1]
    assert len({tuple(tree) for tree in trees}) > 1


def test_siblings_never_repeat_a_token_and_have_their_law() -> None:
    for seed in range(50):
        tree = proposed(RSDC(branch=(3, 2)), seed=seed)
        for node in range(len(tree)):
            tokens = [tree.tokens[child] for child in tree.children(node)]
            assert len(set(tokens)) == len(tokens)
        assert tree.drawn == frozenset(range(1, len(tree)))
        torch.testing.assert_close(tree.laws[0], logits_at(DRAFT, PROMPT).softmax(0))


@pytest.fixture(scope="module")
def model() -> Transformer:
    mixer = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, rope=RopeConfig(theta=10000.0, dim=8))
    return small_transformer(
        mixer, mixer, mixer, seed=5, vocab_size=40, width=16, inner=16, max_positions=2000, logit_scale=2.0
    )


@pytest.mark.parametrize("chain", [True, False])
def test_a_reader_scores_and_keeps_what_a_whole_forward_pass_says(model: Transformer, chain: bool) -> None:
    random = np.random.default_rng(0)
    reader = Reader(model, 40)
    tokens = random.integers(0, 40, 700).tolist()
    for _ in range(6):
        first = reader.start(tokens)
        with torch.inference_mode():
            whole = model.logits(model(torch.tensor(tokens), Rows([(len(tokens), 0)]))[-1:])
        torch.testing.assert_close(first, whole, atol=1e-4, rtol=0)
        tree = Tree.root(tokens[-1])
        nodes = [0]
        for _ in range(3):
            below = []
            for node in nodes:
                for _ in range(1 if chain else 2):
                    below.append(len(tree))
                    tree.tokens.append(int(random.integers(40)))
                    tree.parents.append(node)
            nodes = below
            scored = reader.score(tree, nodes)
            with torch.inference_mode():
                ids = torch.tensor(tokens[:-1] + tree.tokens)
                lead = len(tokens) - 1
                parents = [*range(-1, lead - 1), *(lead + p if p >= 0 else lead - 1 for p in tree.parents)]
                rows = Rows([(len(ids), 0, TreeMask(parents))])
                expected = model.logits(model(ids, rows)[[lead + node for node in nodes]])
            torch.testing.assert_close(scored, expected, atol=1e-4, rtol=0)
        path = [0]
        while children := tree.children(path[-1]):
            path.append(children[-1])
            if random.random() < 0.3:
                break
        reader.keep(path)
        tokens += [*(tree.tokens[node] for node in path[1:]), int(random.integers(40))]
        assert len(reader.past) == len(tokens) - 1


def test_a_failed_check_leaves_the_reader_able_to_go_on(model: Transformer) -> None:
    reader = Reader(model, 40)
    first = reader.start([1, 2, 3])
    reader.score(Tree([3, 4, 5], [-1, 0, 0]), [1, 2])
    torch.testing.assert_close(reader.start([1, 2, 3]), first)
    reader.score(Tree([3, 4], [-1, 0]), [1])
    torch.testing.assert_close(reader.start([1, 2, 3]), first)


def test_a_draft_of_another_vocabulary_size_is_fitted(model: Transformer) -> None:
    assert Reader(model, 30).start([1, 2]).shape == (1, 30)
    wider = Reader(model, 50).start([1, 2])
    assert wider.shape == (1, 50)
    assert (wider[0, 40:] == -torch.inf).all()


def test_a_draft_of_the_first_layers_shares_their_parameters(model: Transformer) -> None:
    shallow = model.with_blocks(range(2))
    assert shallow.blocks[0] is model.blocks[0]
    assert (len(model.blocks), len(shallow.blocks), len(shallow.config.blocks)) == (3, 2, 2)
    deep = model.with_blocks(range(3))
    ids, rows = torch.tensor([1, 2, 3]), Rows([(3, 0)])
    assert torch.equal(deep(ids, rows), model(ids, rows))
    assert not torch.equal(shallow(ids, rows), model(ids, rows))
    for bad in ([], [3], [1, 0], [-1]):
        with pytest.raises(ConfigError, match="with_blocks"):
            model.with_blocks(bad)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("chain", "draft_model or chain:layers=N"),
        ("rsd-c:layers=9", "at most the 3"),
        ("rsd-c:layers=1,branch=[2,0]", "branch"),
        ("rsd-c:layers=1,branch=[]", "at least one level"),
        ("rsd-s:layers=1,width=0", "width"),
        ("rsd-s:layers=1,depth=0", "depth"),
        ("chain:layers=0", "layers"),
        ("chain:tokens=-1", "tokens"),
    ],
)
def test_bad_settings_say_what_is_allowed(model: Transformer, spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SPECULATORS.parse(spec).for_model(model)


def test_a_draft_is_given_once(model: Transformer) -> None:
    with pytest.raises(ConfigError, match="either"):
        Chain(layers=1).for_model(model, model)
