"""The walk through a model's blocks with two streams of hidden states."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit import QuantSpec, Recipe, Rule, Scheme, per_channel, per_group
from fewbit.batches import Call
from fewbit.methods import METHODS, Gptq, Moments
from fewbit.pipeline import float_twin
from fewbit.plan import make_plan
from fewbit.qtensor import dequantize
from fewbit.sequential import (
    HEAVY,
    Streams,
    _without_heavy_tokens,
    find_blocks,
    find_walk,
    quantize_block,
    quantize_blocks,
)

WEIGHT = QuantSpec("int4", per_group(32), symmetric=False)
GPTQ = Recipe("gptq", (Rule("type:Linear", Scheme(WEIGHT, method="gptq")),))
BOTH = Recipe("both", (Rule("type:Linear|Embedding", Scheme(WEIGHT, method="gptq")),))
WIDTH, HEADS, VOCABULARY = 64, 4, 96


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), mask=mask)
        y = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """Decoder blocks between a table and a head of the same weight."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.head(self.norm(x))


@pytest.fixture
def llama() -> Llama:
    torch.manual_seed(0)
    return Llama().eval()


def texts(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (2, 40), generator=generator) for _ in range(count)]


def of_blocks(model: nn.Module) -> dict[str, Any]:
    return {name: site for name, site in make_plan(model, GPTQ).sites.items() if name.startswith("blocks.")}


def error(model: nn.Module, other: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        return float(torch.stack([(model(x) - other(x)).square().sum() for x in batches]).sum())


def test_the_blocks_are_the_largest_list_of_one_type(llama: Llama) -> None:
    llama.small = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))
    llama.mixed = nn.ModuleList([nn.Linear(999, 999), nn.ReLU()])
    assert find_blocks(llama) == [f"blocks.{number}" for number in range(len(llama.blocks))]
    assert find_blocks(llama.blocks) == [str(number) for number in range(len(llama.blocks))]
    assert find_blocks(nn.Sequential(nn.Linear(4, 4))) == []


def test_what_is_walked_is_what_wants_inputs(llama: Llama) -> None:
    walk = find_walk(llama, make_plan(llama, BOTH).sites)
    inside = walk.blocks
    assert set(walk.outside) == {"head"}
    assert list(inside) == ["blocks.0", "blocks.1", "blocks.2"]
    layers = {"attention.q", "attention.k", "attention.v", "attention.o", "gate", "up", "down"}
    assert all(set(sites) == layers for sites in inside.values())
    rounding = Recipe("rtn", (Rule("type:Linear", Scheme(WEIGHT)),))
    assert find_walk(llama, make_plan(llama, rounding).sites).names == set()
    flat = nn.Sequential(nn.Linear(64, 64))
    assert find_walk(flat, make_plan(flat, GPTQ).sites).names == set()


def test_it_is_better_than_the_search_on_other_data(llama: Llama) -> None:
    seen, new = texts(30, seed=1), texts(5, seed=2)
    search = Recipe("search", (Rule("type:Linear", Scheme(WEIGHT, method="mse")),))
    walk = fewbit.quantize(llama, GPTQ, seen)
    assert error(llama, walk, new) < 0.85 * error(llama, fewbit.quantize(llama, search, seen), new)


def test_the_model_is_left_alone(llama: Llama) -> None:
    before = copy.deepcopy(llama.state_dict())
    qmodel = fewbit.quantize(llama, GPTQ, texts(3, seed=1))
    assert all(torch.equal(before[name], value) for name, value in llama.state_dict().items())
    assert not any(module._forward_pre_hooks for model in (llama, qmodel) for module in model.modules())
    assert all(p.is_leaf for p in llama.parameters())


@pytest.mark.parametrize("kind", ["list", "iterator"])
def test_it_is_repeatable(llama: Llama, kind: str) -> None:
    data = texts(4, seed=1)
    first = fewbit.quantize(llama, GPTQ, data)
    second = fewbit.quantize(llama, GPTQ, data if kind == "list" else iter(data))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_without_data_it_is_the_search(llama: Llama) -> None:
    qmodel = fewbit.quantize(llama, GPTQ)
    expected = METHODS["mse"].quantize(llama.blocks[1].gate.weight, WEIGHT)
    assert torch.equal(qmodel.blocks[1].gate.qtensor().packed, expected.packed)


def captured(call: Callable[[], Any], module: nn.Module) -> Tensor:
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        call()
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


