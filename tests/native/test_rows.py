"""Operations on single rows, products with dense matrices, sampling, and the switches."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from native_support import extension, isas, running, switched_off

from plait import ops
from plait.ops import Angles, Partial, native, partial, reference, rope

pytestmark = switched_off


@pytest.mark.parametrize("isa", isas())
def test_exponential_is_within_one_unit_in_the_last_place(isa: str) -> None:
    x = torch.cat([torch.linspace(-87, 88.7, 400_001), torch.tensor([0.0, -0.0])])
    y = torch.empty_like(x)
    with running(isa=isa):
        extension().exp(x, y)
        special = torch.empty(5)
        extension().exp(torch.tensor([-torch.inf, torch.inf, torch.nan, -200.0, 200.0]), special)
    wanted = x.double().exp()
    unit = torch.nextafter(wanted.float(), torch.tensor(torch.inf)) - wanted.float()
    assert bool(((y.double() - wanted).abs() <= 1.0 * unit.double()).all())
    assert special[0] == special[3] == 0
    assert special[1] == special[4] == torch.inf
    assert bool(special[2].isnan())


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("size", [1, 15, 16, 33, 576])
def test_rms_norm_equals_the_reference(size: int, isa: str) -> None:
    x, weight = torch.randn(7, 2, size) * 10, torch.randn(size)
    with running(isa=isa):
        found = native.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(found, reference.rms_norm(x, weight, 1e-5), atol=1e-6, rtol=2e-6)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(("dim", "half"), [(64, 32), (7, 3), (20, 5), (3, 0)])
def test_rotation_equals_the_reference_to_rounding(dim: int, half: int, isa: str) -> None:
    x = torch.randn(5, 4, dim + 3)[:, 1:, :dim]
    turn = torch.randn(5, half)
    angles = Angles(turn.cos(), turn.sin())
    with running(isa=isa):
        torch.testing.assert_close(native.rotate(x, angles), rope.rotate(x, angles), atol=1e-6, rtol=1e-6)


def test_one_angle_turns_all_rows() -> None:
    x, turn = torch.randn(5, 4, 8), torch.randn(1, 4)
    one = Angles(turn.cos(), turn.sin())
    for_each = Angles(one.cos.expand(5, -1), one.sin.expand(5, -1))
    assert torch.equal(native.rotate(x, one), native.rotate(x, for_each))
    assert torch.equal(rope.rotate(x, one), rope.rotate(x, for_each))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_appending_rounds_as_torch_does(dtype: torch.dtype, isa: str) -> None:
    x = torch.randn(9, 3, 21) * torch.logspace(-9, 5, 21)
    x[0, 0, :4] = torch.tensor([torch.inf, -torch.inf, 1e30, 1e-42])
    x[1] = torch.tensor([1.0, 1.00390625, 1.01171875]).repeat(7)  # halfway between two bf16 numbers
    storage = torch.zeros(3, 20, 21, dtype=dtype)
    with running(isa=isa):
        extension().append(x, storage, 8)
    wanted = torch.zeros_like(storage)
    wanted[:, 8:17] = x.transpose(0, 1).to(dtype)
    assert torch.equal(storage, wanted)
    for at in (-1, 12, 21):
        with pytest.raises(ValueError, match="do not fit"):
            extension().append(x, storage, at)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "columns"), [(1, 1), (3, 65), (192, 576), (1000, 130)])
def test_dense_product_equals_the_reference(outputs: int, columns: int, dtype: torch.dtype, isa: str) -> None:
    weight = torch.randn(outputs, columns).to(dtype)
    for rows in (0, 1, 2, 5, 70):
        x = torch.randn(rows, columns)
        with running(isa=isa):
            y = native.linear(x, weight)
        wanted = x.double() @ weight.double().T
        assert bool(((y - wanted).abs() <= 1e-6 * (x.abs().double() @ weight.abs().double().T) + 1e-7).all())
        alone = [native.linear(row[None], weight) for row in x]
        assert rows == 0 or torch.equal(y, torch.cat(alone))


def test_merge_equals_the_reference() -> None:
    parts = [Partial(torch.randn(5, 3, 20), torch.randn(5, 3) * 30) for _ in range(2)]
    for part in parts:
        part.out[2], part.lse[2] = 0.0, -torch.inf
    parts[0].out[1], parts[0].lse[1] = 0.0, -torch.inf
    found, wanted = native.merge(*parts), partial.merge(*parts)
    torch.testing.assert_close(found.out, wanted.out, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.lse, wanted.lse, atol=1e-6, rtol=1e-6)
    assert torch.equal(found.out[1], parts[1].out[1])


@pytest.mark.parametrize("isa", isas())
def test_choosing_tokens(isa: str) -> None:
    module = extension()
    x = torch.randn(4, 1003) * 5
    x[1] = -torch.inf
    x[1, 700] = 2.0
    x[2] = x[2].round()  # ties
    log, best = torch.empty(4, 1003), torch.empty(4, dtype=torch.int64)
    values, indices = torch.empty(4, 20), torch.empty(4, 20, dtype=torch.int64)
    with running(isa=isa):
        module.log_softmax(x, log)
        module.argmax(x, best)
        module.top_k(x, values, indices)
    torch.testing.assert_close(log, x.log_softmax(-1), atol=4e-6, rtol=1e-6)
    assert torch.equal(best, x.argmax(-1))
    assert torch.equal(values, x.topk(20).values)
    assert torch.equal(x.gather(1, indices), values)
    with pytest.raises(ValueError, match="top_k takes k up to 1003"):
        module.top_k(x, torch.empty(4, 1004), torch.empty(4, 1004, dtype=torch.int64))


def test_gradients_and_other_types_go_to_the_reference() -> None:
    weight = torch.randn(4, 8, requires_grad=True)
    y = ops.linear(torch.randn(2, 8), weight)
    y.sum().backward()
    assert weight.grad is not None
    assert not native.takes([torch.zeros(2, dtype=torch.float64)])
    assert not native.takes([weight])
    with torch.no_grad():
        assert native.takes([weight])


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_switches() -> None:
    show = "from plait.ops import native; m = native.module(); print(m and (m.isa(), m.threads()))"
    assert run_python(show, PLAIT_NATIVE="0").stdout == "None\n"
    assert run_python(show, PLAIT_NATIVE_ISA="scalar", PLAIT_THREADS="3").stdout == "('scalar', 3)\n"
    everywhere = "from plait.ops import native; print(native.is_everywhere())"
    assert run_python(everywhere, PLAIT_NATIVE="auto").stdout == "False\n"
    assert run_python(everywhere, PLAIT_NATIVE="1").stdout == "True\n"
    assert "PLAIT_NATIVE must be 0, 1 or auto" in run_python(show, PLAIT_NATIVE="yes").stderr
    wrong = run_python(show, PLAIT_NATIVE_ISA="mmx")
    assert wrong.returncode != 0
    assert "PLAIT_NATIVE_ISA is 'mmx'. This machine has:" in wrong.stderr


def test_a_missing_extension_is_announced_once() -> None:
    code = (
        "import sys; sys.modules['plait._native'] = None\n"
        "import torch; from plait import ops\n"
        "for _ in range(3): ops.has_packed_form(torch.zeros(2, 18, dtype=torch.uint8), 'q4_0')"
    )
    result = run_python(code)
    assert result.returncode == 0
    assert result.stderr.count("The torch reference is used") == 1
    assert run_python(code, PLAIT_NATIVE="0").stderr == ""


def test_a_forked_child_has_threads_of_its_own() -> None:
    code = (
        "import os, torch; from plait.ops import native\n"
        "x, w = torch.randn(64, 512), torch.randn(512, 512)\n"
        "y = native.linear(x, w)\n"
        "pid = os.fork()\n"
        "if pid == 0: os._exit(0 if torch.equal(native.linear(x, w), y) else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), torch.equal(native.linear(x, w), y))"
    )
    assert run_python(code, PLAIT_THREADS="2").stdout == "0 True\n"


def test_calls_from_several_python_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    x, weight = torch.randn(16, 300), torch.randn(400, 300)
    wanted = native.linear(x, weight)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: native.linear(x, weight), range(40)))
    assert all(torch.equal(result, wanted) for result in results)


def test_results_do_not_depend_on_the_callers_floating_point_mode() -> None:
    x = torch.full((3, 64), 1e-39)
    weight = torch.eye(64)
    plain = native.linear(x, weight)
    torch.set_flush_denormal(True)
    try:
        flushed = native.linear(x, weight)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(plain.view(torch.int32), flushed.view(torch.int32))
    assert torch.equal(plain, x)
