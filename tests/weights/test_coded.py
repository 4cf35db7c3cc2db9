"""Formats of few bits: tiles, values, sizes, and one contract that all of them keep."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import ConfigError
from plait.weights import AWQ, FORMATS, GPTQ, GRIDS, HQQ, NF4, BitMoD, Coded, DecoupleQ, Stats, Uniform
from plait.weights.tiles import from_tiles, to_tiles

# Every format, and the error that it may have on normal weights, relative to their standard deviation.
ENTRIES = [
    ("uniform:bits=2", 0.6),
    ("uniform:bits=3,group=40", 0.25),
    ("uniform:bits=4,group=0,symmetric=true", 0.25),
    ("uniform:bits=8", 0.01),
    ("bitmod:bits=3", 0.25),
    ("bitmod:bits=4,group=192", 0.12),
    ("bitmod:bits=3,types=none", 0.3),
    ("nf4", 0.12),
    ("nf4:group=40", 0.12),
    ("hqq:bits=3", 0.25),
    ("gptq:bits=3", 0.4),
    ("awq:bits=3", 0.25),
    ("awq:bits=4,grid=bitmod", 0.12),
    ("awq:bits=4,grid=nf4", 0.12),
    ("decoupleq:bits=2,epochs=0", 0.9),
    ("db-llm", 0.5),
    ("db-llm:start=nearest,group=40", 0.7),
    ("db-llm:start=calibrated", 0.9),
]
SPECS = [spec for spec, _ in ENTRIES]


def inputs(columns: int, seed: int = 0, rows: int = 400) -> torch.Tensor:
    """Activations whose columns hang together and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / math.sqrt(columns)
    sizes = 3 * torch.rand(columns, generator=generator) + 0.1
    return torch.randn(rows, columns, generator=generator) @ mixing * sizes


def stats_of(columns: int) -> Stats:
    stats = Stats(columns)
    stats.add(inputs(columns))
    return stats


