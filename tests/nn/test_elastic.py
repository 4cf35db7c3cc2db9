"""A model that is read from a stack of blocks: any size, up and down, and what its order says."""

from __future__ import annotations

import copy
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from plait.errors import ConfigError, IncompatibleError, ModelFileError
from plait.memory import MemoryPlan, Rows
from plait.nn import Transformer, load_transformer, lower, quantize_checkpoint
from plait.nn.checkpoints import PackedCheckpoint, open_checkpoint
from plait.nn.checkpoints.packed import PACKED_NAME
from plait.nn.packed_run import PackedRun
from plait.weights import FORMATS, BitStack, BlockStack, Linear, Packed

TEXTS = [[3, 1, 4, 1, 5, 9, 2, 6] * 4, [2, 7, 1, 8, 2, 8] * 5]
DEPTH = 4


def stacked(source: Path, output: Path, spec: str = f"bitstack:blocks={DEPTH}") -> Path:
    with open_checkpoint(source) as checkpoint:
        return quantize_checkpoint(checkpoint, output, FORMATS.parse(spec), calibration=TEXTS).path


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stacked(source, tmp_path_factory.mktemp("stack")).parent


def opened(folder: Path, format: BitStack | None = None) -> Transformer:
    with open_checkpoint(folder) as checkpoint:
        return load_transformer(checkpoint, format)


def answers(model: Transformer) -> torch.Tensor:
    ids = torch.tensor(TEXTS[0])
    with torch.no_grad():
        past = model.new_past(MemoryPlan.parse("full"))
        return model.answer(ids, Rows([(len(ids), 0)]), [past], wanted=torch.arange(len(ids)))


@pytest.mark.parametrize("is_lowered", [True, False])
def test_any_size_is_that_of_a_model_loaded_so_and_comes_back_bit_for_bit(
    folder: Path, is_lowered: bool
) -> None:
    model = opened(folder)
    if is_lowered:
        lower(model)
    weights = model.resizable()
    sizes = weights.sizes()
    assert len(sizes) == (DEPTH - 1) * 14 + 1
    assert all(after > before for before, after in pairwise(sizes))
    whole = answers(model)
    seen = []
    for size in (sizes[0], sizes[17], sizes[9] + 1, sizes[-1]):
        before = weights.nbytes()
        moved = weights.resize(size)
        assert moved.nbytes == weights.nbytes() == max(s for s in sizes if s <= size)
        assert moved.added - moved.freed == moved.nbytes - before
        assert 0 in (moved.added, moved.freed)
        fresh = opened(folder, BitStack(budget=str(size)))
        if is_lowered:
            lower(fresh)
        assert fresh.resizable().nbytes() == moved.nbytes
        seen.append(answers(model))
        assert torch.equal(seen[-1], answers(fresh))
    assert torch.equal(seen[-1], whole)
    assert not torch.equal(seen[0], whole)


@pytest.mark.parametrize("is_lowered", [True, False])
def test_a_copy_has_a_size_of_its_own(folder: Path, is_lowered: bool) -> None:
    model = opened(folder)
    if is_lowered:
        lower(model)
    twin = copy.deepcopy(model)
    assert (twin.program is None) == (model.program is None)
    whole = answers(model)
    assert torch.equal(answers(twin), whole)
    small = twin.resizable().sizes()[0]
    twin.resizable().resize(small)
    assert twin.resizable().nbytes() == small < model.resizable().nbytes()
    assert not torch.equal(answers(twin), whole)
    assert torch.equal(answers(model), whole)


