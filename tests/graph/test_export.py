"""export: a program for any batch size where there can be one; names of values; the arguments' signature."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbit.graph import Watched, batch_size, export, leaves, signature
from fewbit.graph.export import module_of, operator_of, takes_any_batch, value_names


class Several(nn.Module):
    """Positional, keyword-only and constant arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, y: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> dict[str, Tensor]:
        result = self.linear(x) + scale * y
        return {"sum": result if mask is None else result * mask, "x": x}


def program(model: nn.Module, *args: Any, **kwargs: Any) -> torch.export.ExportedProgram:
    made = export(model.eval(), args, kwargs)
    assert not isinstance(made, str), made
    return made


def accepts(made: torch.export.ExportedProgram, *args: Any, **kwargs: Any) -> bool:
    try:
        made.module()(*args, **kwargs)
    except (AssertionError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("size", [1, 2, 5])
def test_any_batch_size_also_from_an_example_of_one(size: int, cnn: nn.Module) -> None:
    made = program(cnn, torch.randn(size, 3, 8, 8))
    for other in (1, 2, 7):
        x = torch.randn(other, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(made.module()(x), cnn(x))


def test_several_inputs_share_the_batch() -> None:
    made = program(Several(), torch.randn(1, 4), y=torch.randn(1, 4))
    assert accepts(made, torch.randn(3, 4), y=torch.randn(3, 4))
    mixed = program(Several(), torch.randn(3, 4), y=torch.randn(1, 4))
    assert accepts(mixed, torch.randn(3, 4), y=torch.randn(1, 4))
    assert not accepts(mixed, torch.randn(2, 4), y=torch.randn(2, 4))


@pytest.mark.parametrize("size", [1, 6])
@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x * int(x.shape[0]),
        lambda m, x: torch.stack([row.exp() for row in x]),
        lambda m, x: x if x.shape[0] > 8 else 2 * x,
        lambda m, x: x if x.shape[0] > 4 else 2 * x,
    ],
)
def test_a_batch_size_that_the_code_looks_at_is_the_only_one(function: Any, size: int, net: Any) -> None:
    x = torch.randn(size, 4)
    model = net(function)
    made = program(model, x)
    assert not takes_any_batch(made)
    assert torch.equal(made.module()(x), model(x))


def test_what_takes_any_batch(cnn: nn.Module) -> None:
    assert takes_any_batch(program(cnn, torch.randn(1, 3, 8, 8)))
    assert takes_any_batch(program(Several(), torch.randn(3, 4), y=torch.randn(3, 4), scale=2.0))
    assert not takes_any_batch(program(Several(), torch.randn(3, 4), y=torch.randn(1, 4)))
    assert not takes_any_batch(program(Several(), torch.randn(3, 4), y=torch.tensor(1.0), mask=torch.randn(1, 4)))


def test_a_model_for_one_batch_size_is_exported_for_that(net: Any) -> None:
    made = program(net(lambda m, x: x.reshape(3, 2, 4)), torch.randn(6, 4))
    assert accepts(made, torch.randn(6, 4)) and not accepts(made, torch.randn(9, 4))


def test_why_it_does_not_export_is_one_line_and_nothing_is_logged(
    net: Any, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    model = net(lambda m, x: x if float(x.mean()) > 0 else -x)
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    with caplog.at_level(logging.WARNING):
        reason = export(model, (torch.randn(2),), {})
    assert isinstance(reason, str) and reason.startswith("torch.export: ") and "\n" not in reason
    assert not caplog.records
    assert capsys.readouterr() == ("", "")
    assert [logger.level for logger in loggers] == levels
    raising = net(lambda m, x: [].pop())
    assert export(raising, (torch.randn(2),), {}) == "torch.export: IndexError: pop from empty list"


def test_leaves_and_signature() -> None:
    x, y = torch.randn(3, 4), torch.randn(3, 2, 5)
    inputs = ((x, {"k": [y, 3]}), {"flag": None})
    assert [type(leaf) for leaf in leaves(inputs)] == [Tensor, Tensor, int, type(None)]
    assert signature(inputs, False) != signature(((x[:2], {"k": [y[:2], 3]}), {"flag": None}), False)
    assert signature(inputs, True) == signature(((x[:2], {"k": [y[:2], 3]}), {"flag": None}), True)
    for other in (
        ((x, {"k": [y, 4]}), {"flag": None}),
        ((x.double(), {"k": [y, 3]}), {"flag": None}),
        ((x[:, 1:], {"k": [y, 3]}), {"flag": None}),
        ((x, {"l": [y, 3]}), {"flag": None}),
        ((x, {"k": [y, 3]}), {}),
    ):
        assert signature(other, True) != signature(inputs, True)


def test_batch_size() -> None:
    x = torch.randn(3, 4)
    assert batch_size(((x, x), {"n": torch.tensor(2.0), "k": 7})) == 3
    assert batch_size(((x, x.T), {})) is None
    assert batch_size(((torch.tensor(1.0),), {})) is None and batch_size(((), {})) is None


def test_names_of_values(cnn: nn.Module) -> None:
    made = program(cnn, torch.randn(2, 3, 8, 8))
    assert [*value_names(made.graph).values()] == [
        *("conv1:conv2d", "norm1:batch_norm", ":relu", "conv2:conv2d", "norm2:batch_norm"),
        *(":add", ":relu.1", ":mean", "head:linear"),
    ]


def test_module_and_operator_of_a_node() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)))
    nodes = [n for n in program(model, torch.randn(2, 4)).graph.nodes if n.op == "call_function"]
    assert [(module_of(node), operator_of(node)) for node in nodes] == [("0.0", "linear"), ("0.1", "relu")]


def test_watched_sees_every_float_tensor_in_order() -> None:
    seen: list[tuple[str, tuple[int, ...]]] = []
    made = program(Several(), torch.randn(2, 4), y=torch.randn(2, 4), scale=0.5)
    watched = Watched(made.module(check_guards=False), lambda node, x: seen.append((node.name, tuple(x.shape))))  # type: ignore[arg-type]
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    with torch.no_grad():
        watched.run(*leaves(((x,), {"y": y, "scale": 0.5})), enable_io_processing=False)
    names = [name for name, _ in seen]
    assert names[:2] == ["linear_weight", "linear_bias"] and names[-3:] == ["linear", "mul", "add"]
    assert all(shape == (5, 4) for name, shape in seen if name in ("linear", "mul", "add", "x", "y"))