def weights(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.integers(0, 40),
    columns=st.integers(1, 70),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_codes_come_back_from_tiles(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)
    tiles = to_tiles(codes, bits)
    assert tiles.shape == (-(-rows // 16), -(-columns // 32), 64 * bits)
    assert torch.equal(from_tiles(tiles, bits, torch.arange(rows), columns), codes)


@pytest.mark.parametrize(("spec", "bound"), ENTRIES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 65), (40, 192)])
def test_packing_is_close_and_takes_what_it_says(spec: str, bound: float, shape: tuple[int, int]) -> None:
    format, weight = FORMATS.parse(spec), weights(*shape)
    before = weight.clone()
    packed = format.pack(weight, stats_of(shape[1]))
    assert torch.equal(weight, before)
    error = (packed.unpack() - weight).square().mean().sqrt()
    # A group of a few weights is no sample of normal ones.
    assert float(error) <= bound * max(0.05, float(weight.abs().max()) / 3)
    assert format.bits_per_weight(shape) == pytest.approx(8 * packed.nbytes() / weight.numel())


@pytest.mark.parametrize("spec", SPECS)
def test_rows_products_selections_and_files_agree_with_unpack(spec: str) -> None:
    packed = FORMATS.parse(spec).pack(weights(37, 160), stats_of(160))
    assert isinstance(packed, Coded)
    dense = packed.unpack()
    ids = torch.tensor([[36, 0, 5], [17, 17, 31]])
    assert torch.equal(packed.unpack_rows(ids), dense[ids])
    assert torch.equal(packed.unpack_rows(slice(3, 30, 4)), dense[3:30:4])
    assert torch.equal(packed.select(torch.tensor([30, 2, 2])).unpack(), dense[[30, 2, 2]])
    again = Coded.from_tensors(packed.shape, packed.settings(), packed.tensors())
    assert torch.equal(again.unpack(), dense)
    packed.is_exact = True
    for batch in (0, 1, 2, 5, 33):
        x = torch.randn(batch, 160)
        torch.testing.assert_close(packed.matmul(x), x @ dense.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_rows_are_packed_alone_or_together_alike(spec: str) -> None:
    format, weight, stats = FORMATS.parse(spec), weights(5, 96), stats_of(96)
    together = format.pack(weight, stats).unpack()
    alone = torch.cat([format.pack(row[None], stats).unpack() for row in weight])
    torch.testing.assert_close(alone, together, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_constant_rows_are_kept(spec: str, value: float) -> None:
    weight = torch.full((3, 64), value)
    error = (FORMATS.parse(spec).pack(weight, stats_of(64)).unpack() - weight).abs().max()
    assert float(error) <= 0.004 * abs(value)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(spec: str, bad: float) -> None:
    weight = weights(4, 64)
    weight[2, 7] = bad
    with pytest.raises(ConfigError, match="NaN"):
        FORMATS.parse(spec).pack(weight, stats_of(64))


@pytest.mark.parametrize("spec", ["gptq", "decoupleq"])
def test_formats_that_look_at_inputs_ask_for_them(spec: str) -> None:
    with pytest.raises(ConfigError, match=f"{spec} needs calibration text"):
        FORMATS.parse(spec).pack(weights(4, 64))


@pytest.mark.parametrize("kind", ["uniform", "bitmod", "hqq", "gptq", "decoupleq"])
def test_more_bits_are_better(kind: str) -> None:
    weight, stats = weights(24, 128), stats_of(128)
    errors = []
    for bits in [3, 4] if kind == "bitmod" else [2, 3, 4, 8]:
        change = (FORMATS.parse(f"{kind}:bits={bits}").pack(weight, stats).unpack() - weight).double()
        errors.append(float(((change @ stats.hessian) * change).sum()))
    assert errors == sorted(errors, reverse=True)


# Rounding to nearest and BitMoD against their formulas.


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_uniform_takes_the_nearest_of_all_levels(bits: int, symmetric: bool) -> None:
    weight = weights(6, 100)
    packed = Uniform(bits=bits, group=48, symmetric=symmetric).pack(weight)
    for row in range(6):
        for start in range(0, 100, 48):
            group = weight[row, start : start + 48]
            if symmetric:
                top = 2 ** (bits - 1) - 1
                scale = (group.abs().max() / top).half().float()
                levels = scale * torch.arange(-top, top + 1)
            else:
                low, high = group.min().clamp(max=0), group.max().clamp(min=0)
                scale = ((high - low) / (2**bits - 1)).half().float()
                levels = scale * (torch.arange(2**bits) - (-low / scale + 0.5).floor())
                assert float(levels.abs().min()) == 0.0
            wanted = levels[(group[:, None] - levels).abs().argmin(dim=1)]
            torch.testing.assert_close(packed.unpack()[row, start : start + 48], wanted, rtol=1e-6, atol=1e-9)


def searched(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Brute force over four grids and all values, of rows of one group: least error, scale and number of the best grid."""
    basic = [0, 1, 2, 4] if bits == 3 else [0, 1, 2, 3, 4, 6, 8, 12]
    errors, scales = [], []
    for special in [3, -3, 6, -6] if bits == 3 else [10, -10, 16, -16]:
        values = torch.tensor(sorted({v * sign for v in basic for sign in (1, -1)} | {special})).float()
        scale = groups.abs().amax(dim=1) / values.abs().max()
        nearest = (groups[..., None] - values * scale[:, None, None]).abs().amin(dim=2)
        errors.append(nearest.square().mean(dim=1))
        scales.append(scale)
    best, number = errors[0].clone(), torch.zeros(len(groups), dtype=torch.int64)
    for other in range(1, 4):
        is_better = errors[other] < best * (1 - 1e-6)
        best, number = torch.where(is_better, errors[other], best), torch.where(is_better, other, number)
    return best, torch.stack(scales).gather(0, number[None])[0], number


@pytest.mark.parametrize("bits", [3, 4])
def test_bitmod_finds_the_grid_that_brute_force_finds(bits: int) -> None:
    count = 10_000
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(count, 32, generator=generator) * (
        10.0 ** torch.randint(-3, 3, (count, 1), generator=generator)
    )
    weight[0], weight[1] = torch.arange(32) - 16.0, torch.arange(32) % 5 * 0.5
    packed = BitMoD(bits=bits, group=32).pack(weight)
    error, scale, number = searched(weight, bits)
    assert packed.row_scales is not None
    assert torch.equal(packed.type_rows()[:, 0].long(), number)
    # One group a row: its scale is 255 steps of the row's.
    torch.testing.assert_close(packed.row_scales.reshape(-1)[:count] * 255, scale, rtol=1e-6, atol=0)
    found = (packed.unpack() - weight).square().mean(dim=1)
    torch.testing.assert_close(found, error, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("types", ["all", "er", "ea", "none"])
def test_bitmod_keeps_weights_whose_squares_no_number_holds(types: str) -> None:
    weight = weights(16, 64) * 1e25
    got = BitMoD(types=types).pack(weight).unpack()
    torch.testing.assert_close(got, weight, rtol=0, atol=0.26 * float(weight.abs().max()))
    assert float(torch.corrcoef(torch.stack([got.flatten(), weight.flatten()]) / 1e25)[0, 1]) > 0.98


@pytest.mark.parametrize("bits", [3, 4])
def test_bitmod_values_are_row_scale_times_step_times_table(bits: int) -> None:
    packed = BitMoD(bits=bits, group=48).pack(weights(20, 100))
    codes, types = packed.code_rows(), packed.type_rows()
    scales = packed.per_group(packed.scales)
    grid = GRIDS[f"bitmod{bits}"]
    for row, column in itertools.product(range(20), range(100)):
        group, code = column // 48, int(codes[row, column])
        value = grid.specials[int(types[row, group])] if code == 2**bits - 1 else grid.values[code]
        step = torch.tensor(float(int(scales[row, group]) * value))
        assert packed.unpack()[row, column] == step * packed.row_scales.reshape(-1)[row]


@given(seed=st.integers(0, 50), power=st.integers(-8, 8), bits=st.sampled_from([3, 4]))
@settings(max_examples=20, deadline=None)
def test_bitmod_scales_with_powers_of_two_and_mirrors(seed: int, power: int, bits: int) -> None:
    weight = weights(4, 128, seed)
    format = BitMoD(bits=bits)
    packed = format.pack(weight)
    assert torch.equal(format.pack(weight * 2.0**power).unpack(), packed.unpack() * 2.0**power)
    mirrored = format.pack(-weight)
    assert torch.equal(mirrored.unpack(), -packed.unpack())
    # Each grid's mirror image has the neighbouring number; groups without the special value say nothing.
    is_used = packed.code_rows().view(4, 2, 64).eq(2**bits - 1).any(dim=2)
    assert torch.equal((mirrored.type_rows() ^ 1)[is_used], packed.type_rows()[is_used])


@pytest.mark.parametrize("types", ["er", "ea", "none"])
def test_more_grids_to_choose_from_are_never_worse(types: str) -> None:
    weight = weights(64, 64)
    # One group a row, so that the rounding of scales to steps plays no part.
    errors = [
        (BitMoD(bits=3, types=choice).pack(weight).unpack() - weight).square().mean(dim=1)
        for choice in ("all", types)
    ]
    assert bool((errors[0] <= errors[1] * (1 + 1e-5)).all())


# The quantiles of appendix E of the QLoRA paper, as the bitsandbytes package publishes them.
PUBLISHED_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
# Levels are whole numbers up to 2112, and the published ones are rounded to them.
NF4_STEP = 1 / 2112


def test_nf4_has_the_published_levels_and_takes_the_nearest() -> None:
    values, published = torch.tensor(GRIDS["nf4"].values) * NF4_STEP, torch.tensor(PUBLISHED_NF4)
    assert float((values - published).abs().max()) <= NF4_STEP / 2
    # One group a row, so that its scale is its largest magnitude.
    weight = weights(50, 96)
    packed = NF4(group=0).pack(weight)
    largest = weight.abs().amax(dim=1, keepdim=True)
    nearest = published[(weight[..., None] / largest[..., None] - published).abs().argmin(dim=2)] * largest
    # A weight halfway between two levels may go to either, at the same distance.
    errors = [(found - weight).abs() / largest for found in (packed.unpack(), nearest)]
    assert float((errors[0] - errors[1]).abs().max()) <= NF4_STEP / 2 + 1e-6
    assert packed.code_rows().unique().tolist() == list(range(16))


def test_nf4_quantises_scales_to_steps_of_the_rows_largest() -> None:
    weight = weights(9, 200) * torch.linspace(0.1, 3.0, 200)
    packed = NF4(group=64).pack(weight)
    assert packed.row_scales is not None
    steps = packed.row_scales.reshape(-1)[:9, None]
    largest = torch.stack([part.abs().amax(dim=1) for part in weight.split(64, dim=1)], dim=1) * NF4_STEP
    torch.testing.assert_close(steps[:, 0] * 255, largest.amax(dim=1))
    assert torch.equal(packed.per_group(packed.scales).float(), (largest / steps).round())
    codes, values = packed.code_rows().long(), torch.tensor(GRIDS["nf4"].values).float()
    scales = packed.per_group(packed.scales).float().repeat_interleave(64, dim=1)[:, :200]
    assert torch.equal(packed.unpack(), values[codes] * scales * steps)


def test_nf4_fits_normal_weights_better_than_evenly_spaced_levels() -> None:
    weight = weights(64, 256)
    errors = [
        float((FORMATS.parse(spec).pack(weight).unpack() - weight).square().mean())
        for spec in ("nf4", "uniform:bits=4,symmetric=true", "bitmod:bits=4,types=none")
    ]
    assert errors[0] < min(errors[1:])


def test_hqq_lowers_the_error_that_it_is_about() -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(3)) ** 3 * 0.02
    fitted = (HQQ(bits=2, rounds=20).pack(weight).unpack() - weight).abs()
    unfitted = (HQQ(bits=2, rounds=1).pack(weight).unpack() - weight).abs()
    assert float(fitted.mean()) < float(unfitted.mean())


def test_awq_makes_columns_with_large_inputs_exacter() -> None:
    weight, stats = weights(32, 64), stats_of(64)
    format = AWQ(bits=3)
    factors = format.input_factors([weight], stats)
    assert factors is not None
    assert float(factors.min()) > 0

    def error(scale: torch.Tensor) -> float:
        change = (format.pack(weight * scale).unpack() / scale - weight).double()
        return float(((change @ stats.hessian) * change).sum())

    tried = [stats.mean_abs ** (step / 20) for step in range(20)]
    tried = [(f / (f.max() * f.min()).sqrt()).float() for f in tried]
    assert error(factors) == pytest.approx(min(error(f) for f in tried))
    assert error(factors) < error(torch.ones(64))


def test_bad_settings_name_what_is_allowed() -> None:
    for make, message in [
        (lambda: BitMoD(bits=5), "3 or 4"),
        (lambda: Uniform(bits=7), "2, 3, 4 or 8"),
        (lambda: NF4(group=-1), "group"),
        (lambda: GPTQ(damping=0.0), "damping"),
        (lambda: AWQ(bits=2, grid="bitmod"), "3 or 4 with grid=bitmod"),
        (lambda: DecoupleQ(rounds=0), "rounds"),
    ]:
        with pytest.raises(ConfigError, match=message):
            make()
