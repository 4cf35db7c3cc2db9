"""Binarisation methods against their formulas, and packed layers against those that were trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from plait.errors import ConfigError, IncompatibleError, UnknownNameError
from plait.weights import PACKED_KINDS
from plait.weights.binary import (
    BINARIZERS,
    BNN,
    FDA,
    XNOR,
    BinaryLayer,
    BinaryMatrix,
    DoReFa,
    PackedBinary,
    Place,
    ReAct,
    ReCU,
    XNORpp,
    begin_epoch,
    binarize,
    binary_layers,
    export,
)
from plait.weights.binary.fda import FDARule
from plait.weights.binary.recu import ReCURule

METHODS = sorted(BINARIZERS.methods)
# fp32 sums of some hundred terms in another order.
TOLERANCE = 2e-5
Numbers = np.ndarray


def trained(model: nn.Module, method: str, seed: int = 0) -> nn.Module:
    """A binarised model in its last epoch, whose learned numbers are anything."""
    generator = torch.Generator().manual_seed(seed)
    binarize(model, BINARIZERS.parse(method), skip=[])
    begin_epoch(model, 4, 5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of which many are 0, and many the same."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 2).round() / 4


def sign(x: Numbers) -> Numbers:
    return np.where(x >= 0, 1.0, -1.0)


def scaled(w: Numbers, a: Numbers, extra: dict[str, Numbers]) -> Numbers:
    return sign(a) @ (np.abs(w).mean(1, keepdims=True) * sign(w)).T


def xnor(w: Numbers, a: Numbers, extra: dict[str, Numbers]) -> Numbers:
    w = w - w.mean(1, keepdims=True)
    return np.abs(a).mean(1, keepdims=True) * scaled(w, a, extra)


def recu(w: Numbers, a: Numbers, extra: dict[str, Numbers]) -> Numbers:
    return extra["alpha"] * (sign(a) @ sign(w - w.mean(1, keepdims=True)).T)


LINEAR: dict[str, Callable[[Numbers, Numbers, dict[str, Numbers]], Numbers]] = {
    "bnn": lambda w, a, extra: sign(a) @ sign(w).T,
    "xnor": xnor,
    "dorefa": scaled,
    "bireal": scaled,
    "xnorpp": lambda w, a, extra: extra["channels"] * (sign(a) @ sign(w).T),
    "react": lambda w, a, extra: scaled(w, a + extra["threshold"], extra),
    "recu": recu,
    "fda": scaled,
}


def test_the_eight_methods_of_the_benchmark_are_there() -> None:
    assert set(METHODS) == set(LINEAR)
    with pytest.raises(UnknownNameError, match="bireal, bnn, dorefa, fda, react, recu, xnor, xnorpp"):
        BINARIZERS.parse("reactt")


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_layer_is_its_formula(method: str) -> None:
    """Against a few lines of numpy, with zeros and ties."""
    model = trained(nn.Sequential(nn.Linear(13, 6)), method)
    layer = model[0]
    with torch.no_grad():
        layer.weight.copy_(numbers(6, 13, seed=3))
        layer.weight[0] = 0
    x = numbers(5, 13, seed=4)
    x[0] = 0
    extra = {name: p.detach().double().numpy() for name, p in layer.rule.named_parameters()}
    wanted = LINEAR[method](layer.weight.detach().double().numpy(), x.double().numpy(), extra)
    wanted = wanted + layer.bias.detach().double().numpy()
    np.testing.assert_allclose(layer(x).detach().numpy(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_closed_forms(method: str) -> None:
    """On 1,001 points: of inputs, and of weights in rows whose other numbers are fixed."""
    v = torch.linspace(-2, 2, 1001)
    terms = 9 + int(0.8 * 9)
    series = 0.4 / math.pi * sum(torch.cos((2 * i + 1) * 0.1 * v) for i in range(terms + 1))
    clip, hat = (v.abs() <= 1).float(), (2 - 2 * v.abs()).clamp(min=0)
    of_inputs = {"bireal": hat, "react": hat, "recu": hat, "fda": series * clip}.get(method, clip)
    of_weights = {"recu": torch.ones(1001), "fda": series * clip}.get(method, clip)
    rule = BINARIZERS.parse(method).rule_at(Place(1, 1001, 1, 0)).eval()
    rule.begin_epoch(4, 5)
    a = v.clone().requires_grad_()
    rule.inputs(a).sum().backward()
    assert a.grad is not None
    torch.testing.assert_close(a.grad, of_inputs, rtol=0, atol=1e-6)

    w = v.clone()[None].requires_grad_()
    upstream = torch.randn(1, 1001, generator=torch.Generator().manual_seed(0))
    scale = rule.scale(w)
    (rule.weights(w) * upstream * (1 if scale is None else scale[:, None])).sum().backward()
    assert w.grad is not None
    if method in ("xnor", "recu"):
        # What comes before the sign is differentiated by torch itself.
        u = v.clone()[None].requires_grad_()
        centred = u - u.mean(dim=1, keepdim=True)
        if method == "recu":
            centred = 2 * math.sqrt(2) * centred / (centred.var(dim=1, keepdim=True) + 1e-5).sqrt()
            limit = -centred.detach().abs().mean() * math.log(2 - 2 * rule.tau)
            inner = centred.clamp(-limit, limit)
        else:
            inner = centred.detach().abs().mean() * centred
            upstream = upstream * clip
        (inner * upstream).sum().backward()
        assert u.grad is not None
        torch.testing.assert_close(w.grad, u.grad, rtol=0, atol=1e-6)
    else:
        size = 1.0 if method in ("bnn", "xnorpp") else v.abs().mean()
        torch.testing.assert_close(w.grad, size * of_weights[None] * upstream, rtol=0, atol=1e-6)


def small_network(kind: str) -> tuple[nn.Module, Tensor]:
    """Layers of one kind with odd sizes, and inputs with zeros."""
    if kind == "linear":
        return nn.Sequential(nn.Linear(70, 33), nn.BatchNorm1d(33), nn.Linear(33, 5, bias=False)), numbers(
            9, 70
        )
    if kind == "conv1d":
        layers = [
            nn.Conv1d(3, 70, 3, padding="same"),
            nn.BatchNorm1d(70),
            nn.Conv1d(70, 5, 4, 2, 3, dilation=2),
        ]
        return nn.Sequential(*layers), numbers(4, 3, 11)
    layers = [
        nn.Conv2d(2, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.Conv2d(12, 7, (3, 2), 2, (1, 0), bias=False),
    ]
    return nn.Sequential(*layers), numbers(3, 2, 9, 7)


@pytest.mark.parametrize("binary_inputs", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
@pytest.mark.parametrize("method", METHODS)
def test_a_packed_network_answers_as_the_trained_one(method: str, kind: str, binary_inputs: bool) -> None:
    torch.manual_seed(1)
    network, x = small_network(kind)
    model = trained(network, method if binary_inputs else f"{method}:binary_inputs=false")
    with torch.no_grad():
        wanted = model(x)
        packed = export(model)
        found = packed(x)
    assert not binary_layers(packed)
    assert len([m for m in packed.modules() if isinstance(m, PackedBinary)]) == 2
    if binary_inputs:
        assert torch.equal(found, wanted)
    torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE * float(wanted.abs().max()))
    # The trained one is as it was.
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_and_is_the_same_with_a_seed(method: str) -> None:
    def losses() -> list[float]:
        torch.manual_seed(2)
        model = nn.Sequential(
            nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 2)
        )
        assert binarize(model, BINARIZERS.parse(method)) == ["2"]
        x = torch.randn(256, 8)
        y = (x[:, :2].prod(dim=1) > 0).long()
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        found = []
        for epoch in range(30):
            begin_epoch(model, epoch, 30)
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        assert all(
            p.grad is not None and torch.isfinite(p.grad).all() for p in (model[2].weight, model[0].weight)
        )
        return found

    first = losses()
    assert first == losses()
    assert first[-1] < 0.75 * first[0]


def test_a_padded_place_is_one_bit() -> None:
    """A window over nothing but padding sees +1 everywhere, in training and packed."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1, padding=1, bias=False))
    binarize(model, BNN(), skip=[])
    corner = model[0].signs().sum(dim=1)
    x = -torch.ones(1, 3, 2, 2)
    assert torch.equal(model(x)[0, :, 0, 0], corner)
    assert torch.equal(export(model)(x)[0, :, 0, 0], corner)
    assert torch.equal(model(x)[0, :, 1, 1], -corner)


