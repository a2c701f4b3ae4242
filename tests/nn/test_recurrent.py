"""LSTM and GRU: equal to torch's with the weights dequantized."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fewbit
from fewbit import PER_TOKEN, QuantSpec, Recipe, Rule, Scheme, per_channel, per_group
from fewbit.nn import QuantizedLayer
from fewbit.qtensor import dequantize

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

INT8 = QuantSpec("int8", per_channel(0))
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layers": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "batch-first": {"batch_first": True},
    "no-bias": {"bias": False},
    "all": {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
}
CASES: list[Any] = [
    *(
        pytest.param(cls, settings, id=f"{cls.__name__}-{name}")
        for cls, (name, settings) in itertools.product((nn.LSTM, nn.GRU), SETTINGS.items())
    ),
    pytest.param(nn.LSTM, {"proj_size": 5}, id="LSTM-projection"),
    pytest.param(nn.LSTM, {"proj_size": 5, "num_layers": 2, "bidirectional": True}, id="LSTM-projection-all"),
]


def pair(cls: type[nn.Module], settings: dict[str, Any]) -> tuple[nn.Module, QuantizedLayer]:
    """torch's layer with dequantized weights, and the weight-only quantized layer."""
    torch.manual_seed(0)
    module = cls(6, 8, **settings).eval()
    layer = fewbit.quantize(module, Recipe("test", (Rule("*", Scheme(INT8)),)))
    assert isinstance(layer, QuantizedLayer)
    module = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if f"{name}_packed" in layer.state_dict():  # a small share of the weights stays float
                parameter.copy_(dequantize(layer.qtensor(name)))
    return module, layer


def initial(module: nn.Module, settings: dict[str, Any], batch: int | None) -> Any:
    count = settings.get("num_layers", 1) * (2 if settings.get("bidirectional") else 1)
    middle = () if batch is None else (batch,)
    h = torch.randn(count, *middle, settings.get("proj_size", 0) or 8)
    return (h, torch.randn(count, *middle, 8)) if isinstance(module, nn.LSTM) else h


def assert_close(first: Any, second: Any) -> None:
    if isinstance(first, PackedSequence):
        for a, b in zip(first, second, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    elif isinstance(first, Tensor):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
    else:
        assert type(first) is type(second)
        for a, b in zip(first, second, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("batch", [3, 1, None], ids=["batch", "batch-of-1", "unbatched"])
@pytest.mark.parametrize(("cls", "settings"), CASES)
@torch.no_grad()
def test_equals_torch(cls: type[nn.Module], settings: dict[str, Any], batch: int | None, states: bool) -> None:
    module, layer = pair(cls, settings)
    shape = (7, 6) if batch is None else (batch, 7, 6) if settings.get("batch_first") else (7, batch, 6)
    x = torch.randn(shape)
    hx = initial(module, settings, batch) if states else None
    assert_close(layer(x, hx), module(x, hx))


@pytest.mark.parametrize("states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("lengths", [[7, 4, 4, 1], [2, 7, 1, 5], [3, 3, 3, 3]], ids=["sorted", "unsorted", "equal"])
@pytest.mark.parametrize(("cls", "settings"), CASES)
@torch.no_grad()
def test_packed_sequences_equal_torch(
    cls: type[nn.Module], settings: dict[str, Any], lengths: list[int], states: bool
) -> None:
    module, layer = pair(cls, settings)
    x = torch.randn(4, 7, 6)
    hx = initial(module, settings, 4) if states else None
    for enforce_sorted in (True, False) if lengths == sorted(lengths, reverse=True) else (False,):
        packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=enforce_sorted)
        found, expected = layer(packed, hx), module(packed, hx)
        assert_close(found, expected)
        assert_close(pad_packed_sequence(found[0]), pad_packed_sequence(expected[0]))


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU], ids=["LSTM", "GRU"])
@torch.no_grad()
def test_dynamic_input_is_near_float(cls: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module, x = cls(32, 32, num_layers=2), torch.randn(6, 3, 32)
    scheme = Scheme(INT8, QuantSpec("int8", PER_TOKEN))
    layer = fewbit.quantize(module, Recipe("test", (Rule("*", scheme),)))
    exact, found = module(x)[0], layer(x)[0]
    assert found.shape == exact.shape and 0 < float((found - exact).abs().max()) < 0.05


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU], ids=["LSTM", "GRU"])
@torch.no_grad()
def test_a_sequence_is_the_same_alone_and_in_a_batch(cls: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3, 32)
    scheme = Scheme(INT8, QuantSpec("int8", PER_TOKEN))
    layer = fewbit.quantize(cls(32, 32), Recipe("test", (Rule("*", scheme),)))
    torch.testing.assert_close(layer(x)[0][:, 1], layer(x[:, 1])[0], atol=1e-6, rtol=1e-6)


DYNAMIC = {
    "int8": Scheme(INT8, QuantSpec("int8", PER_TOKEN)),
    "int8-asymmetric": Scheme(QuantSpec("int8", per_channel(0), symmetric=False), QuantSpec("int8", PER_TOKEN)),
    "int4": Scheme(QuantSpec("int4", per_group(32), scale_dtype="bfloat16"), QuantSpec("int8", per_group(32))),
}
OPERATOR_CASES = [case for case in CASES if "proj_size" not in case.values[1]]


