"""Every mixer: parallel, in chunks, step by step, packed, and in a hybrid model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.errors import ConfigError, IncompatibleError
from plait.memory import Everything, LinearState, Memory, MemoryPlan, Past, Rows, State, Tree
from plait.nn import (
    BlockConfig,
    FeedForwardConfig,
    MixerConfig,
    NormConfig,
    RandomParameters,
    Transformer,
    TransformerConfig,
)
from plait.nn.config import MIXERS
from plait.nn.mixers import AttentionConfig, LinearAttention, LinearAttentionConfig, Mixer
from plait.nn.mixers.linear_attention import (
    FeatureMap,
    Tokens,
    chunk,
    features,
    fold,
    num_features,
    parallel,
    step,
)
from plait.nn.rotary import RopeConfig
from plait.weights import Linear

WIDTH = 24
# Sums of float64 products over a thousand tokens.
DOUBLE_TOLERANCE = 1e-10
# The same in fp32, relative to the largest output.
SINGLE_TOLERANCE = 2e-4
# A few layers of fp32 sums.
MODEL_TOLERANCE = 1e-4

FORMS_OF_MIXERS: list[MixerConfig] = [
    AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, rope=RopeConfig(dim=8)),
    AttentionConfig(num_heads=3, num_kv_heads=3, head_dim=8, window=5, qk_norm=True),
    LinearAttentionConfig(num_heads=3, head_dim=8),
    LinearAttentionConfig(num_heads=2, head_dim=6, key_dim=4, feature_map="taylor"),
    LinearAttentionConfig(num_heads=2, head_dim=5, feature_map="relu", decay="lightning"),
    LinearAttentionConfig(
        num_heads=4, head_dim=6, feature_map="identity", decay="retnet", normaliser="rms", gate="silu"
    ),
    LinearAttentionConfig(
        num_heads=2, head_dim=6, feature_map="silu", decay="lightning", normaliser="rms", gate="sigmoid"
    ),
]
LINEAR = [config for config in FORMS_OF_MIXERS if isinstance(config, LinearAttentionConfig)]
DECAYS = [[0.0, 0.0], [-0.03, -1.5], [-1e-3, 0.0]]

every_mixer = pytest.mark.parametrize("config", FORMS_OF_MIXERS, ids=str)
every_linear = pytest.mark.parametrize("config", LINEAR, ids=str)


def built(config: MixerConfig) -> Mixer:
    return config.build(WIDTH, NormConfig(), RandomParameters(seed=1))


def random_tokens(length: int, dtype: torch.dtype, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, length, size, dtype=torch.float64, generator=generator) for size in (5, 5, 7))
    return Tokens(q.to(dtype), k.to(dtype), v.to(dtype))


def token_by_token(tokens: Tokens, sums: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, in float64."""
    q, k, v, sums = (tensor.double() for tensor in (*tokens, sums))
    outs = []
    for t in range(q.shape[1]):
        decayed = sums * log_decay.double().exp()[:, None, None]
        sums = decayed + torch.einsum("hf,hv->hfv", k[:, t], v[:, t])
        outs.append(torch.einsum("hf,hfv->hv", q[:, t], sums))
    return torch.stack(outs, dim=1), sums


