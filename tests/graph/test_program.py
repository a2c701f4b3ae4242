"""programmed: runs of integer operators as programs that give the same bits."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fewbit
from fewbit.batches import Call
from fewbit.graph.fused import fused
from fewbit.graph.program import programmed
from fewbit.lowering import explicit_graph
from fewbit.ops import native

pytestmark = pytest.mark.skipif(not native.LOADED, reason="no compiled kernels")
RUN = torch.ops.fewbit.run_program.default
FASHION = Path(__file__).parents[2] / "examples" / "fashion_mnist" / "task.py"


def both(model: nn.Module, x: Tensor) -> tuple[GraphModule, GraphModule]:
    """The graph of single operators, and the one of programs."""
    graph = fused(explicit_graph(model, Call((x,), {}))[0])
    fast = programmed(graph, [x])[0]
    return graph, fast


def same(found: Any, expected: Any) -> None:
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def programs(module: GraphModule) -> int:
    return sum(node.target is RUN for node in module.graph.nodes)


def left(module: GraphModule) -> list[str]:
    """Single operators of fewbit that no program took."""
    nodes = [node for node in module.graph.nodes if getattr(node.target, "namespace", "") == "fewbit"]
    return [node.target._opname for node in nodes if node.target is not RUN]


def test_equals_single_operators(quantized: Any) -> None:
    model, network = quantized
    plain, _ = both(model, network.data[0])
    _, fast = both(model, network.data[1])
    assert left(fast) in ([], ["average_uint8"])  # a mean over sizes that are not constant
    rows = torch.cat([*network.data, network.data[0], network.data[1][:1]])
    with torch.no_grad():
        for size in (2, 17):
            same(fast(rows[:size]), plain(rows[:size]))


class Residual(nn.Module):
    """Integer operators whose sums other codes are added to: given by place, by name, and not as they lie in memory."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randint(-128, 128, (8, 8, 3, 3), dtype=torch.int8)
        self.register_buffer("packed", torch.ops.fewbit.pack_uint8(weight, 1))
        self.register_buffer("linear", torch.ops.fewbit.pack_uint8(weight[:, :, :1, :1], 1))
        self.register_buffer("multiplier", torch.rand(8) * 1e-2)
        self.register_buffer("offset", torch.zeros(8, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        def conv(x: Tensor, *other: Any, **names: Any) -> Any:
            numbers = ([8, 8, 3, 3], self.multiplier, self.offset, [1, 1], [1, 1], [1, 1], 1, 20, 0.0, 255.0, 20)
            return torch.ops.fewbit.conv_uint8.default(x, self.packed, *numbers, *other, **names)

        x = torch.ops.fewbit.quantize_uint8.default(torch.ops.aten.permute.default(x, [0, 2, 3, 1]), 0.02, 20)
        y = conv(conv(x), x, 0.5, 20)
        z = conv(y, other=y, other_multiplier=0.3)
        numbers = ([8, 8, 1, 1], self.multiplier, self.offset, 0.0, 255.0, 20)
        z = torch.ops.fewbit.linear_uint8.default(z, self.linear, *numbers, z, 0.4, 9)
        z = conv(y, torch.ops.aten.permute.default(z, [0, 2, 1, 3]), 0.7, 30)
        result: Tensor = torch.ops.fewbit.dequantize_uint8.default(z, 0.1, 20)
        return result


def test_other_codes_are_operands_of_a_program() -> None:
    torch.manual_seed(0)
    graph, x = torch.fx.symbolic_trace(Residual()), torch.randn(3, 8, 7, 7)
    fast, inside = programmed(graph, [x])
    assert programs(fast) == 2 and left(fast) == ["conv_uint8"]  # the last
    assert sum(node.name.startswith(("conv", "linear")) for node in inside) == 4
    for size in (0, 1, 3):
        same(fast(x[:size]), graph(x[:size]))


def test_what_is_one_program(build: Any) -> None:
    for name in (
        "residual",
        "dense",
        "inception",
        "max_pool",
        "avg_pool",
        "flatten_one",
        "adaptive",
        "linear_3d",
        "twice",
    ):
        network = build(name)
        _, fast = both(network.quantized(), network.data[0])
        calls = [node for node in fast.graph.nodes if node.op == "call_function" and "getitem" not in node.name]
        names = [
            str(node.target)
            for node in calls
            if node.target is not RUN and node.target is not torch.ops.aten.permute.default
        ]
        assert programs(fast) == 1 and not [name for name in names if "sym_size" not in name], name


class Mixed(nn.Module):
    """Residual additions, concatenation, pooling of both kinds, a reshape, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1, bias=False)
        self.wide = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.narrow = nn.Conv2d(24, 7, 1)
        self.after = nn.Conv2d(31, 40, 3, 2, dilation=2, padding=2)
        self.head, self.deep = nn.Linear(40, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = torch.relu(self.stem(x))
        y = torch.relu(self.wide(x) + x)
        y = F.max_pool2d(torch.cat([y, torch.relu(self.narrow(y))], 1), 3, 2, 1, ceil_mode=True)
        y = F.avg_pool2d(torch.relu(self.after(y)), 2, 1)
        z = torch.relu(self.head(F.adaptive_avg_pool2d(y, 1).flatten(1)))
        return {"map": y, "scores": [self.deep(z), z]}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(64, 64) for _ in range(4))
        self.up, self.down, self.norm = nn.Linear(64, 128), nn.Linear(128, 64), nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 16)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm(x + self.out(y))
        result: Tensor = x + self.down(torch.relu(self.up(x)))
        return result


def models() -> dict[str, tuple[nn.Module, Tensor, int]]:
    """Small but real ones: with inputs, and the most programs they may need."""
    torch.manual_seed(0)
    recipe = fewbit.load_recipe("int8-static")
    made = {}
    for name, model, x, most in (
        ("mixed", Mixed(), torch.randn(17, 3, 23, 18), 2),
        ("encoder", Encoder(), torch.randn(17, 9, 64), 3),
    ):
        made[name] = (fewbit.quantize(model.eval(), recipe, [x]), x, most)
    task = fewbit.load_task(FASHION)
    assert task.calibration is not None
    x = task.calibration[0]
    made["fashion_mnist"] = (fewbit.quantize(task.model, recipe, task.calibration[:1]), x[:17], 1)
    return made


@pytest.fixture(scope="module")
def real() -> dict[str, tuple[nn.Module, Tensor, int]]:
    return models()


@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")  # torch's own, of copying the structure of results
@pytest.mark.parametrize("name", ["mixed", "encoder", "fashion_mnist"])
@pytest.mark.parametrize("example", [1, 2])
def test_batches_threads_and_copies(name: str, example: int, real: Any) -> None:
    model, x, most = real[name]
    plain, fast = both(model, x[:example])
    assert 1 <= programs(fast) <= most and left(fast) == []
    lowered = fewbit.lower(model, x[:example])
    copied = copy.deepcopy(lowered)
    assert lowered.any_batch
    with torch.no_grad():
        expected = {size: plain(x[:size]) for size in (0, 1, 2, 17)}
        for size, results in expected.items():
            for function in (fast, lowered, copied):
                same(function(x[:size]), results)
            if name != "encoder":
                same(lowered(x[:size].to(memory_format=torch.channels_last)), results)
                same(lowered(x.flip(-1)[:size].flip(-1)), results)
    sizes = [1, 17, 2, 1, 2, 17] * 10

    def call(size: int) -> Any:
        with torch.no_grad():
            return lowered(x[:size])

    with ThreadPoolExecutor(4) as threads:
        for size, found in zip(sizes, threads.map(call, sizes), strict=True):
            same(found, expected[size])


def test_operators_are_listed_one_by_one(real: Any) -> None:
    model, x, _ = real["mixed"]
    lowered = fewbit.lower(model, x)
    kinds = [operator.kind for operator in lowered.operators]
    assert (
        kinds.count("conv_uint8") == 4
        and kinds.count("linear_uint8") == 2
        and "max_pool_uint8" in kinds
        and "cat" in kinds
    )
    assert [operator.kind for operator in lowered.operators if not operator.is_int8] == ["relu"]