def dynamic(cls: type[nn.Module], settings: dict[str, Any], scheme: str, hidden: int = 37) -> QuantizedLayer:
    torch.manual_seed(0)
    layer = fewbit.quantize(cls(24, hidden, **settings).eval(), Recipe("test", (Rule("*", DYNAMIC[scheme]),)))
    assert isinstance(layer, QuantizedLayer)
    return layer


def assert_near(first: Any, second: Any) -> None:
    """Here and there a code of h next to a rounding boundary falls to the other side."""
    if isinstance(first, Tensor):
        error = (first - second).abs()
        assert first.shape == second.shape and float(error.max()) < 5e-3 and float(error.mean()) < 2e-4
    else:
        for a, b in zip(first, second, strict=True):
            assert_near(a, b)


@pytest.mark.parametrize("scheme", DYNAMIC)
@pytest.mark.parametrize(("cls", "settings"), OPERATOR_CASES)
@torch.no_grad()
def test_operators_do_what_the_steps_in_float64_do(cls: type[nn.Module], settings: dict[str, Any], scheme: str) -> None:
    layer = dynamic(cls, settings, scheme)
    steps = copy.deepcopy(layer).double()
    x = torch.randn(4, 4, 24)
    assert_near(layer(x), steps(x.double()))
    assert_near(layer(x[:, 1]), steps(x[:, 1].double()))
    for lengths in ([4, 3, 3, 1], [2, 4, 1, 3]):
        inputs = (
            pack_padded_sequence(each, torch.tensor(lengths), settings.get("batch_first", False), enforce_sorted=False)
            for each in (x, x.double())
        )
        (found, last), (expected, exact) = (each(packed) for each, packed in zip((layer, steps), inputs, strict=True))
        assert_near(found.data, expected.data)
        assert_near(last, exact)


@pytest.mark.parametrize("scheme", DYNAMIC)
@pytest.mark.parametrize(("cls", "settings"), OPERATOR_CASES)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch._dynamo does so
def test_exported_and_compiled_layers_call_an_operator_for_each_direction(
    cls: type[nn.Module], settings: dict[str, Any], scheme: str
) -> None:
    """With gradients enabled, as they are where nobody says otherwise: biases want some."""
    layer, x = dynamic(cls, settings, scheme), torch.randn(5, 3, 24)
    count = settings.get("num_layers", 1) * (2 if settings.get("bidirectional") else 1)
    axis = 0 if settings.get("batch_first") else 1
    shapes = ({axis: torch.export.Dim("batch", min=2, max=64)},)
    for strict in (False, True):
        exported = torch.export.export(layer, (x,), dynamic_shapes=shapes, strict=strict)
        called = [str(node.target) for node in exported.graph.nodes]
        assert called.count(f"fewbit.{cls.__name__.lower()}.default") == count
        for inputs in (x, torch.cat([x, -x], axis)):
            torch.testing.assert_close(exported.module()(inputs), layer(inputs), rtol=0, atol=0)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU], ids=["LSTM", "GRU"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_layers_have_gradients(cls: type[nn.Module]) -> None:
    layer, x = dynamic(cls, {"bidirectional": True}, "int8"), torch.randn(5, 3, 24)
    torch.compiler.reset()
    gradients = []
    for each in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        each(leaf)[0].square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU], ids=["LSTM", "GRU"])
@torch.no_grad()
def test_int4_groups(cls: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module, x = cls(32, 32), torch.randn(6, 3, 32)
    scheme = Scheme(QuantSpec("int4", per_group(16)), method="mse")
    layer = fewbit.quantize(module, Recipe("test", (Rule("*", scheme),)))
    assert float((layer(x)[0] - module(x)[0]).abs().max()) < 0.2


def test_dropout_between_layers_in_training_only() -> None:
    torch.manual_seed(0)
    module, x = nn.LSTM(6, 8, num_layers=2, dropout=0.5), torch.randn(7, 3, 6)
    layer = fewbit.quantize(module, Recipe("test", (Rule("*", Scheme(INT8)),)))
    assert torch.equal(layer(x)[0], layer(x)[0])
    layer.train()
    assert not torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}])
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU], ids=["LSTM", "GRU"])
@torch.no_grad()
def test_an_empty_batch(cls: type[nn.Module], settings: dict[str, Any]) -> None:
    module, layer = pair(cls, settings)
    x = torch.empty((0, 5, 6) if settings else (5, 0, 6))
    assert_close(layer(x), module(x))


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU], ids=["LSTM", "GRU"])
@torch.no_grad()
def test_scales_of_a_dtype_that_no_kernel_takes_may_be_loaded(cls: type[nn.Module]) -> None:
    layer, x = dynamic(cls, {}, "int8"), torch.randn(5, 3, 24)
    expected, state = layer(x)[0], layer.state_dict()
    half = {name: value.half() if name.endswith("_scale") else value for name, value in state.items()}
    layer.load_state_dict(half, assign=True)
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-2, atol=1e-2)
    layer.load_state_dict(state, assign=True)
    assert torch.equal(layer(x)[0], expected)


def test_wrong_shapes_are_refused() -> None:
    _, layer = pair(nn.LSTM, {})
    with pytest.raises(ValueError, match="needs 2"):
        layer(torch.randn(1, 2, 3, 6))
    with pytest.raises(ValueError, match="initial states"):
        layer(torch.randn(7, 3, 6), (torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)))


def test_flatten_parameters_may_be_called() -> None:
    _, layer = pair(nn.GRU, {})
    layer.flatten_parameters()
    assert all(name in layer.state_dict() for name in ("weight_ih_l0_packed", "bias_hh_l0"))