def stepped(tokens: Tokens, sums: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    outs = []
    for t in range(tokens.q.shape[1]):
        out, sums = step(Tokens(*(part[:, t : t + 1] for part in tokens)), sums, log_decay)
        outs.append(out)
    return torch.cat(outs, dim=1), sums


@pytest.mark.parametrize("log_decay", DECAYS, ids=str)
@pytest.mark.parametrize("has_past", [False, True])
@pytest.mark.parametrize("length", [1, 2, 70])
def test_all_forms_equal_the_recurrence(log_decay: list[float], has_past: bool, length: int) -> None:
    tokens, decay = random_tokens(length, torch.float64), torch.tensor(log_decay, dtype=torch.float64)
    before = torch.randn(2, 5, 7, dtype=torch.float64) * has_past
    wanted, after = token_by_token(tokens, before, decay)

    def check(given_: Tensor, other: Tensor) -> None:
        torch.testing.assert_close(given_, other, atol=DOUBLE_TOLERANCE, rtol=DOUBLE_TOLERANCE)

    check(parallel(tokens, before, decay), wanted)
    check(fold(tokens, before, decay), after)
    for form in (stepped(tokens, before, decay), chunk(tokens, before, decay)):
        check(form[0], wanted)
        check(form[1], after)
    for size in range(1, length + 2):
        out, sums = chunk(tokens, before, decay, size)
        check(out, wanted)
        check(sums, after)


@pytest.mark.parametrize("log_decay", DECAYS, ids=str)
def test_forms_agree_in_fp32_over_a_thousand_tokens(log_decay: list[float]) -> None:
    tokens, decay = random_tokens(1000, torch.float32), torch.tensor(log_decay)
    before = torch.randn(2, 5, 7)
    wanted, after = token_by_token(tokens, before, decay)
    assert torch.equal(chunk(tokens, before, decay)[0], chunk(tokens, before, decay, 64)[0])
    forms = [
        (parallel(tokens, before, decay), fold(tokens, before, decay)),
        stepped(tokens, before, decay),
        *(chunk(tokens, before, decay, size) for size in (1, 16, 64, 999, 2000)),
    ]
    for out, sums in forms:
        assert out.dtype == sums.dtype == torch.float32
        assert (out - wanted).abs().max() <= SINGLE_TOLERANCE * wanted.abs().max()
        assert (sums - after).abs().max() <= SINGLE_TOLERANCE * after.abs().max()


def test_strong_decay_over_a_long_run_gives_no_nan() -> None:
    tokens, decay = random_tokens(1500, torch.float32), torch.tensor([-30.0, -0.5])
    out = parallel(tokens, torch.randn(2, 5, 7), decay)
    assert out.isfinite().all()


def test_no_token_leaves_the_state_as_it_is() -> None:
    tokens, before = random_tokens(0, torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    decay = torch.tensor([-0.5, 0.0], dtype=torch.float64)
    out, after = chunk(tokens, before, decay)
    assert out.shape == (2, 0, 7)
    assert torch.equal(after, before)
    assert torch.equal(fold(tokens, before, decay), before)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(cuts=st.lists(st.integers(0, 40), max_size=5), index=st.integers(0, len(LINEAR) - 1))
def test_summaries_of_consecutive_runs_compose_to_that_of_the_whole(cuts: list[int], index: int) -> None:
    mixer = built(LINEAR[index]).double()
    assert isinstance(mixer, LinearAttention)
    tokens = mixer.project(torch.randn(40, WIDTH, dtype=torch.float64))
    bounds = [0, *sorted(cuts), 40]
    composed = LinearState.empty(mixer.log_decay, mixer.num_features, mixer.value_size)
    for low, high in zip(bounds, bounds[1:], strict=False):  # noqa: RUF007
        composed = composed.compose(mixer.summary(Tokens(*(part[:, low:high] for part in tokens))))
    whole = mixer.summary(tokens)
    assert len(composed) == len(whole) == 40
    torch.testing.assert_close(composed.sums, whole.sums, atol=DOUBLE_TOLERANCE, rtol=DOUBLE_TOLERANCE)


def test_gradients_of_the_parallel_and_chunk_forms_are_exact() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((2, 7, 3), (2, 7, 3), (2, 7, 2), (2, 3, 2))
    ]
    decay = torch.tensor([-0.2, 0.0], dtype=torch.float64)

    def in_parallel(q: Tensor, k: Tensor, v: Tensor, sums: Tensor) -> Tensor:
        return parallel(Tokens(q, k, v), sums, decay)

    def in_chunks(q: Tensor, k: Tensor, v: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        return chunk(Tokens(q, k, v), sums, decay, 3)

    assert torch.autograd.gradcheck(in_parallel, inputs)
    assert torch.autograd.gradcheck(in_chunks, inputs)


def test_taylor_features_give_the_second_order_exponential() -> None:
    x, y = torch.randn(50, 6, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64)
    z = (x * y).sum(-1) / 6**0.5
    inner = (features(x, "taylor") * features(y, "taylor")).sum(-1)
    torch.testing.assert_close(inner, 1 + z + z**2 / 2, atol=1e-12, rtol=1e-12)
    assert (features(x, "taylor") @ features(y, "taylor").T).min() >= 0.5


@pytest.mark.parametrize("feature_map", ["elu", "relu", "taylor", "silu", "identity"])
def test_feature_rows_have_the_stated_size(feature_map: FeatureMap) -> None:
    assert features(torch.randn(2, 3, 6), feature_map).shape == (2, 3, num_features(6, feature_map))


def test_feature_maps_equal_their_formulas() -> None:
    x = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
    e = torch.exp(torch.tensor(-2.0, dtype=torch.float64)).item()
    wanted = {"elu": [e, 1.0, 4.0], "relu": [0.0, 0.0, 3.0], "identity": [-2.0, 0.0, 3.0]}
    for name, values in wanted.items():
        torch.testing.assert_close(features(x, name), torch.tensor(values, dtype=torch.float64))  # type: ignore[arg-type]


@pytest.mark.parametrize("feature_map", ["elu", "relu", "taylor"])
@pytest.mark.parametrize("decay", ["none", "retnet", "lightning"])
def test_weights_that_are_divided_by_their_sum_average_the_values(feature_map: str, decay: str) -> None:
    mixer = built(
        LinearAttentionConfig(num_heads=2, head_dim=4, feature_map=feature_map, decay=decay)  # type: ignore[arg-type]
    )
    assert isinstance(mixer, LinearAttention)
    tokens = mixer.project(torch.randn(90, WIDTH))
    # The last column of the values is the one that sums the weights.
    same = torch.ones_like(tokens.v) * torch.tensor([3.0, -1.0, 0.5, 2.0, 1.0])
    out, _ = chunk(tokens._replace(v=same), torch.zeros(2, mixer.num_features, 5), mixer.log_decay)
    weights = out[..., -1]
    sees_something = weights > 1e-3
    assert sees_something.float().mean() > 0.9
    mixed = mixer._finished(out, torch.zeros(90, WIDTH)).view(90, 2, 4).transpose(0, 1)
    wanted = torch.tensor([3.0, -1.0, 0.5, 2.0]).expand_as(mixed)
    torch.testing.assert_close(mixed[sees_something], wanted[sees_something], atol=1e-2, rtol=0)


def test_queries_without_a_feature_answer_zero() -> None:
    mixer = built(LinearAttentionConfig(num_heads=1, head_dim=4, feature_map="relu"))
    assert isinstance(mixer, LinearAttention)
    mixed = mixer._finished(torch.zeros(1, 3, 5), torch.zeros(3, WIDTH))
    assert torch.equal(mixed, torch.zeros(3, 4))


@every_linear
def test_a_layer_equals_its_formulas_in_float64(config: LinearAttentionConfig) -> None:
    mixer, x = built(config), torch.randn(20, WIDTH)
    assert isinstance(mixer, LinearAttention)
    heads, size = config.num_heads, config.head_dim
    key_size = config.key_dim or size

    def project(linear: Linear | None, start: int, stop: int) -> Tensor:
        assert linear is not None
        return (x.double() @ linear.weight.unpack()[start:stop].double().T).view(20, heads, -1)

    split = heads * key_size
    q, k = project(mixer.qkv, 0, split), project(mixer.qkv, split, 2 * split)
    v = project(mixer.qkv, 2 * split, 2 * split + heads * size)
    q, k = features(q, config.feature_map), features(k, config.feature_map)
    distance = torch.arange(20)[:, None] - torch.arange(20)
    mixed = torch.zeros(20, heads, size, dtype=torch.float64)
    for head in range(heads):
        decay = config.log_decay()[head].double().exp() ** distance.clamp(min=0)
        weights = (q[:, head] @ k[:, head].T) * decay * (distance >= 0)
        if config.normaliser == "sum":
            weights = weights / (weights.sum(1, keepdim=True) + 1e-6)
        mixed[:, head] = weights @ v[:, head]
    if config.normaliser == "rms":
        mixed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    if config.gate != "none":
        gate = project(mixer.gate, 0, heads * size)
        mixed = mixed * gate.sigmoid() * (gate if config.gate == "silu" else 1)
    wanted = mixed.reshape(20, -1) @ mixer.output.weight.unpack().double().T
    given_ = mixer(x, Rows([(20, 0)])).double()
    torch.testing.assert_close(given_, wanted, atol=MODEL_TOLERANCE, rtol=MODEL_TOLERANCE)


def test_decays_are_those_of_the_papers() -> None:
    def decay(kind: str, heads: int) -> list[float]:
        config = LinearAttentionConfig(num_heads=heads, head_dim=4, decay=kind)  # type: ignore[arg-type]
        return config.log_decay().double().exp().tolist()

    assert decay("none", 2) == [1.0, 1.0]
    assert decay("retnet", 3) == pytest.approx([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128], abs=1e-7)
    slopes = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]
    assert decay("lightning", 4) == pytest.approx([2.718281828459045**-s for s in slopes], abs=1e-7)


@pytest.mark.parametrize("feature_map", ["silu", "identity"])
def test_signed_weights_cannot_be_divided_by_their_sum(feature_map: str) -> None:
    with pytest.raises(
        ConfigError, match=f"cannot divide by the signed weights of feature_map '{feature_map}'"
    ):
        LinearAttentionConfig(num_heads=2, head_dim=4, feature_map=feature_map)  # type: ignore[arg-type]


def test_every_registered_mixer_is_tested() -> None:
    assert {config.name for config in FORMS_OF_MIXERS} == set(MIXERS.names())


@every_mixer
def test_a_configuration_survives_json(config: MixerConfig) -> None:
    assert MixerConfig.from_json(config.to_json()) == config


def mixed_in_parts(mixer: Mixer, x: Tensor, cuts: Sequence[int]) -> tuple[Tensor, Memory | State]:
    past = mixer.new_memory(MemoryPlan())
    outs = []
    bounds = [0, *cuts, x.shape[0]]
    with torch.no_grad():
        for low, high in zip(bounds, bounds[1:], strict=False):  # noqa: RUF007
            outs.append(mixer(x[low:high], Rows([(high - low, low)]), [past]))
            past.commit()
    return torch.cat(outs), past


@every_mixer
@pytest.mark.parametrize("cuts", [[], [1], [30, 31, 32, 33], [5, 70, 140], range(1, 150)], ids=str)
def test_a_past_in_parts_equals_the_parallel_form(config: MixerConfig, cuts: Sequence[int]) -> None:
    mixer, x = built(config), torch.randn(150, WIDTH)
    wanted = mixer(x, Rows([(150, 0)]))
    given_, past = mixed_in_parts(mixer, x, cuts)
    torch.testing.assert_close(given_, wanted, atol=MODEL_TOLERANCE, rtol=MODEL_TOLERANCE)
    assert len(past) == 150


@every_mixer
def test_packed_segments_do_not_know_of_each_other(config: MixerConfig) -> None:
    mixer, sizes = built(config), [(7, 30), (1, 4), (70, 0), (3, 9), (1, 0)]
    pasts = [mixer.new_memory(MemoryPlan()) for _ in sizes]
    before = [torch.randn(past, WIDTH) for _, past in sizes]
    x = torch.randn(sum(new for new, _ in sizes), WIDTH)
    with torch.no_grad():
        for past, rows_before in zip(pasts, before, strict=True):
            if len(rows_before):
                mixer(rows_before, Rows([(len(rows_before), 0)]), [past])
            past.commit()
        twins = [past.fork() for past in pasts]
        rows = Rows(sizes)
        together = mixer(x, rows, pasts)
        in_parallel = mixer(x, Rows([(new, 0) for new, _ in sizes]))
        for segment, twin in zip(rows.segments, twins, strict=True):
            alone = mixer(x[segment.rows], Rows([(segment.length, segment.position)]), [twin])
            torch.testing.assert_close(together[segment.rows], alone, atol=1e-5, rtol=1e-5)
            alone = mixer(x[segment.rows], Rows([(segment.length, 0)]))
            torch.testing.assert_close(in_parallel[segment.rows], alone, atol=1e-5, rtol=1e-5)


@every_mixer
def test_later_rows_and_other_segments_change_no_bit(config: MixerConfig) -> None:
    mixer, x = built(config), torch.randn(40, WIDTH)
    changed = x.clone()
    changed[25:] = torch.randn(15, WIDTH)
    rows = Rows([(30, 0), (10, 0)])
    with torch.no_grad():
        assert torch.equal(mixer(x, rows)[:25], mixer(changed, rows)[:25])
        other = x.clone()
        other[30:] = 100.0
        assert torch.equal(mixer(x, rows)[:30], mixer(other, rows)[:30])


@every_mixer
def test_no_row_gives_no_row(config: MixerConfig) -> None:
    mixer = built(config)
    assert mixer(torch.zeros(0, WIDTH), Rows([])).shape == (0, WIDTH)
    past = mixer.new_memory(MemoryPlan())
    assert mixer(torch.zeros(0, WIDTH), Rows([(0, 0)]), [past]).shape == (0, WIDTH)
    assert len(past) == 0


@every_mixer
def test_a_fork_of_a_past_is_independent(config: MixerConfig) -> None:
    mixer, x = built(config), torch.randn(60, WIDTH)
    _, past = mixed_in_parts(mixer, x[:40], [])
    twin = past.fork()
    wanted = mixer(x, Rows([(60, 0)]))[40:]
    with torch.no_grad():
        mixer(torch.randn(11, WIDTH), Rows([(11, 40)]), [past])
        given_ = mixer(x[40:], Rows([(20, 40)]), [twin])
    torch.testing.assert_close(given_, wanted, atol=MODEL_TOLERANCE, rtol=MODEL_TOLERANCE)
    assert (len(past), len(twin)) == (51, 60)


@every_mixer
def test_gradients_reach_every_parameter_and_row(config: MixerConfig) -> None:
    mixer, x = built(config), torch.randn(100, WIDTH, requires_grad=True)
    mixer(x, Rows([(90, 0), (10, 0)])).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    assert x.grad is not None
    assert (x.grad.abs().amax(dim=1) > 0).all()


@every_mixer
def test_rows_that_do_not_continue_their_past_are_refused(config: MixerConfig) -> None:
    mixer = built(config)
    past = mixer.new_memory(MemoryPlan())
    with pytest.raises(ConfigError, match=r"Segment 0 starts at position 4, but its past holds 0 tokens"):
        mixer(torch.randn(2, WIDTH), Rows([(2, 4)]), [past])
    with pytest.raises(ConfigError, match=r"Each segment needs one past. Got 1 for 2 segments"):
        mixer(torch.randn(2, WIDTH), Rows([(1, 0), (1, 0)]), [past])
    assert len(past) == 0


@every_linear
@pytest.mark.parametrize("mask", [Tree([-1, 0, 0]), Everything()], ids=["Tree", "Everything"])
def test_a_recurrence_follows_no_other_mask_than_causal(
    config: LinearAttentionConfig, mask: Tree | Everything
) -> None:
    mixer = built(config)
    past = mixer.new_memory(MemoryPlan())
    kind = type(mask).__name__
    for pasts in (None, [past]):
        with pytest.raises(IncompatibleError, match=f"linear-attention reads .* cannot follow a {kind} mask"):
            mixer(torch.randn(3, WIDTH), Rows([(3, 0, mask)]), pasts)
    assert len(past) == 0


@every_linear
def test_a_state_takes_constant_bytes(config: LinearAttentionConfig) -> None:
    mixer = built(config)
    _, short = mixed_in_parts(mixer, torch.randn(1, WIDTH), [])
    _, long = mixed_in_parts(mixer, torch.randn(300, WIDTH), [100])
    heads, key_dim = config.num_heads, config.key_dim or config.head_dim
    columns = config.head_dim + (config.normaliser == "sum")
    assert short.nbytes() == long.nbytes() == heads * num_features(key_dim, config.feature_map) * columns * 4


def test_state_of_retnet_forgets_faster_in_the_first_head() -> None:
    mixer = built(
        LinearAttentionConfig(
            num_heads=2, head_dim=4, feature_map="identity", decay="retnet", normaliser="rms"
        )
    )
    assert isinstance(mixer, LinearAttention)
    state = LinearState(mixer.log_decay, torch.ones(2, 4, 4), 0)
    nothing = LinearState(mixer.log_decay, torch.zeros(2, 4, 4), 32)
    first, second = state.compose(nothing).sums.mean(dim=(1, 2)).tolist()
    assert first == pytest.approx((1 - 1 / 32) ** 32, rel=1e-5)
    assert second == pytest.approx((1 - 1 / 64) ** 32, rel=1e-5)


def hybrid(*mixers: MixerConfig) -> Transformer:
    blocks = tuple(BlockConfig(mixer=mixer, feed_forward=FeedForwardConfig(size=32)) for mixer in mixers)
    config = TransformerConfig(
        family="hybrid", vocab_size=61, width=WIDTH, blocks=blocks, norm=NormConfig(), max_positions=512
    )
    return Transformer(config, RandomParameters(seed=2))


@pytest.mark.parametrize("memory", ["full", "window:size=400", "dense:dtype=fp32,window:size=200,sinks=2"])
def test_a_hybrid_prefilled_in_chunks_and_decoded_equals_its_parallel_form(memory: str) -> None:
    model = hybrid(*FORMS_OF_MIXERS)
    ids = torch.randint(0, 61, (170,))
    with torch.no_grad():
        wanted = model.logits(model(ids, Rows([(170, 0)])))
        past = model.new_past(MemoryPlan.parse(memory))
        outs = []
        for low, high in [(0, 64), (64, 100), *((i, i + 1) for i in range(100, 170))]:
            outs.append(model(ids[low:high], Rows([(high - low, low)]), [past]))
            past.commit()
        given_ = model.logits(torch.cat(outs))
    torch.testing.assert_close(given_, wanted, atol=1e-3, rtol=1e-3)
    assert len(past) == 170


def test_sequences_of_a_hybrid_are_decoded_together_as_alone() -> None:
    model, plan = hybrid(*FORMS_OF_MIXERS[1:4]), MemoryPlan()
    prompts = [torch.randint(0, 61, (n,)) for n in (5, 40, 1)]
    with torch.no_grad():
        pasts = [model.new_past(plan) for _ in prompts]
        packed = Rows([(len(prompt), 0) for prompt in prompts])
        model(torch.cat(prompts), packed, pasts)
        for past in pasts:
            past.commit()
        new = torch.tensor([1, 2, 3])
        rows = Rows([(1, len(prompt)) for prompt in prompts])
        together = model(new, rows, pasts)
        for i, prompt in enumerate(prompts):
            whole = model(torch.cat([prompt, new[i : i + 1]]), Rows([(len(prompt) + 1, 0)]))
            torch.testing.assert_close(together[i], whole[-1], atol=MODEL_TOLERANCE, rtol=MODEL_TOLERANCE)


def test_a_refused_call_changes_no_block_of_a_hybrid() -> None:
    model = hybrid(*FORMS_OF_MIXERS[:3])
    past = model.new_past(MemoryPlan())
    with torch.no_grad():
        model(torch.arange(10), Rows([(10, 0)]), [past])
        past.commit()
        model(torch.arange(4), Rows([(4, 10)]), [past])
        with pytest.raises(IncompatibleError, match="linear-attention"):
            past.commit([0, 1])
        with pytest.raises(IncompatibleError, match="linear-attention"):
            past.truncate(5)
        assert [len(layer) for layer in past.layers] == [14, 14, 14]
        past.commit()
        wanted = model(torch.cat([torch.arange(10), torch.arange(4), torch.tensor([7])]), Rows([(15, 0)]))[-1]
        given_ = model(torch.tensor([7]), Rows([(1, 14)]), [past])[0]
    torch.testing.assert_close(given_, wanted, atol=MODEL_TOLERANCE, rtol=MODEL_TOLERANCE)


def test_a_hybrid_that_fails_in_the_middle_goes_back_to_its_last_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = hybrid(FORMS_OF_MIXERS[2], FORMS_OF_MIXERS[0], FORMS_OF_MIXERS[3])
    past: Past = model.new_past(MemoryPlan())
    ids = torch.randint(0, 61, (20,))
    with torch.no_grad():
        model(ids, Rows([(20, 0)]), [past])
        past.commit()

        def fails(*_: object) -> Tensor:
            raise RuntimeError("interrupted")

        with monkeypatch.context() as patch:
            patch.setattr(LinearAttention, "_finished", fails)
            with pytest.raises(RuntimeError, match="interrupted"):
                model(ids, Rows([(20, 20)]), [past])
        assert [len(layer) for layer in past.layers] == [40, 20, 20]
        past.truncate(20)
        given_ = model(ids[:1], Rows([(1, 20)]), [past])
        wanted = model(torch.cat([ids, ids[:1]]), Rows([(21, 0)]))[-1:]
    torch.testing.assert_close(given_, wanted, atol=MODEL_TOLERANCE, rtol=MODEL_TOLERANCE)


def test_tokens_and_rows_must_pair_up() -> None:
    model = hybrid(FORMS_OF_MIXERS[2])
    with pytest.raises(ConfigError, match=r"Each token needs one row. Got 3 for 1 rows"):
        model(torch.arange(3), Rows([(1, 0)]))
