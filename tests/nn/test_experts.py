"""Experts of mixture models: transformers' own classes, those that transpose, have biases or no gate among them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit.nn import Experts, Student, kind_of, layer_class
from fewbit.qtensor import dequantize

transformers = pytest.importorskip("transformers")

EXPERTS, HIDDEN, INNER, TOKENS = 4, 64, 96, 10


def mixtral() -> nn.Module:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_local_experts": EXPERTS}
    return MixtralExperts(transformers.MixtralConfig(**sizes))


def gpt_oss() -> nn.Module:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_local_experts": EXPERTS}
    return GptOssExperts(transformers.GptOssConfig(**sizes))


def nemotron() -> nn.Module:
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": INNER, "n_routed_experts": EXPERTS}
    return NemotronHExperts(transformers.NemotronHConfig(**sizes, moe_latent_size=None))


class Block(nn.Module):
    """A router and its experts, as they are in a model."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(HIDDEN, EXPERTS), experts

    def forward(self, x: Tensor) -> Any:
        weights, chosen = torch.softmax(self.gate(x), 1).topk(2, 1)
        return self.experts(x, chosen, weights)


def block(make: Any) -> Block:
    torch.manual_seed(0)
    experts = make()
    with torch.no_grad():
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.2)
    experts.config._experts_implementation = "eager"
    return Block(experts).eval()


def inputs() -> Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", [mixtral, gpt_oss, nemotron])
@pytest.mark.parametrize("recipe", ["int4-weight-only", "int4-symmetric", "int8-dynamic"])
def test_quantized_experts_are_those_of_the_rounded_weights(make: Any, recipe: str) -> None:
    model, x = block(make), inputs()
    assert kind_of(model.experts) == "Experts"
    recipe_ = fewbit.load_recipe(recipe)
    quantized: Any = fewbit.quantize(model, recipe_)
    layer = quantized.experts
    assert isinstance(layer, Experts)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for name in layer._shapes:
            matrix = dequantize(layer.qtensor(name))
            parameter = rounded.experts.get_parameter(name)
            assert (parameter - layer_class(model.experts).from_matrix(model.experts, matrix)).norm() > 0
            parameter.copy_(layer_class(model.experts).from_matrix(model.experts, matrix))
        exact, found = rounded(x), quantized(x)
        error = (found - exact).norm() / exact.norm()
        whole = (found - model(x)).norm() / exact.norm()
    assert error < (0.02 if recipe == "int8-dynamic" else 1e-5)  # int8 rounds the inputs too
    assert whole < (0.03 if recipe == "int8-dynamic" else 0.2)


def test_a_token_that_chooses_one_expert_gets_what_that_expert_makes() -> None:
    model = block(mixtral)
    quantized: Any = fewbit.quantize(model, "int4-weight-only")
    x = inputs()
    alone = quantized.experts(x[:1], torch.tensor([[2]]), torch.ones(1, 1))
    together = quantized.experts(x, torch.arange(TOKENS)[:, None].add(2) % EXPERTS, torch.ones(TOKENS, 1))
    torch.testing.assert_close(together[:1], alone)
    assert quantized.experts(x[:0], torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2)).shape == (0, HIDDEN)


@pytest.mark.parametrize("make", [mixtral, gpt_oss, nemotron])
def test_a_student_trains_experts_and_becomes_what_it_simulates(make: Any) -> None:
    model, x = block(make), inputs()
    student: Any = fewbit.prepare_qat(model, "int8-dynamic")
    assert isinstance(student.experts, Student)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-2)
    with torch.no_grad():
        target = model(x).neg()
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (student(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for name, p in student.experts.named_parameters() if "bias" not in name)
    with torch.no_grad():
        simulated, converted = student.eval()(x), fewbit.convert(student)(x)
    torch.testing.assert_close(converted, simulated, rtol=1e-4, atol=1e-4)


def test_experts_of_a_language_model_are_saved_and_loaded(decoder: Any, decoder_batch: Any, tmp_path: Any) -> None:
    model = decoder("mixtral")
    quantized = fewbit.quantize(model, "int4-weight-only")
    experts = [name for name, module in quantized.named_modules() if isinstance(module, Experts)]
    assert len(experts) == model.config.num_hidden_layers
    fewbit.save(quantized, tmp_path)
    with torch.no_grad():
        again = fewbit.load(tmp_path)(**decoder_batch).logits
        assert torch.equal(again, quantized(**decoder_batch).logits)


def test_what_cannot_hold_experts_says_so(decoder: Any, tmp_path: Any) -> None:
    fewbit.save(fewbit.quantize(decoder("mixtral"), "int4-symmetric"), tmp_path / "model")
    with pytest.raises(fewbit.UnsupportedError, match=r"mlp\.experts: experts of a mixture model are not written"):
        fewbit.export_folder(tmp_path / "model", tmp_path / "out", "compressed-tensors")
