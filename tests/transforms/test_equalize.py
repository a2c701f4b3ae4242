"""equalize: same function, equal ranges, and where it must not be done."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit.graph import Topology, read_topology
from fewbit.transforms import TRANSFORMS
from fewbit.transforms.equalize import equalize, find_pairs

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[tuple[str, str]]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), (5, 6), [("0", "2")]),
    "nothing-between": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), (5, 6), [("0", "1")]),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3)),
        (2, 3, 8, 8),
        [("0", "2")],
    ),
    "depthwise-chain": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)
        ),
        (2, 3, 8, 8),
        [("0", "2"), ("2", "4")],
    ),
    "relu6": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU6(), nn.Linear(8, 4)), (5, 6), []),
    "groups": (lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1, groups=2)), (2, 4, 5, 5), []),
    "flattened": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4)),
        (2, 3, 8, 8),
        [],
    ),
}


class Branch(nn.Module):
    """The first layer's result has a second reader."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y) + y


def topology_of(model: nn.Module, x: Tensor) -> Topology:
    found = read_topology(model, (x,), {})
    assert isinstance(found, Topology)
    return found


def uneven(model: nn.Module) -> nn.Module:
    """Channels of very different ranges."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                factors = torch.logspace(-2, 2, len(module.weight))
                module.weight.mul_(factors.reshape(-1, *[1] * (module.weight.ndim - 1)))
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_pairs_and_function(name: str) -> None:
    torch.manual_seed(0)
    make, shape, expected = MODELS[name]
    model, x = uneven(make()), torch.randn(*shape)
    pairs = find_pairs(model, topology_of(model, x))
    assert pairs == expected
    twin = copy.deepcopy(model)
    equalize(twin, pairs)
    torch.testing.assert_close(twin.double()(x.double()), model.double()(x.double()), rtol=1e-3, atol=1e-5)


def test_ranges_are_equal_afterwards() -> None:
    torch.manual_seed(0)
    model = uneven(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)))
    equalize(model, [("0", "2")])
    torch.testing.assert_close(model[0].weight.abs().amax(1), model[2].weight.abs().amax(0), rtol=1e-4, atol=0)


def test_dead_channels_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[1].weight[:, 2] = 0
    equalize(model, [("0", "1")])
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert not model[0].weight[1].any() and not model[1].weight[:, 2].any()


def test_second_readers_watched_and_shared_layers_are_left() -> None:
    x = torch.randn(5, 6)
    branch = Branch().eval()
    assert find_pairs(branch, topology_of(branch, x)) == []
    layer = nn.Linear(6, 6)
    twice = nn.Sequential(layer, nn.ReLU(), layer).eval()
    assert find_pairs(twice, topology_of(twice, x)) == []
    hooked = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).eval()
    topology = topology_of(hooked, x)
    hooked[0].register_forward_hook(lambda *_: None)
    assert find_pairs(hooked, topology) == []


def test_in_a_recipe(mlp: nn.Module, vectors: list[Tensor]) -> None:
    before = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
    recipe = replace(fewbit.load_recipe("int8-static"), transforms=("equalize",))
    plan = fewbit.plan_of(fewbit.quantize(mlp, recipe, vectors))
    assert plan.transforms["equalize"] == [["0", "2"], ["2", "4"]]
    assert all(torch.equal(tensor, before[name]) for name, tensor in mlp.state_dict().items())
    assert TRANSFORMS["equalize"].needs_graph


def test_on_meta_nothing_is_computed() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    parameters = list(model.parameters())
    equalize(model, [("0", "1")])
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
