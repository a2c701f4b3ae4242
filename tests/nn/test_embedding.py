"""Embedding and EmbeddingBag: equal to torch's on the dequantized table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, embedding_bag

import fewbit
from fewbit import PER_TOKEN, QuantSpec, Recipe, Rule, Scheme, per_channel, per_group
from fewbit.nn import Embedding, EmbeddingBag

SPECS = {
    "int8": QuantSpec("int8", per_channel(0)),
    "per-tensor": QuantSpec("int8"),
    "int4": QuantSpec("int4", per_group(8), symmetric=False),
    "two-level": QuantSpec("int4", per_group(8), scale=QuantSpec("uint8", PER_TOKEN, symmetric=False)),
}


def quantized(module: nn.Module, spec: QuantSpec) -> Any:
    # The input spec is for other layers: indices have nothing to quantize.
    return fewbit.quantize(module, Recipe("test", (Rule("*", Scheme(spec, QuantSpec("int8", PER_TOKEN))),)))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4), (0,)], ids=str)
@torch.no_grad()
def test_embedding_equals_torch_on_the_dequantized_table(spec: QuantSpec, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = quantized(nn.Embedding(20, 24), spec)
    assert isinstance(layer, Embedding) and layer.scheme.input is None
    indices = torch.randint(0, 20, shape)
    found = layer(indices)
    assert torch.equal(found, embedding(indices, layer.weight)) and found.shape == (*shape, 24)


@torch.no_grad()
def test_padding_row_stays_zero() -> None:
    layer = quantized(nn.Embedding(20, 24, padding_idx=3), SPECS["int8"])
    assert (layer(torch.tensor([3, 3])) == 0).all() and layer.padding_idx == 3


@torch.no_grad()
def test_half_precision_table_gives_half_precision() -> None:
    layer = quantized(nn.Embedding(20, 24, dtype=torch.bfloat16), SPECS["int8"])
    assert layer(torch.tensor([1])).dtype == torch.bfloat16
    assert layer.float()(torch.tensor([1])).dtype == torch.float32


BAGS: dict[str, tuple[dict[str, Any], Tensor, Tensor | None]] = {
    "matrix": ({}, torch.tensor([[1, 2, 4], [4, 3, 2]]), None),
    "offsets": ({}, torch.tensor([1, 2, 4, 5, 4, 3]), torch.tensor([0, 2, 5])),
    "empty-bag": ({}, torch.tensor([1, 2, 4, 5]), torch.tensor([0, 2, 2])),
    "last-offset": ({"include_last_offset": True}, torch.tensor([1, 2, 4, 5]), torch.tensor([0, 2, 4])),
    "padding": ({"padding_idx": 4}, torch.tensor([[1, 2, 4], [4, 4, 4]]), None),
    "padding-offsets": ({"padding_idx": 4}, torch.tensor([1, 4, 4, 5]), torch.tensor([0, 2])),
}


@pytest.mark.parametrize("spec", [SPECS["int8"], SPECS["int4"]], ids=["int8", "int4"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize(("settings", "indices", "offsets"), BAGS.values(), ids=BAGS)
@torch.no_grad()
def test_bag_equals_torch_on_the_dequantized_table(
    settings: dict[str, Any], indices: Tensor, offsets: Tensor | None, mode: str, spec: QuantSpec
) -> None:
    torch.manual_seed(0)
    layer = quantized(nn.EmbeddingBag(20, 24, mode=mode, **settings), spec)
    assert isinstance(layer, EmbeddingBag)
    expected = embedding_bag(indices, layer.weight, offsets, mode=mode, **settings)
    torch.testing.assert_close(layer(indices, offsets), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("padding", [None, 4], ids=["no-padding", "padding"])
@torch.no_grad()
def test_bag_with_weights_for_each_sample(padding: int | None) -> None:
    torch.manual_seed(0)
    layer = quantized(nn.EmbeddingBag(20, 24, mode="sum", padding_idx=padding), SPECS["int8"])
    for indices, offsets in (
        (torch.tensor([[1, 2, 4], [4, 3, 2]]), None),
        (torch.tensor([1, 2, 4, 3]), torch.tensor([0, 3])),
    ):
        weights = torch.rand(indices.shape)
        expected = embedding_bag(
            indices, layer.weight, offsets, mode="sum", per_sample_weights=weights, padding_idx=padding
        )
        torch.testing.assert_close(layer(indices, offsets, weights), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("cls", [nn.Embedding, nn.EmbeddingBag], ids=["Embedding", "EmbeddingBag"])
def test_max_norm_is_skipped_with_its_reason(cls: type[nn.Module]) -> None:
    model = nn.ModuleDict({"table": cls(20, 24, max_norm=1.0), "linear": nn.Linear(24, 4)})
    plan = fewbit.plan_of(quantized(model, SPECS["int8"]))
    assert list(plan.sites) == ["linear"] and "max_norm" in plan.skipped["table"]


def test_max_norm_table_of_the_float_model_is_not_rescaled_by_calibration() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 24, max_norm=0.1), nn.Linear(24, 4))
    before = model[0].weight.detach().clone()
    scheme = Scheme(SPECS["int8"], QuantSpec("uint8", symmetric=False, observer="minmax"))
    fewbit.quantize(model, Recipe("static", (Rule("type:Linear", scheme),)), [torch.arange(20)])
    assert torch.equal(model[0].weight, before)