def test_streams_are_those_of_the_float_and_of_the_quantized_model(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the last layer is quantized for is what it gets in the model that comes out."""
    given: list[tuple[Tensor, Tensor]] = []

    def add(self: Moments, X: Tensor, Z: Tensor) -> None:
        given.append((X, Z))

    data = texts(1, seed=1)
    monkeypatch.setattr("fewbit.sequential.HEAVY", 1e9)
    with monkeypatch.context() as context:
        original = Moments.add
        context.setattr(Moments, "add", lambda self, X, Z: (add(self, X, Z), original(self, X, Z))[1])
        qmodel = fewbit.quantize(llama, GPTQ, data)
    X, Z = (torch.cat(parts) for parts in zip(*given[-2:], strict=True))  # those of the last stage, held out last
    torch.testing.assert_close(X, captured(lambda: llama(data[0]), llama.blocks[2].down))
    torch.testing.assert_close(Z, captured(lambda: qmodel(data[0]), qmodel.blocks[2].down), rtol=1e-3, atol=1e-5)


def test_one_linear_layer_as_a_block_is_the_method_on_its_inputs() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Sequential(nn.Linear(64, 32))])})
    data = [torch.randn(80, 64) for _ in range(2)]
    sites = make_plan(model, GPTQ).sites
    streams = Streams(list(data), list(data), [Call((), {})] * 2)
    found = quantize_block(model["blocks"][0], find_walk(model, sites).blocks["blocks.0"], streams)
    seen, held_out = Moments.zeros(64), Moments.zeros(64)
    for x in data:
        seen.add(x[:70], x[:70])
        held_out.add(x[70:], x[70:])
    layer = model["blocks"][0][0]
    expected = Gptq().quantize_for(layer.weight.detach(), WEIGHT, seen, held_out)
    assert torch.equal(found["0"]["weight"].codes, expected.codes)
    with torch.no_grad():
        torch.testing.assert_close(streams.x[0], layer(data[0]))
        torch.testing.assert_close(streams.z[0], nn.functional.linear(data[0], dequantize(expected), layer.bias))


def test_a_head_tied_to_the_table_is_quantized_for_its_inputs(llama: Llama) -> None:
    seen, new = texts(30, seed=1), texts(5, seed=2)
    walk = fewbit.quantize(llama, BOTH, seen)
    assert walk.head.weight_packed is walk.table.weight_packed
    search = Recipe("search", (Rule("type:Linear|Embedding", Scheme(WEIGHT, method="mse")),))
    assert error(llama, walk, new) < 0.85 * error(llama, fewbit.quantize(llama, search, seen), new)


def test_a_layer_that_is_never_called_is_searched(llama: Llama) -> None:
    for block in llama.blocks:
        block.spare = nn.Linear(64, 64)
    qmodel = fewbit.quantize(llama, GPTQ, texts(2, seed=1))
    expected = METHODS["mse"].quantize(llama.blocks[0].spare.weight, WEIGHT)
    assert torch.equal(qmodel.blocks[0].spare.qtensor().packed, expected.packed)


def test_blocks_that_get_different_arguments(llama: Llama) -> None:
    """Each block is called with its own mask."""

    class Windowed(Llama):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.table(tokens)
            full = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
            for number, block in enumerate(self.blocks):
                x = block(x, mask=full.triu(-4) if number % 2 else full)
            return self.head(self.norm(x))

    torch.manual_seed(0)
    model = Windowed().eval()
    twin = float_twin(model, make_plan(model, GPTQ))
    data = texts(2, seed=1)
    walk = find_walk(twin, make_plan(model, GPTQ).sites)
    found = list(quantize_blocks(twin, walk, [Call((x,), {}) for x in data], lambda block: {}))
    assert sum(map(len, found)) == 21
    qmodel = fewbit.quantize(model, GPTQ, texts(20, seed=1))
    search = fewbit.quantize(model, Recipe("search", (Rule("type:Linear", Scheme(WEIGHT, method="mse")),)), data)
    assert error(model, qmodel, texts(3, seed=2)) < error(model, search, texts(3, seed=2))


def test_heavy_tokens_are_made_smaller_in_both_streams() -> None:
    torch.manual_seed(0)
    X = torch.randn(50, 8)
    X[0] *= 1e4
    Z = X + 0.1
    few, same = _without_heavy_tokens(X, Z)
    assert torch.equal(few[1:], X[1:]) and torch.equal(same[1:], Z[1:])
    median = X.square().sum(1).median()
    assert float(few[0].square().sum() / median) == pytest.approx(HEAVY, rel=1e-4)
    torch.testing.assert_close(same[0] / few[0], Z[0] / X[0])
    zeros = torch.zeros(4, 8)
    assert torch.equal(_without_heavy_tokens(zeros, zeros)[0], zeros)


def test_a_weight_that_is_not_finite_is_named(llama: Llama) -> None:
    streams = Streams([torch.randn(1, 5, WIDTH)], [torch.randn(1, 5, WIDTH)], [Call((torch.ones(5, 5).bool(),), {})])
    with torch.no_grad():
        llama.blocks[0].gate.weight[0, 0] = torch.nan
    with pytest.raises(fewbit.PlanError, match=r"gate\.weight: cannot be quantized: found 1 NaN"):
        quantize_block(llama.blocks[0], find_walk(llama, of_blocks(llama)).blocks["blocks.0"], streams)


def test_huggingface_llama() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    data = [{"input_ids": x} for x in texts(20, seed=1)]
    table = Scheme(QuantSpec("int8", per_channel(0)), method="mse")
    recipe = Recipe("both", (Rule("type:Embedding", table), Rule("lm_head", table), *GPTQ.rules))
    qmodel = fewbit.quantize(model, recipe, data)
    search = fewbit.quantize(model, Recipe("search", (Rule("type:Linear", Scheme(WEIGHT, method="mse")),)), data)
    with torch.no_grad():
        (new,) = texts(1, seed=2)
        errors = [float((model(new).logits - other(new).logits).square().sum()) for other in (qmodel, search)]
    assert errors[0] < errors[1]