def test_what_is_counted_is_what_is_held_and_what_the_file_has(folder: Path) -> None:
    model = opened(folder)
    weights = model.resizable()
    matrices = {id(m): m for m in model.modules() if isinstance(m, Packed) and m.pieces() == [m]}
    vectors = sum(4 * p.numel() for name, p in model.named_parameters() if "norm" in name)
    for size in weights.sizes()[::20]:
        weights.resize(size)
        assert weights.nbytes() == vectors + sum(m.nbytes() for m in matrices.values())
    blocks = [m for m in matrices.values() if isinstance(m, BlockStack)]
    assert {len(m.blocks) for m in blocks} <= {DEPTH - 1, DEPTH}
    assert 8 * sum(m.nbytes() for m in blocks) / sum(
        m.shape[0] * m.shape[1] for m in blocks
    ) == pytest.approx(weights.file.bits(weights.position))
    weights.resize(bits=5.0)
    assert weights.file.bits(weights.position) <= 5.0 < weights.file.bits(weights.position + 1)


def test_blocks_lie_in_the_file_as_they_are_loaded(folder: Path) -> None:
    with PackedCheckpoint(folder) as checkpoint:
        places, counts = checkpoint.places(), dict.fromkeys(checkpoint.stacks(), 0)
        assert checkpoint.order is not None
        end = None
        for name in checkpoint.order:
            counts[name] += 1
            start, size = places[f"{name}.block{counts[name]}"]
            assert end in (None, start)
            end = start + size
        raw = (folder / PACKED_NAME).read_bytes()
        assert end == len(raw)
        start, size = places[f"{name}.block0"]
        assert raw[start : start + size] == checkpoint.load_packed(name).tensors()["block0"].numpy().tobytes()


def test_a_file_that_was_cut_leaves_the_model_as_it_was(source: Path, tmp_path: Path) -> None:
    path = stacked(source, tmp_path)
    model = opened(tmp_path, BitStack(budget="1GB"))
    weights = model.resizable()
    weights.resize(weights.sizes()[20])
    before, size = answers(model), weights.nbytes()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with pytest.raises(ModelFileError, match=r"ends inside block \d of blocks"):
        weights.resize()
    assert (weights.nbytes(), weights.position) == (size, 20)
    assert torch.equal(answers(model), before)
    weights.resize(weights.sizes()[30])
    assert weights.position == 30


def test_what_cannot_be_is_refused(source: Path, folder: Path) -> None:
    smallest = opened(folder).resizable().sizes()[0]
    with pytest.raises(ConfigError, match=f"sizes from {smallest} to .* Got a budget of {smallest - 1}"):
        opened(folder, BitStack(budget=str(smallest - 1)))
    with pytest.raises(ConfigError, match=r"bits a weight\. Got 0\.5 bits"):
        opened(folder, BitStack(bits=0.5))
    with pytest.raises(ConfigError, match="not both"):
        opened(folder).resizable().resize(smallest, bits=3.0)
    with pytest.raises(ConfigError, match="holds none"):
        opened(source, BitStack())
    with pytest.raises(IncompatibleError, match="not read from a stack"):
        opened(source).resizable()


def test_a_resize_waits_for_the_pass_that_runs(folder: Path) -> None:
    model = opened(folder)
    weights = model.resizable()
    with weights.guard:
        thread = threading.Thread(target=weights.resize, args=(weights.sizes()[0],))
        thread.start()
        thread.join(timeout=0.05)
        assert thread.is_alive()
        assert weights.position == len(weights.file.order)
    thread.join()
    assert weights.position == 0


