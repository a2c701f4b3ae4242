"""read_topology: who feeds whom, and models that do not export."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from fewbit.graph import Topology, read_topology


def topology_of(model: nn.Module, *args: Tensor) -> Topology:
    found = read_topology(model.eval(), args, {})
    assert isinstance(found, Topology), found
    return found


def test_calls_are_in_order_and_know_what_they_feed(cnn: nn.Module, images: list[Tensor]) -> None:
    topology = topology_of(cnn, images[0])
    assert [(call.operator, call.module) for call in topology.calls] == [
        ("conv2d", "conv1"),
        ("batch_norm", "norm1"),
        ("conv2d", "conv2"),
        ("batch_norm", "norm2"),
        ("linear", "head"),
    ]
    conv1, norm1, conv2, norm2, head = topology.calls
    assert conv1.feeds == (norm1,) and conv2.feeds == (norm2,)
    assert norm1.feeds == (None,) and norm2.feeds == (None,) and head.feeds == (None,)


def test_names_of_nested_modules() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ModuleDict({"b": nn.Linear(4, 4)})["b"])
    assert [call.module for call in topology_of(model, torch.randn(2, 4)).calls] == ["0.0", "1"]


def test_a_module_called_twice_has_two_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x))

    calls = topology_of(Twice(), torch.randn(2, 4)).calls_of("linear")
    assert len(calls) == 2 and calls[0].feeds == (calls[1],)


def test_keyword_arguments() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, *, x: Tensor) -> Tensor:
            return self.linear(x)

    found = read_topology(Keywords().eval(), (), {"x": torch.randn(2, 4)})
    assert isinstance(found, Topology) and len(found.calls) == 1


def test_a_model_that_does_not_export_gives_the_reason() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    found = read_topology(Branching(), (torch.randn(2),), {})
    assert isinstance(found, str) and found.startswith("torch.export: ") and "\n" not in found


def test_the_logging_level_is_restored_and_the_model_unchanged(cnn: nn.Module, images: list[Tensor]) -> None:
    level = logging.getLogger("torch.export").level
    keys = set(cnn.__dict__)
    topology_of(cnn, images[0])
    assert logging.getLogger("torch.export").level == level and set(cnn.__dict__) == keys
    assert all(parameter.grad is None for parameter in cnn.parameters())


def test_which_module_feeds_which() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.Sequential(nn.GELU())

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.a(x)) + self.act(self.b(x))

    topology = topology_of(Shared(), torch.randn(2, 4))
    assert topology.sources("act.0") == {"a", "b"} and topology.readers("act.0") == {""}
    assert topology.readers("a") == topology.readers("b") == {"act.0"}
    assert "" in topology.sources("a")


def test_a_module_of_two_names_has_the_first_and_may_feed_itself() -> None:
    layer, act = nn.Linear(4, 4), nn.GELU()
    topology = topology_of(nn.Sequential(layer, act, nn.LayerNorm(4), act, act), torch.randn(2, 4))
    assert topology.sources("1") == {"0", "1", "2"} and topology.readers("1") == {"", "1", "2"}
    assert topology.sources("3") == topology.readers("3") == set()
    # What stays within one call does not count.
    negative = nn.Sequential(nn.Linear(4, 4), nn.Softmin(-1))
    assert topology_of(negative, torch.randn(2, 4)).sources("1") == {"0"}