def test_schedules_of_recu_and_fda() -> None:
    rule = ReCU().rule_at(Place(4, 4, 1, 0))
    assert isinstance(rule, ReCURule)
    taus = []
    for epoch in range(100):
        rule.begin_epoch(epoch, 100)
        taus.append(rule.tau)
    assert taus[0] == pytest.approx(0.85)
    assert taus == sorted(taus)
    rule.begin_epoch(100, 100)
    assert rule.tau == pytest.approx(0.99)
    adapted = FDA().rule_at(Place(4, 4, 1, 0))
    assert isinstance(adapted, FDARule)
    for epoch, alpha, last in (
        (0, 0.05 * (1 + math.cos(math.pi / 10)), 9),
        (5, 0.05 * (1 + math.cos(0.6 * math.pi)), 13),
        (9, 0.0, 17),
    ):
        adapted.begin_epoch(epoch, 10)
        assert adapted.alpha == pytest.approx(alpha, abs=1e-15)
        assert adapted.last == last
    assert adapted.alpha == 0


def test_one_epoch_is_enough_for_every_schedule() -> None:
    for method in METHODS:
        model = nn.Sequential(nn.Linear(1, 3))
        binarize(model, BINARIZERS.parse(method), skip=[])
        begin_epoch(model, 0, 1)
        model.train()
        out = model(torch.randn(4, 1))
        out.sum().backward()
        assert torch.isfinite(out).all()
        assert torch.isfinite(model[0].weight.grad).all()
        export(model)