@pytest.mark.parametrize("change", ["twice", "unknown", "short"])
def test_an_order_that_is_not_that_of_the_blocks_is_damage(
    source: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = BitStack.stack_order

    def wrong(format: BitStack, run: PackedRun) -> list[str]:
        order = right(format, run)
        return {"twice": [*order[:-1], order[0]], "unknown": ["norm", *order[1:]], "short": order[1:]}[change]

    monkeypatch.setattr(BitStack, "stack_order", wrong)
    stacked(source, tmp_path)
    with pytest.raises(ModelFileError, match="order"):
        opened(tmp_path)


def packed_run(folder: Path) -> tuple[PackedRun, Transformer]:
    model = opened(folder)
    names = {packed: name for name, packed in model.resizable().matrices.items()}
    linears = {
        linear: [names[piece] for piece in linear.weight.pieces()]  # type: ignore[index]
        for block in model.blocks
        for linear in block.modules()
        if isinstance(linear, Linear)
    }
    shell = model.with_blocks([0])
    shell.blocks = torch.nn.ModuleList()
    return PackedRun(shell, lambda: (list(model.blocks), linears), [torch.tensor(t) for t in TEXTS]), model  # type: ignore[arg-type,return-value]


def mean_nats(model: Transformer) -> torch.Tensor:
    nats = []
    for text in TEXTS:
        ids = torch.tensor(text)
        law = model.logits(model(ids, Rows([(len(ids), 0)]))).log_softmax(dim=-1)
        nats.append(-law[:-1].gather(1, ids[1:, None])[:, 0])
    return torch.cat(nats).mean()


def test_the_loss_is_the_same_from_any_block_on(folder: Path) -> None:
    run, model = packed_run(folder)
    with torch.no_grad():
        assert run.loss() == pytest.approx(float(mean_nats(model)), rel=1e-5)
        for name in ("blocks.0.mixer.value.weight", "blocks.1.feed_forward.down.weight"):
            packed = run.matrices[name]
            assert isinstance(packed, BlockStack)
            whole = packed.blocks
            packed.hold(whole[:1])
            assert run.loss(name) == pytest.approx(float(mean_nats(model)), rel=1e-5)
            packed.hold(whole)


def test_slopes_are_those_of_the_whole_model(folder: Path) -> None:
    run, model = packed_run(folder)
    seen: dict[Linear, list[torch.Tensor]] = {}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    for linear in linears.values():
        linear.register_forward_hook(
            lambda module, given, out: seen.setdefault(module, []).extend((given[0], out))
        )
    shift = torch.zeros(1, requires_grad=True)
    model.embedding.register_forward_hook(lambda module, given, out: out + shift)
    nats = mean_nats(model)
    predicted = sum(len(text) - 1 for text in TEXTS)
    found = run.sensitivity()
    for name, parts in [
        ("blocks.0.mixer.output", 1),
        ("blocks.1.feed_forward.up", 2),
        ("blocks.0.mixer.qkv", 3),
    ]:
        calls = seen[linears[name]][: 2 * len(TEXTS)]
        inputs = torch.cat(calls[::2]).double().square().mean(dim=0)
        slopes = torch.autograd.grad(nats * predicted, calls[1::2], retain_graph=True)
        squares = torch.cat(slopes).double().square().sum(dim=0)
        last = {1: ["output"], 2: ["gate", "up"], 3: ["query", "key", "value"]}[parts]
        mine = [found[f"{name.rpartition('.')[0]}.{part}.weight"] for part in last]
        torch.testing.assert_close(torch.cat([part for _, part in mine]), squares, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(mine[0][0], inputs, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("sort", ["fisher", "error", "ppl"])
def test_orders_go_level_by_level_and_best_first(
    source: Path, tmp_path: Path, folder: Path, sort: str
) -> None:
    run, _ = packed_run(folder)
    format = BitStack(blocks=DEPTH, sort=sort)  # type: ignore[arg-type]
    order = format.stack_order(run)
    names = set(run.matrices)
    for level in range(DEPTH - 1):
        assert set(order[14 * level : 14 * level + 14]) == names
    assert all(len(m.blocks) == DEPTH for m in run.matrices.values())  # type: ignore[attr-defined]
    if sort == "ppl":
        # Brute force: the whole model with one more block of one matrix.
        stacks = {name: m for name, m in run.matrices.items() if isinstance(m, BlockStack)}
        whole = {name: m.blocks for name, m in stacks.items()}
        for name, m in stacks.items():
            m.hold(whole[name][:1])
        base, gains = run.loss(), {}
        for name, m in stacks.items():
            m.hold(whole[name][:2])
            gains[name] = (base - run.loss()) / m.block_bytes
            m.hold(whole[name][:1])
        assert order[:14] == sorted(stacks, key=lambda name: -gains[name])
