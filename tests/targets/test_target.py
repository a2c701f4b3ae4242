"""Lowered models: called as the model is, for the shapes that they were made for; what is missing is named."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fewbit
from fewbit.batches import Call
from fewbit.targets import TARGETS, Operator, Target
from fewbit.targets.target import relative_difference, tensors_of


class Two(nn.Module):
    """Two inputs, one by keyword, constants, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(6, 4)

    def forward(
        self, image: Tensor, *, vector: Tensor, mask: Tensor | None = None, twice: bool = False
    ) -> dict[str, Any]:
        y = self.a(image) * (2 if twice else 1)
        v = torch.relu(self.b(vector))
        return {"map": y if mask is None else y * mask, "rest": [v, (v.sum(1), y.amax((2, 3)))]}


def inputs(size: int = 4) -> dict[str, Any]:
    return {"image": torch.randn(size, 3, 6, 6), "vector": torch.randn(size, 6)}


@pytest.fixture(scope="module")
def two(static: fewbit.Recipe) -> nn.Module:
    torch.manual_seed(0)
    return fewbit.quantize(Two().eval(), static, [inputs() for _ in range(3)])


@pytest.fixture(scope="module")
def plain(static: fewbit.Recipe) -> fewbit.Lowered:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()
    x = torch.randn(4, 3, 6, 6)
    return fewbit.lower(fewbit.quantize(model, static, [x]), x)


def test_several_inputs_and_a_structure_of_outputs(two: nn.Module) -> None:
    lowered = fewbit.lower(two, inputs())
    for size in (1, 3):
        x = inputs(size)
        with torch.no_grad():
            found, expected = lowered(**x), two(**x)
        assert [*found] == ["map", "rest"] and isinstance(found["rest"][1], tuple)
        assert relative_difference(found, expected) < 0.02


@pytest.mark.parametrize("constants", [{"mask": None}, {"twice": True}, {"mask": None, "twice": True}], ids=str)
def test_constants_among_the_inputs(two: nn.Module, constants: dict[str, Any]) -> None:
    x = {**inputs(), **constants}
    lowered = fewbit.lower(two, x)
    with torch.no_grad():
        assert relative_difference(lowered(**x), two(**x)) < 0.02
    with pytest.raises(fewbit.CalibrationError, match="lower it again"):
        lowered(**{**x, "twice": not constants.get("twice", False)})


def test_positional_inputs() -> None:
    class Positional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.a(x) * scale

    torch.manual_seed(0)
    x = torch.randn(4, 4), torch.rand(4, 1)
    model = fewbit.quantize(Positional().eval(), "int8-static", [x])
    lowered = fewbit.lower(model, x)
    with torch.no_grad():
        torch.testing.assert_close(lowered(*x), model(*x), atol=1e-3, rtol=1e-3)
    with pytest.raises(fewbit.CalibrationError, match="lowered for inputs"):
        lowered(x[0], scale=x[1])


@pytest.mark.parametrize(
    "make",
    [
        lambda: (torch.randn(4, 3, 7, 6),),
        lambda: (torch.randn(4, 4, 6, 6),),
        lambda: (torch.randn(3, 6, 6),),
        lambda: (torch.randn(4, 3, 6, 6), torch.randn(1)),
        lambda: (None,),
        lambda: (),
    ],
)
def test_other_shapes_are_refused_with_what_was_found(
    plain: fewbit.Lowered, make: Callable[[], tuple[Any, ...]]
) -> None:
    with pytest.raises(
        fewbit.CalibrationError, match=r"lowered for inputs \[any, 3, 6, 6\], found .* lower it again"
    ) as error:
        plain(*make())
    assert Call(make(), {}).describe().split(": ")[0] in str(error.value)


def test_the_summary_names_what_is_not_int8(plain: fewbit.Lowered) -> None:
    assert plain.summary() == "torch: 3 of 3 operators in int8" and plain.summary() in repr(plain)
    plain.operators = (Operator("a", "conv", True), *(Operator(str(n), "gelu", False) for n in range(2)))
    assert plain.summary() == "torch: 1 of 3 operators in int8; not 2 gelu"


def test_it_is_an_eval_module_without_parameters(plain: fewbit.Lowered) -> None:
    assert not plain.training and not [*plain.parameters()] and plain.difference == 0


@pytest.mark.parametrize(("name", "extra"), [("onnxruntime", "onnxruntime"), ("openvino", "openvino")])
def test_missing_packages_are_named_with_the_extra(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda package: None if package in ("onnx", name) else real(package)
    )
    assert TARGETS[name].missing() == f"target {name!r} needs onnx, {name}: pip install 'fewbit[{extra}]'."
    assert TARGETS["torch"].missing() is None


def test_what_an_engine_raises_names_the_engine(static: fewbit.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Target):
        name = "failing"

        def compile(self, module: GraphModule, call: Call) -> Any:
            raise RuntimeError("\nno such operator\n\nat line 7")

    monkeypatch.setitem(TARGETS, "failing", Failing())
    model = fewbit.quantize(nn.Linear(4, 3), static, [torch.randn(2, 4)])
    with pytest.raises(fewbit.UnsupportedError, match="failing cannot run this model: no such operator at line 7"):
        fewbit.lower(model, torch.randn(2, 4), "failing")


def test_relative_difference() -> None:
    x = torch.tensor([3.0, 4.0])
    assert relative_difference({"a": x, "b": [torch.tensor([1])]}, {"a": x, "b": [torch.tensor([2])]}) == 0
    assert relative_difference(x + torch.tensor([0.0, 5.0]), x) == 1
    assert relative_difference(x, x * 0) == 5
    assert not relative_difference(x * torch.nan, x) <= 1


def test_tensors_of() -> None:
    x, y = torch.ones(1), torch.ones(2)
    found = tensors_of(Call((x, 3, None), {"y": [y]}))
    assert len(found) == 2 and found[0] is x and found[1] is y