def test_an_adapter_of_fda_is_gone_after_the_last_epoch_and_not_before() -> None:
    model = nn.Sequential(nn.Linear(130, 6))
    binarize(model, FDA(), skip=[])
    begin_epoch(model, 1, 5)
    x = torch.randn(3, 130)
    plain = copy.deepcopy(model)
    plain[0].rule.alpha = 0.0
    assert not torch.allclose(model(x), plain(x), atol=1e-3)
    with pytest.raises(IncompatibleError, match=r"fda still adds .* Train to the last epoch"):
        export(model)
    begin_epoch(model, 4, 5)
    packed = export(model)
    torch.testing.assert_close(packed(x), model(x).detach(), rtol=1e-6, atol=1e-6)
    assert sum("of_" in name for name, _ in packed.named_parameters()) == 0
    assert sum("of_" in name for name, _ in model.named_parameters()) == 4


def test_recu_brings_weights_back_from_far_out() -> None:
    """Beyond the quantile no gradient moves a weight further; within it every one does."""
    rule = ReCU().rule_at(Place(1, 200, 1, 0))
    w = torch.cat([torch.linspace(-1, 1, 198), torch.tensor([-30.0, 30.0])])[None].requires_grad_()
    upstream = torch.randn(1, 200, generator=torch.Generator().manual_seed(1))
    (rule.weights(w) * upstream).sum().backward()
    # A single large upstream gradient of a clamped weight reaches nobody.
    again = w.detach().clone().requires_grad_()
    changed = upstream.clone()
    changed[0, -1] += 100
    (rule.weights(again) * changed).sum().backward()
    assert torch.equal(w.grad, again.grad)


