"""Token Recycling: the tree is what the table says, and the table what the model said last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from plait.decode import History, Sampler, Sampling
from plait.decode.speculate import Context, Speculator, TokenRecycling, Tree
from plait.decode.speculate.token_recycling import TEMPLATE, Table
from plait.errors import ConfigError, IncompatibleError
from plait.nn import Transformer
from plait.nn.mixers import AttentionConfig
from small_models import small_transformer

SIZE = 50


def context_of(tokens: list[int], budget: int = 100) -> Context:
    return Context(tokens, budget, 1000, Sampler(Sampling(), SIZE), History(tokens))


def speculator_of(
    make: Callable[[], Speculator], successors: np.ndarray | None = None
) -> tuple[Speculator, Table]:
    """A speculator that has read its prompt, and its table filled with these successors."""
    speculator = make()
    table: Table = speculator.table  # type: ignore[attr-defined]
    speculator.propose(context_of([0]))
    if successors is not None:
        table.successors[:] = successors
    return speculator, table


@pytest.fixture(scope="module")
def model() -> Transformer:
    mixer = AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=8)
    return small_transformer(mixer, seed=0, vocab_size=SIZE, width=8, inner=8, max_positions=64)


def paths_of(tree: Tree) -> set[tuple[int, ...]]:
    """The token path of every node but the root."""
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True):
        paths.append((*paths[parent], token))
    return set(paths[1:])


def test_the_template_has_the_paper_s_80_nodes() -> None:
    assert [sum(len(path) == depth for path in TEMPLATE) for depth in range(1, 7)] == [8, 21, 25, 15, 8, 3]
    assert len(set(TEMPLATE)) == 80
    assert all(len(path) == 1 or path[:-1] in TEMPLATE for path in TEMPLATE)


@pytest.mark.parametrize("seed", range(20))
def test_the_tree_is_read_breadth_first_from_the_table(model: Transformer, seed: int) -> None:
    random = np.random.default_rng(seed)
    successors = np.stack([random.permutation(SIZE)[:8] for _ in range(SIZE)])
    make = TokenRecycling(nodes=80).for_model(model)
    speculator, _ = speculator_of(make, successors)
    tree = speculator.propose(context_of([3, 7]))
    tree.check(context_of([3, 7]), SIZE)
    expected = set()
    for path in TEMPLATE:
        token, tokens = 7, []
        for rank in path:
            token = int(successors[token, int(rank)])
            tokens.append(token)
        expected.add(tuple(tokens))
    assert paths_of(tree) == expected


@pytest.mark.parametrize("nodes", [1, 5, 24, 80])
def test_smaller_trees_are_connected_and_take_what_ranks_make_likely(model: Transformer, nodes: int) -> None:
    random = np.random.default_rng(0)
    successors = np.stack([random.permutation(SIZE)[:8] for _ in range(SIZE)])
    speculator, table = speculator_of(TokenRecycling(nodes=nodes).for_model(model), successors)
    tree = speculator.propose(context_of([3]))
    tree.check(context_of([3]), SIZE)
    assert len(tree) == nodes + 1
    first = int(successors[3, 0])
    assert (first,) in paths_of(tree)
    assert ((first, int(successors[first, 0])) in paths_of(tree)) == (nodes > 1)
    assert tree.slots[1:] == table.paths[:nodes]
    for budget in (0, 1, 3):
        assert len(speculator.propose(context_of([3], budget))) <= budget + 1


def test_every_scored_node_is_learned_and_the_accepted_one_counts(model: Transformer) -> None:
    speculator, table = speculator_of(TokenRecycling(k=3).for_model(model))
    # Token 5 stands at three nodes: deep, shallow and accepted.
    tree = Tree([1, 5, 4, 5, 5], [-1, 0, 0, 2, 3])
    logits = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(0))
    speculator.observe([1, 4, 5, 6], tree, [0, 2, 3], logits)
    best = logits.topk(3).indices.numpy()
    assert table.successors[5].tolist() == best[3].tolist()
    assert table.successors[4].tolist() == best[2].tolist()
    assert table.successors[1].tolist() == best[0].tolist()
    speculator.observe([1, 6], tree, [0], logits)
    assert table.successors[5].tolist() == best[1].tolist()
    # Of a tree that was trimmed, the rows are those of the nodes that were scored.
    speculator.observe([1, 6], replace(tree, unscored=frozenset({1, 4})), [0], logits[[4, 2, 0]])
    assert [table.successors[token].tolist() for token in (1, 4, 5)] == best[[4, 2, 0]].tolist()


def test_what_nobody_knows_is_not_proposed_and_the_prompt_is_known(model: Transformer) -> None:
    make = TokenRecycling().for_model(model)
    assert len(make().propose(context_of([2]))) == 1
    tree = make().propose(context_of([2, 3, 2, 4, 2]))
    assert paths_of(tree) >= {(4,), (3,), (4, 2), (3, 2), (4, 2, 4)}
    assert len(paths_of(tree)) == len(tree) - 1


def test_requests_share_the_table_and_models_do_not(model: Transformer) -> None:
    make = TokenRecycling().for_model(model)
    make().propose(context_of([11, 12, 13]))
    assert (12, 13) in paths_of(make().propose(context_of([11])))
    assert len(TokenRecycling().for_model(model)().propose(context_of([11]))) == 1


def test_the_table_of_a_vocabulary_of_49152_is_below_two_megabytes() -> None:
    assert Table(49152, 8).nbytes() < 2_000_000


def test_bad_settings_say_what_is_allowed(model: Transformer) -> None:
    with pytest.raises(ConfigError, match="k must be"):
        TokenRecycling(k=9)
    with pytest.raises(ConfigError, match="nodes must be"):
        TokenRecycling(nodes=81)
    with pytest.raises(ConfigError, match="vocabulary of 3"):
        Table(3, 4)
    with pytest.raises(IncompatibleError, match="token-recycling"):
        TokenRecycling().for_model(model, model)
