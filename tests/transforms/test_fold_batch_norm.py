"""fold_batch_norm: same function, and where it must not be done."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit import QuantSpec, Recipe, Rule, Scheme, per_channel
from fewbit.graph import Topology, read_topology
from fewbit.transforms import TRANSFORMS
from fewbit.transforms.fold_batch_norm import find_batch_norms, fold_batch_norms

Make = Callable[[], nn.Module]
FOLDED: dict[str, tuple[Make, Callable[[int, bool], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda n, a: nn.BatchNorm1d(n, affine=a), (2, 4, 8)),
    "conv1d-groups": (lambda: nn.Conv1d(4, 6, 3, groups=2), lambda n, a: nn.BatchNorm1d(n, affine=a), (2, 4, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), lambda n, a: nn.BatchNorm2d(n, affine=a), (2, 4, 8, 8)),
    "conv2d-no-bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), lambda n, a: nn.BatchNorm2d(n, affine=a), (2, 4, 8, 8)),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), lambda n, a: nn.BatchNorm2d(n, affine=a), (2, 4, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), lambda n, a: nn.BatchNorm3d(n, affine=a), (2, 4, 4, 4, 4)),
    "transposed1d": (
        lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
        lambda n, a: nn.BatchNorm1d(n, affine=a),
        (2, 4, 8),
    ),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3), lambda n, a: nn.BatchNorm2d(n, affine=a), (2, 4, 5, 5)),
    "transposed2d-groups": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
        lambda n, a: nn.BatchNorm2d(n, affine=a),
        (2, 4, 5, 5),
    ),
    "transposed3d-groups": (
        lambda: nn.ConvTranspose3d(4, 6, 2, groups=2),
        lambda n, a: nn.BatchNorm3d(n, affine=a),
        (2, 4, 3, 3, 3),
    ),
    "linear": (lambda: nn.Linear(4, 6), lambda n, a: nn.BatchNorm1d(n, affine=a), (5, 4)),
    "linear-no-bias": (lambda: nn.Linear(4, 6, bias=False), lambda n, a: nn.BatchNorm1d(n, affine=a), (5, 4)),
}


def randomized(norm: nn.Module) -> nn.Module:
    assert isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


def topology_of(model: nn.Module, x: Tensor) -> Topology:
    found = read_topology(model.eval(), (x,), {})
    assert isinstance(found, Topology)
    return found


def pairs_of(model: nn.Module, x: Tensor) -> list[tuple[str, str]]:
    return find_batch_norms(model, topology_of(model, x))


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize(("make", "norm", "shape"), FOLDED.values(), ids=FOLDED)
def test_folded_model_computes_the_same(
    make: Make, norm: Callable[[int, bool], nn.Module], shape: tuple[int, ...], affine: bool
) -> None:
    torch.manual_seed(0)
    layer = make()
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    model = nn.Sequential(layer, randomized(norm(channels, affine)), nn.ReLU()).eval()
    x = torch.randn(shape)
    pairs = pairs_of(model, x)
    assert pairs == [("0", "1")]
    folded = copy.deepcopy(model)
    fold_batch_norms(folded, pairs)
    assert isinstance(folded[1], nn.Identity)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=1e-5)


def test_deep_model_computes_the_same(cnn: nn.Module, images: list[Tensor]) -> None:
    pairs = pairs_of(cnn, images[0])
    assert pairs == [("conv1", "norm1"), ("conv2", "norm2")]
    folded = copy.deepcopy(cnn)
    fold_batch_norms(folded, pairs)
    with torch.no_grad():
        torch.testing.assert_close(folded(images[0]), cnn(images[0]), atol=1e-5, rtol=1e-5)


class Pair(nn.Module):
    """A convolution and a norm, put together as ``rule`` says."""

    def __init__(self, rule: Callable[[nn.Module, nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = randomized(nn.BatchNorm2d(4))
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self.conv, self.norm, x)


def result_used_twice(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    y = conv(x)
    return norm(y) + y


NOT_FOLDED: dict[str, Callable[[nn.Module, nn.Module, Tensor], Tensor]] = {
    "result-used-twice": result_used_twice,
    "conv-called-twice": lambda conv, norm, x: norm(conv(x)) + conv(2 * x),
    "norm-called-twice": lambda conv, norm, x: norm(conv(x)) + norm(x),
    "norm-in-front": lambda conv, norm, x: conv(norm(x)),
    "something-between": lambda conv, norm, x: norm(torch.relu(conv(x))),
}


@pytest.mark.parametrize("rule", NOT_FOLDED.values(), ids=NOT_FOLDED)
def test_not_folded_where_it_would_change_the_function(rule: Callable[[nn.Module, nn.Module, Tensor], Tensor]) -> None:
    assert pairs_of(Pair(rule), torch.randn(2, 4, 6, 6)) == []


def test_folded_where_nothing_stands_against_it() -> None:
    assert pairs_of(Pair(lambda conv, norm, x: norm(conv(x))), torch.randn(2, 4, 6, 6)) == [("conv", "norm")]


def test_conv_result_that_is_also_an_output_is_not_folded() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), randomized(nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return self.norm(y), y

    assert pairs_of(Both(), torch.randn(2, 4, 6, 6)) == []


def test_shared_weights_are_not_folded() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), randomized(nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 1))
    model[2].weight = model[0].weight
    assert pairs_of(model, torch.randn(2, 4, 6, 6)) == []


def test_norm_without_running_statistics_is_not_folded() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    assert pairs_of(model, torch.randn(2, 4, 6, 6)) == []


def test_linear_whose_channels_are_not_the_norms_is_not_folded() -> None:
    model = nn.Sequential(nn.Linear(6, 5), randomized(nn.BatchNorm1d(3)))
    assert pairs_of(model, torch.randn(2, 3, 6)) == []


def test_without_a_topology_nothing_is_found() -> None:
    transform = TRANSFORMS["fold_batch_norm"]
    assert transform.needs_graph and transform.find(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), None) == []


def test_model_that_does_not_export_is_still_quantized_with_the_reason() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3), randomized(nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            return y if float(y.sum()) > 0 else -y

    torch.manual_seed(0)
    model, x = Branching().eval(), torch.randn(2, 4, 6, 6)
    quantized = fewbit.quantize(model, "int8-static", [x])
    plan = fewbit.plan_of(quantized)
    assert list(plan.sites) == ["conv"] and not plan.transforms
    assert plan.skipped["transform fold_batch_norm"].startswith("torch.export: ")
    assert isinstance(quantized.get_submodule("norm"), nn.BatchNorm2d)
    with torch.no_grad():
        torch.testing.assert_close(quantized(x), model(x), atol=0.1, rtol=0.1)


def test_without_calibration_the_reason_says_so() -> None:
    scheme = Scheme(QuantSpec("int8", per_channel(0)))
    recipe = Recipe("test", (Rule("type:Conv2d", scheme),), ("fold_batch_norm",))
    model = nn.Sequential(nn.Conv2d(4, 4, 1), randomized(nn.BatchNorm2d(4)))
    assert "calibration" in fewbit.plan_of(fewbit.quantize(model, recipe)).skipped["transform fold_batch_norm"]


def test_quantized_model_is_folded_and_the_float_model_is_not(cnn: nn.Module, images: list[Tensor]) -> None:
    before = copy.deepcopy(cnn.state_dict())
    quantized = fewbit.quantize(cnn.train(), "int8-static", images)
    assert fewbit.plan_of(quantized).transforms["fold_batch_norm"] == [["conv1", "norm1"], ["conv2", "norm2"]]
    assert isinstance(quantized.get_submodule("norm1"), nn.Identity)
    assert not any(module.training for module in quantized.modules())
    assert isinstance(cnn.get_submodule("norm1"), nn.BatchNorm2d)
    assert all(torch.equal(value, before[name]) for name, value in cnn.state_dict().items())
