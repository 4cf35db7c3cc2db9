"""Lexical unit decoding: probes, trusted nodes, and what is guessed from placeholders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from plait.decode import History, Sampler, Sampling
from plait.decode.speculate import LUD, SPECULATORS, Context, Speculator, Tree, verify
from plait.errors import ConfigError, IncompatibleError
from plait.nn import Transformer
from plait.nn.mixers import AttentionConfig
from small_models import small_transformer

VOCABULARY, PLACEHOLDER = 12, 11


def model(placeholder: int | None = PLACEHOLDER) -> Transformer:
    return small_transformer(
        AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
        seed=1, vocab_size=VOCABULARY, width=16, inner=16, max_positions=64, placeholder=placeholder,
    )  # fmt: skip


def context(tokens: Sequence[int], budget: int = 64) -> Context:
    sampler = Sampler(Sampling(temperature=0.0), VOCABULARY)
    return Context(tokens, budget=budget, positions=64, sampler=sampler, history=History(tokens))


def certain(*tokens: int, probability: float = 0.99) -> Tensor:
    """Logits under which each row has one token of the given probability."""
    rest = torch.tensor((1 - probability) / (VOCABULARY - 1)).log()
    logits = torch.full((len(tokens), VOCABULARY), float(rest))
    logits[range(len(tokens)), list(tokens)] = float(torch.tensor(probability).log())
    return logits


def told(guesser: Speculator, tokens: Sequence[int], *answers: int, probability: float = 0.99) -> Tree:
    """What is proposed next, after the probes behind the last node have answered so."""
    tree = guesser.propose(context(tokens[:-1]))
    logits = torch.zeros(len(tree), VOCABULARY)
    end = max(node for node in range(len(tree)) if node not in tree.probes)
    below = [node for node in sorted(tree.probes) if chain_of(tree, node)[0] == end]
    logits[below[: len(answers)]] = certain(*answers, probability=probability)
    guesser.observe(tokens, tree, list(range(end + 1)), logits)
    return guesser.propose(context(tokens))


def chain_of(tree: Tree, node: int) -> list[int]:
    """The node that a probe hangs below, and the probes on the way to it."""
    way = [node]
    while way[0] in tree.probes:
        way.insert(0, tree.parents[way[0]])
    return way


@pytest.fixture
def guesser() -> Callable[..., Speculator]:
    return lambda **settings: LUD(**settings).for_model(model())()


def test_the_first_tree_is_a_root_with_placeholders(guesser: Callable[..., Speculator]) -> None:
    tree = guesser(pads=3).propose(context([4, 5]))
    assert tree.tokens == [5, 11, 11, 11]
    assert tree.parents == [-1, 0, 1, 2]
    assert tree.probes == {1, 2, 3}
    tree.check(context([4, 5]), VOCABULARY)
    assert guesser(pads=3).propose(context([4, 5], budget=2)).tokens == [5, 11, 11]
    assert guesser(pads=3).propose(context([4, 5], budget=0)).tokens == [5]


def test_certain_answers_become_guesses_up_to_the_first_uncertain_one(
    guesser: Callable[..., Speculator],
) -> None:
    tree = told(guesser(pads=3), [4, 5, 6], 7, 8, 9)
    assert tree.tokens[:4] == [6, 7, 8, 9]
    assert told(guesser(pads=3, beta=0.995), [4, 5, 6], 7, 8, 9).tokens[:2] == [6, 11]
    assert told(guesser(pads=3), [4, 5, 6], 7).tokens[:3] == [6, 7, 11]
    assert told(guesser(pads=3, beta=1.01), [4, 5, 6], 7, 8, probability=1.0).tokens[:2] == [6, 11]


def test_verified_trees_have_placeholders_behind_every_guess_and_lossy_ones_behind_the_last(
    guesser: Callable[..., Speculator],
) -> None:
    verified = told(guesser(pads=2), [4, 5, 6], 7, 8)
    hosts = [chain_of(verified, node)[0] for node in sorted(verified.probes)]
    assert hosts == [2, 2, 1, 1, 0, 0]
    assert not verified.trusted
    lossy = told(guesser(pads=2, mode="lossy"), [4, 5, 6], 7, 8)
    assert lossy.tokens == [6, 7, 8, 11, 11]
    assert lossy.parents == [-1, 0, 1, 2, 3]
    assert lossy.trusted == {1, 2}
    assert lossy.probes == {3, 4}


def test_a_guess_that_repeats_is_kept_only_if_the_text_does_so_elsewhere(
    guesser: Callable[..., Speculator],
) -> None:
    assert told(guesser(pads=3), [4, 5, 6], 6, 8, 9).tokens[:2] == [6, 11]
    assert told(guesser(pads=3), [4, 5, 6], 8, 8, 9).tokens[:3] == [6, 8, 11]
    assert told(guesser(pads=3), [4, 8, 8, 6], 8, 8, 9).tokens[:4] == [6, 8, 8, 9]


def test_the_verifier_passes_over_probes_and_takes_trusted_nodes() -> None:
    sampler, history = Sampler(Sampling(temperature=0.0, logprobs=0), VOCABULARY), History([3])
    logits = certain(5, 6, 7, 8)
    # The probe's token is what the model says, yet it is no proposal.
    probed = Tree([3, 5, 6], [-1, 0, 1], probes=frozenset({1, 2}))
    path, choices = verify(probed, logits[:3], sampler, history)
    assert (path, [choice.token for choice in choices]) == ([0], [5])
    trusted = Tree([3, 9, 9], [-1, 0, 1], trusted=frozenset({1}))
    path, choices = verify(trusted, logits[:3], sampler, history)
    assert (path, [choice.token for choice in choices]) == ([0, 1], [9, 6])
    # What is reported is the model's own probability of the token that was taken.
    assert choices[0].logprob == pytest.approx(float(logits[0].log_softmax(-1)[9]), abs=1e-5)


def test_a_proposal_below_a_probe_is_refused() -> None:
    tree = Tree([3, 11, 5], [-1, 0, 1], probes=frozenset({1}))
    with pytest.raises(ConfigError, match="below probe 1"):
        tree.check(context([3]), VOCABULARY)


def test_the_placeholder_is_never_said() -> None:
    logits = model().finish(torch.zeros(2, VOCABULARY))
    assert (logits[:, PLACEHOLDER] == -torch.inf).all()
    assert torch.isfinite(model(None).finish(torch.zeros(2, VOCABULARY))).all()
    with pytest.raises(ConfigError, match="below the vocabulary of 12"):
        replace(model().config, placeholder=12)


def test_a_model_that_was_not_tuned_is_refused_with_the_command_that_tunes_it() -> None:
    with pytest.raises(IncompatibleError, match="plait train lud"):
        LUD().for_model(model(None))
    with pytest.raises(IncompatibleError, match="no use for a draft model"):
        LUD().for_model(model(), model())
    for text in ("lud:pads=0", "lud:beta=0", "lud:mode=fast"):
        with pytest.raises(ConfigError, match="LUD"):
            SPECULATORS.parse(text)
