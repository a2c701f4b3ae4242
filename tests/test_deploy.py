"""lower and export: engines by name, files with a card beside them, and errors that say what to do."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fewbit
from fewbit import UnsupportedError
from fewbit.batches import Call
from fewbit.deploy import LARGEST_DIFFERENCE
from fewbit.graph.fused import fused
from fewbit.targets import TARGETS, Operator, Target
from fewbit.targets.target import relative_difference

needs_onnxruntime = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnxruntime is not installed",
)
CARD = {
    *("fewbit", "target", "recipe", "inputs", "outputs", "notes", "summary", "operators"),
    *("difference from fewbit's kernels", "versions"),
}


class Times(Target):
    """An engine that gives the right results times a factor."""

    name = "times"
    wide_sums = False

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def compile(self, module: GraphModule, call: Call) -> tuple[Callable[..., Any], tuple[Operator, ...]]:
        graph = fused(module)
        return lambda *tensors: [graph(*tensors) * self.factor], ()


@pytest.fixture
def model(cnn: nn.Module, images: list[Tensor], static: fewbit.Recipe) -> nn.Module:
    return fewbit.quantize(cnn, static, images)


def test_targets() -> None:
    assert [*TARGETS] == ["torch", "onnxruntime", "openvino"]
    assert all(target.name == name for name, target in TARGETS.items())


def test_the_built_in_target_is_the_default(model: nn.Module, images: list[Tensor]) -> None:
    lowered = fewbit.lower(model, images[0])
    assert isinstance(lowered, fewbit.Lowered) and lowered.target == "torch" and lowered.difference == 0
    with torch.no_grad():
        assert relative_difference(lowered(images[1]), model(images[1])) < 0.02


@pytest.mark.parametrize("batch", ["tensor", "tuple", "list-with-labels", "dict"])
def test_example_inputs_in_the_forms_of_batches(batch: str, model: nn.Module, images: list[Tensor]) -> None:
    x = images[0]
    given: Any = {"tensor": x, "tuple": (x,), "list-with-labels": [x, torch.arange(4)], "dict": {"x": x, "labels": 3}}[
        batch
    ]
    lowered = fewbit.lower(model, given)
    with torch.no_grad():
        y = lowered(x=x) if batch == "dict" else lowered(x)
        assert torch.equal(y, fewbit.lower(model, x)(x))


@pytest.mark.parametrize("bad", [3, [], [torch.ones(1), torch.ones(1), torch.ones(1)]], ids=str)
def test_what_is_no_batch_is_refused(bad: Any, model: nn.Module) -> None:
    with pytest.raises(fewbit.CalibrationError, match="example_inputs: found"):
        fewbit.lower(model, bad)


def test_inputs_that_the_model_does_not_take(model: nn.Module) -> None:
    with pytest.raises(UnsupportedError, match=r"this ConvNet cannot be lowered: torch.export: "):
        fewbit.lower(model, torch.randn(4, 7, 8, 8))


def test_inputs_elsewhere_are_refused(model: nn.Module, images: list[Tensor]) -> None:
    with pytest.raises(UnsupportedError, match="lowered for the CPU, found example_inputs on meta: move them"):
        fewbit.lower(model, images[0].to("meta"))


def test_float_models_are_refused(cnn: nn.Module, images: list[Tensor], tmp_path: Path) -> None:
    with pytest.raises(fewbit.PlanError, match="was not quantized by fewbit"):
        fewbit.lower(cnn, images[0])


@pytest.mark.parametrize("verb", ["lower", "export"])
def test_unknown_targets(verb: str, model: nn.Module, images: list[Tensor], tmp_path: Path) -> None:
    message = "unknown target 'openvinno'. Did you mean 'openvino'. Allowed: onnxruntime, openvino, torch"
    with pytest.raises(UnsupportedError, match=message):
        if verb == "lower":
            fewbit.lower(model, images[0], "openvinno")
        else:
            fewbit.export(model, tmp_path / "x.onnx", "openvinno", example_inputs=images[0])
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("verb", ["lower", "export"])
def test_missing_packages(
    verb: str, target: str, model: nn.Module, images: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    hidden = ("onnx", "onnxscript", target)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else real(name))
    with pytest.raises(UnsupportedError, match=rf"needs onnx, onnxscript, {target}: pip install 'fewbit\[{target}\]'"):
        if verb == "lower":
            fewbit.lower(model, images[0], target)
        else:
            fewbit.export(model, tmp_path / "x.onnx", target, example_inputs=images[0])


@pytest.mark.parametrize("factor", [1 + LARGEST_DIFFERENCE * 1.1, 0.5, -1.0, float("nan"), float("inf")])
def test_an_engine_that_computes_something_else(
    factor: float, model: nn.Module, images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TARGETS, "times", Times(factor))
    with pytest.raises(
        UnsupportedError, match=r"times computes something else than the codes say: its outputs are .* % away"
    ):
        fewbit.lower(model, images[0], "times")


def test_an_engine_that_rounds_otherwise(
    model: nn.Module, images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TARGETS, "times", Times(1.01))
    lowered = fewbit.lower(model, images[0], "times")
    assert lowered.target == "times" and abs(lowered.difference - 0.01) < 1e-5


@needs_onnxruntime
def test_export_writes_a_file_and_its_card(model: nn.Module, images: list[Tensor], tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    path = fewbit.export(model, tmp_path / "deep" / "net.onnx", example_inputs=images[0][:1], notes="pixels in [0, 1]")
    assert path == tmp_path / "deep" / "net.onnx"
    assert {file.name for file in path.parent.iterdir()} == {"net.onnx", "net.json"}
    card = json.loads(path.with_suffix(".json").read_text())
    assert {*card} == CARD
    assert card["fewbit"] == fewbit.__version__
    assert card["target"] == "onnxruntime" and card["recipe"] == "int8-static" and card["notes"] == "pixels in [0, 1]"
    assert card["inputs"] == [{"name": "x", "dtype": "float", "shape": ["batch", 3, 8, 8]}]
    [made] = card["outputs"]
    assert (made["dtype"], made["shape"]) == ("float", ["batch", 5])
    assert card["summary"] == fewbit.plan_of(model).summary()
    assert card["operators"].startswith("onnxruntime: ") and 0 <= card["difference from fewbit's kernels"] < 0.01
    assert card["versions"] == {"torch": torch.__version__, "onnx opset": 21}
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [found] = session.run(None, {"x": images[1].numpy()})
    with torch.no_grad():
        assert relative_difference(torch.from_numpy(found), fewbit.lower(model, images[1])(images[1])) < 0.005


@needs_onnxruntime
def test_export_of_a_loaded_model_is_the_same_file(
    model: nn.Module, cnn: nn.Module, images: list[Tensor], tmp_path: Path
) -> None:
    fewbit.save(model, tmp_path / "saved")
    loaded = fewbit.load(tmp_path / "saved", cnn)
    first, second = (
        fewbit.export(m, tmp_path / f"{name}.onnx", example_inputs=images[0])
        for m, name in ((model, "a"), (loaded, "b"))
    )
    assert first.read_bytes() == second.read_bytes()


@needs_onnxruntime
def test_export_replaces_and_does_not_change_the_model(model: nn.Module, images: list[Tensor], tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    fewbit.export(model, str(path), example_inputs=images[0])
    assert len(path.read_bytes()) > 1000
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@needs_onnxruntime
def test_a_place_that_cannot_be_written(model: nn.Module, images: list[Tensor], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(fewbit.FewbitError, match=r"cannot be written: .* Give a place that you may write to"):
        fewbit.export(model, tmp_path / "file" / "net.onnx", example_inputs=images[0])


@pytest.mark.parametrize(("name", "target"), [("net.onnx", "torch"), ("net", "onnxruntime"), ("net.pt", "openvino")])
def test_what_export_does_not_write(
    name: str, target: str, model: nn.Module, images: list[Tensor], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=r"exported as NAME.onnx. For PyTorch save the quantized model"):
        fewbit.export(model, tmp_path / name, target, example_inputs=images[0])


@needs_onnxruntime
def test_what_an_engine_gets_wrong_is_not_written(
    model: nn.Module, images: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TARGETS, "onnxruntime", Times(2.0))
    with pytest.raises(UnsupportedError, match="computes something else"):
        fewbit.export(model, tmp_path / "net.onnx", example_inputs=images[0])
    assert not [*tmp_path.iterdir()]


def test_a_model_for_one_batch_size_says_so(net: Any, static: fewbit.Recipe) -> None:
    torch.manual_seed(0)
    model = net(lambda m, x: m.a(x.reshape(2, 3, 4)), a=nn.Linear(4, 5)).eval()
    x = torch.randn(6, 4)
    lowered = fewbit.lower(fewbit.quantize(model, static, [x]), x)
    assert not lowered.any_batch
    with pytest.raises(fewbit.CalibrationError, match=r"lowered for inputs \[6, 4\], found 0: float32 \[9, 4\]"):
        lowered(torch.randn(9, 4))