def test_a_matrix_is_what_it_packs_and_comes_back_from_its_parts() -> None:
    for outputs, inputs, taps in ((1, 1, 1), (5, 65, 1), (20, 12, 9), (33, 64, 3)):
        signs = torch.where(numbers(outputs, inputs * taps, seed=taps) < 0, -1.0, 1.0)
        scales = torch.rand(outputs)
        weight = signs * scales[:, None]
        matrix = BinaryMatrix.of(signs, scales, taps)
        assert torch.equal(matrix.unpack(), weight)
        assert torch.equal(matrix.unpack_rows(torch.tensor([[0]])), weight[None, :1])
        assert torch.equal(matrix.select(torch.tensor([0])).unpack(), weight[:1])
        assert matrix.nbytes() == outputs * (taps * -(-inputs // 8) + 4)
        again = PACKED_KINDS["binary"].from_tensors(matrix.shape, matrix.settings(), matrix.tensors())
        assert torch.equal(again.unpack(), weight)
        x = torch.randn(4, inputs * taps)
        torch.testing.assert_close(matrix.matmul(x), x @ weight.T, rtol=TOLERANCE, atol=1e-4)


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    model = export(trained(nn.Sequential(nn.Linear(100, 40)), "xnor"))
    x = torch.randn(9, 100)
    whole = model(x)
    assert all(torch.equal(model(x[i : i + 1])[0], whole[i]) for i in range(9))


@pytest.mark.parametrize(
    ("parts", "settings", "message"),
    [
        ({"signs": torch.zeros(2, 1, 1, dtype=torch.uint8)}, {"taps": 1}, "not signs and scales"),
        (
            {"signs": torch.zeros(2, 1, 1, dtype=torch.uint8), "scales": torch.ones(2)},
            {"taps": "1"},
            "not signs and",
        ),
        ({"signs": torch.zeros(2, 1, 1, dtype=torch.uint8), "scales": torch.ones(2)}, {"taps": 3}, "3 taps"),
        (
            {"signs": torch.zeros(2, 1, 2, dtype=torch.uint8), "scales": torch.ones(2)},
            {"taps": 1},
            "its signs are",
        ),
        (
            {"signs": torch.zeros(2, 1, 1, dtype=torch.uint8), "scales": torch.ones(3)},
            {"taps": 1},
            "its scales are",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    parts: dict[str, Tensor], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        BinaryMatrix.from_tensors((2, 8), settings, parts)


def test_numbers_that_are_no_signs_are_no_binary_matrix() -> None:
    with pytest.raises(IncompatibleError, match="-1 or 1"):
        BinaryMatrix.of(torch.tensor([[1.0, -2.0]]))


def test_what_has_no_binary_form_is_refused_by_name_and_changes_nothing() -> None:
    def refused(bad: nn.Module, message: str) -> None:
        model = nn.Sequential(nn.Linear(2, 2), bad)
        with pytest.raises(IncompatibleError, match=message):
            binarize(model, BNN(), skip=[])
        assert isinstance(model[0], nn.Linear)
        assert not binary_layers(model)

    refused(nn.Conv2d(4, 4, 1, groups=2), "1 is a Conv2d in 2 groups")
    refused(nn.ConvTranspose2d(4, 4, 1), "1 is a ConvTranspose2d")
    refused(nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), "padding_mode='circular'")
    refused(nn.MultiheadAttention(4, 2), "1 is a MultiheadAttention")
    left = nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(4, 2))
    assert binarize(left, BNN(), skip=["1"]) == ["0"]


def test_first_and_last_stay_as_they_are_unless_told_otherwise() -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))

    assert binarize(model(), DoReFa()) == ["1"]
    assert binarize(model(), DoReFa(), skip=["1"]) == ["0", "3"]
    with pytest.raises(ConfigError, match=r"no layer 'head' to skip. It has 0, 1, 3"):
        binarize(model(), DoReFa(), skip=["head"])


def test_bad_input_says_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"needs inputs and outputs. Its weight has shape \(3, 0\)"):
        BinaryLayer(torch.zeros(3, 0), None, XNOR())
    with pytest.raises(ConfigError, match=r"counted from 0 to 4 here. Got 5"):
        begin_epoch(nn.Sequential(), 5, 5)
    with pytest.raises(IncompatibleError, match="no binary layer to pack"):
        export(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match="Put it into a model"):
        binarize(nn.Linear(2, 2), BNN(), skip=[])
    narrow = nn.Sequential(nn.Linear(70, 2))
    binarize(narrow, BNN(), skip=[])
    with pytest.raises(ConfigError, match=r"takes 70 inputs on axis -1. Got shape \(3, 100\)"):
        export(narrow)(torch.zeros(3, 100))
    wide = nn.Sequential(nn.Conv2d(1, 1, 1))
    binarize(wide, XNORpp(extent=3), skip=[])
    with pytest.raises(IncompatibleError, match="xnorpp:extent=5 or more"):
        wide(torch.zeros(1, 1, 3, 5))


def test_thresholds_of_react_act() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    binarize(model, ReAct(), skip=[])
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0]]))
        model[0].rule.threshold.copy_(torch.tensor([-0.5, 0.0]))
    x = torch.tensor([[0.25, 0.25]])
    assert model(x).item() == export(model)(x).item() == 0
