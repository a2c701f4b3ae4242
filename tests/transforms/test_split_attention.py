"""split_attention: the arguments and results of torch.nn.MultiheadAttention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit import QuantSpec, Recipe, Rule, Scheme, per_channel
from fewbit.transforms import TRANSFORMS, MultiheadAttention
from fewbit.transforms.split_attention import find_attention, split_attention

BATCH, QUERIES, KEYS, SIZE, HEADS = 3, 5, 7, 16, 4
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch-first": {"batch_first": True},
    "kdim-vdim": {"kdim": 10, "vdim": 6},
    "kdim-vdim-batch-first": {"kdim": 10, "vdim": 6, "batch_first": True},
    "no-bias": {"bias": False},
    "bias-kv": {"add_bias_kv": True},
    "zero-attn": {"add_zero_attn": True},
    "bias-kv-zero-attn": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}
INT8 = Scheme(QuantSpec("int8", per_channel(0)))


def attention(settings: dict[str, Any]) -> tuple[nn.MultiheadAttention, nn.Module]:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(SIZE, HEADS, **settings).eval()
    for parameter in module.parameters():  # biases start at zero
        nn.init.normal_(parameter, std=0.3)
    twin = split_attention(copy.deepcopy(module), [""])
    assert isinstance(twin, MultiheadAttention)
    return module, twin


def inputs(settings: dict[str, Any], batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    def data(length: int, size: int) -> Tensor:
        if not batched:
            return torch.randn(length, size)
        return torch.randn(BATCH, length, size) if settings.get("batch_first") else torch.randn(length, BATCH, size)

    return data(QUERIES, SIZE), data(KEYS, settings.get("kdim", SIZE)), data(KEYS, settings.get("vdim", SIZE))


def masks(name: str, batched: bool) -> dict[str, Any]:
    """Arguments that mask; no row of them masks everything."""
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[0, 5:] = padding[2, 3:] = True
    padding = padding if batched else padding[0]
    boolean = torch.rand(QUERIES, KEYS) > 0.6
    boolean[:, :2] = False
    many = torch.rand((BATCH if batched else 1) * HEADS, QUERIES, KEYS) > 0.6
    many[:, :, :2] = False
    choices: dict[str, dict[str, Any]] = {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "padding-float": {"key_padding_mask": torch.zeros(padding.shape).masked_fill(padding, -torch.inf)},
        "2d-bool": {"attn_mask": boolean},
        "2d-float": {"attn_mask": torch.randn(QUERIES, KEYS)},
        "3d-bool": {"attn_mask": many},
        "3d-float": {"attn_mask": torch.randn(many.shape)},
        "2d-bool-padding": {"attn_mask": boolean, "key_padding_mask": padding},
        "3d-bool-padding": {"attn_mask": many, "key_padding_mask": padding},
    }
    return choices[name]


def assert_same(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    assert (found[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", ["none", "average", "each"])
@pytest.mark.parametrize(
    "mask",
    [
        "none",
        "padding",
        "padding-float",
        "2d-bool",
        "2d-float",
        "3d-bool",
        "3d-float",
        "2d-bool-padding",
        "3d-bool-padding",
    ],
)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@torch.no_grad()
def test_equals_torch(settings: dict[str, Any], batched: bool, mask: str, weights: str) -> None:
    module, twin = attention(settings)
    data, masking = inputs(settings, batched), masks(mask, batched)
    asked = {"need_weights": weights != "none", "average_attn_weights": weights == "average"}
    assert_same(twin(*data, **masking, **asked), module(*data, **masking, **asked))


@torch.no_grad()
def test_causal_hint_with_its_mask() -> None:
    module, twin = attention({"batch_first": True})
    x = torch.randn(BATCH, QUERIES, SIZE)
    mask = nn.Transformer.generate_square_subsequent_mask(QUERIES)
    for need in (True, False):
        arguments = {"attn_mask": mask, "is_causal": True, "need_weights": need}
        assert_same(twin(x, x, x, **arguments), module(x, x, x, **arguments))


def test_gradients_equal_torch() -> None:
    module, twin = attention({})
    x = torch.randn(QUERIES, BATCH, SIZE)
    gradients = []
    for each in (module, twin):
        leaf = x.clone().requires_grad_()
        each(leaf, leaf, leaf)[0].square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)


def test_one_attention_under_two_names_stays_one() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.MultiheadAttention(SIZE, HEADS)
            self.second = self.first

    model = Shared()
    split_attention(model, find_attention(model))
    assert isinstance(model.first, MultiheadAttention) and model.first is model.second


def test_subclasses_are_left_alone() -> None:
    class Mine(nn.MultiheadAttention):
        pass

    assert find_attention(nn.Sequential(Mine(SIZE, HEADS), nn.MultiheadAttention(SIZE, HEADS))) == ["1"]
    assert TRANSFORMS["split_attention"].find(nn.Sequential(Mine(SIZE, HEADS)), None) == []


def small(batch_first: bool, **settings: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(SIZE, HEADS, 32, batch_first=batch_first, dropout=0.1, **settings)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def padding(masked: bool) -> Tensor | None:
    mask = torch.zeros(BATCH, QUERIES, dtype=torch.bool)
    mask[0, 3:] = True
    return mask if masked else None


@pytest.mark.parametrize("norm_first", [False, True], ids=["norm-last", "norm-first"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "padding"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "batch-second"])
def test_split_encoder_equals_float(batch_first: bool, masked: bool, norm_first: bool) -> None:
    model = small(batch_first, norm_first=norm_first)
    twin = split_attention(copy.deepcopy(model), find_attention(model))
    x = torch.randn(BATCH, QUERIES, SIZE) if batch_first else torch.randn(QUERIES, BATCH, SIZE)
    mask = padding(masked)
    kept = torch.ones(BATCH, QUERIES, dtype=torch.bool) if mask is None else ~mask
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode:
            found, expected = twin(x, src_key_padding_mask=mask), model(x, src_key_padding_mask=mask)
        rows = kept if batch_first else kept.T
        torch.testing.assert_close(found[rows], expected[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("masked", [False, True], ids=["all", "padding"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "batch-second"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_quantized_encoder_is_the_same_with_and_without_gradients(
    batch_first: bool, masked: bool, nested: bool
) -> None:
    model = small(batch_first)
    model.enable_nested_tensor = model.use_nested_tensor = nested and batch_first
    recipe = Recipe("test", (Rule("type:Linear", INT8),), ("split_attention",))
    quantized = fewbit.quantize(model, recipe)
    assert len(fewbit.plan_of(quantized).sites) == 2 * 6
    x = torch.randn(BATCH, QUERIES, SIZE) if batch_first else torch.randn(QUERIES, BATCH, SIZE)
    mask = padding(masked)
    with torch.no_grad():
        without = quantized(x, src_key_padding_mask=mask)
        exact = model(x, src_key_padding_mask=mask)
    assert torch.equal(without, quantized(x, src_key_padding_mask=mask).detach())
    kept = torch.ones(BATCH, QUERIES, dtype=torch.bool) if mask is None else ~mask
    rows = kept if batch_first else kept.T
    error = float((without - exact)[rows].abs().max())
    assert 0 < error < 0.05


def test_quantized_encoder_layer_alone() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(SIZE, HEADS, 32, batch_first=True).eval()
    quantized = fewbit.quantize(model, Recipe("test", (Rule("type:Linear", INT8),), ("split_attention",)))
    x = torch.randn(BATCH, QUERIES, SIZE)
    with torch.no_grad():
        without, exact = quantized(x), model(x)
    assert torch.equal(without, quantized(x).detach())
    assert 0 < float((without - exact).abs().max()) < 0.05


def test_quantized_decoder_reaches_self_and_cross_attention() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(SIZE, HEADS, 1, 1, 32, batch_first=True).eval()
    quantized = fewbit.quantize(model, Recipe("test", (Rule("type:Linear", INT8),), ("split_attention",)))
    assert len(fewbit.plan_of(quantized).sites) == 6 + 10
    source, target = torch.randn(BATCH, KEYS, SIZE), torch.randn(BATCH, QUERIES, SIZE)
    with torch.no_grad():
        assert 0 < float((quantized(source, target) - model(source, target)).abs().max()) < 0.05


def test_float_model_keeps_its_attention(encoder: nn.Module) -> None:
    fewbit.quantize(encoder, "int8-dynamic")
    assert sum(type(module) is nn.MultiheadAttention for module in encoder.modules()) == 2


def test_a_model_that_is_one_attention() -> None:
    module, _ = attention({"batch_first": True})
    recipe = Recipe("test", (Rule("type:Linear", INT8),), ("split_attention",))
    quantized = fewbit.quantize(module, recipe)
    x = torch.randn(BATCH, QUERIES, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(quantized(x, x, x)[0], module(x, x, x)[0], atol=0.05, rtol=0.05)
    assert set(fewbit.plan_of(quantized).sites) == {"q_proj", "k_proj", "v_proj", "out_proj"}
