"""Small networks with everything that stands between layers, for the tests of graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fewbit

Layers = Callable[[], dict[str, nn.Module]]
STATIC = replace(fewbit.load_recipe("int8-static"), sensitive=None)
IMAGES, SHORT = (4, 3, 8, 8), (4, 16)


def conv(inputs: int, outputs: int, kernel: int = 3, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **{"padding": kernel // 2, **settings})


def pair(**settings: Any) -> Layers:
    """Two convolutions, the settings for the second."""
    return lambda: {"a": conv(3, 8), "b": conv(8, 5, **settings)}


def classifier(features: int = 8, **settings: Any) -> Layers:
    return lambda: {"a": nn.Conv2d(3, 8, **{"kernel_size": 3, "padding": 1, **settings}), "f": nn.Linear(features, 5)}


def with_activation(act: nn.Module) -> tuple[Any, ...]:
    return lambda m, x: m.b(m.act(m.a(x))), lambda: {"a": conv(3, 8), "b": conv(8, 5), "act": act}


def residual(m: Any, x: Tensor) -> Tensor:
    x = m.relu(m.c1(x))
    y = m.c3(m.relu(m.c2(x)))
    y += x
    return m.f(torch.flatten(F.adaptive_avg_pool2d(m.relu(y), 1), 1))


def dense(m: Any, x: Tensor) -> Tensor:
    a = torch.relu(m.a(x))
    b = torch.relu(m.b(a))
    c = torch.relu(m.c(torch.cat([a, b], 1)))
    return m.d(torch.cat([a, b, c], 1))


def inception(m: Any, x: Tensor) -> Tensor:
    x = torch.relu(m.stem(x))
    branches = [m.a(x), m.b(x), m.c(F.max_pool2d(x, 3, 1, 1))]
    return m.head(torch.cat([torch.relu(branch) for branch in branches], 1))


def option_a(m: Any, x: Tensor) -> Tensor:
    x = torch.relu(m.a(x))
    y = m.c(torch.relu(m.b(x))) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
    return m.f(torch.relu(y).mean((2, 3)))


def shuffle(m: Any, x: Tensor) -> Tensor:
    x = torch.relu(m.a(x))
    n, c, h, w = x.shape
    return m.b(x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w))


def split_shuffle(m: Any, x: Tensor) -> Tensor:
    left, right = torch.relu(m.a(x)).chunk(2, 1)
    y = torch.cat([left, torch.relu(m.b(right))], 1)
    n, c, h, w = y.shape
    return m.c(y.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


def squeeze(m: Any, x: Tensor) -> Tensor:
    x = torch.relu(m.a(x))
    return m.b(x * torch.sigmoid(m.f2(torch.relu(m.f1(F.adaptive_avg_pool2d(x, 1))))))


def convnext(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    y = m.p2(F.gelu(m.p1(m.ln(m.dw(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
    return m.f((x + y).mean((2, 3)))


def channels_last_sum(m: Any, x: Tensor) -> Tensor:
    y, z = (torch.relu(c(x)).permute(0, 2, 3, 1) for c in (m.a, m.b))
    return m.f(y + z)


def there_and_back(m: Any, x: Tensor) -> Tensor:
    y = torch.relu(m.p(torch.relu(m.a(x)).permute(0, 2, 3, 1)))
    return m.b(y.permute(0, 3, 1, 2))


def several_outputs(m: Any, x: Tensor) -> dict[str, Any]:
    y = torch.relu(m.a(x))
    return {"map": m.b(y), "pooled": [y.mean((2, 3)), y]}


def encoder() -> dict[str, nn.Module]:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, activation="gelu", batch_first=True)
    return {"e": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), "f": nn.Linear(32, 5)}


def added(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y = y.add_(torch.relu(m.c(y)))
    return m.b(y)


MODELS: dict[str, tuple[Any, ...]] = {
    "residual": (
        residual,
        lambda: {"c1": conv(3, 8), "c2": conv(8, 8), "c3": conv(8, 8), "relu": nn.ReLU(True), "f": nn.Linear(8, 5)},
    ),
    "dense": (dense, lambda: {"a": conv(3, 8), "b": conv(8, 4), "c": conv(12, 4), "d": conv(16, 5)}),
    "inception": (
        inception,
        lambda: {"stem": conv(3, 8), "a": conv(8, 4, 1), "b": conv(8, 6), "c": conv(8, 2, 1), "head": conv(12, 5)},
    ),
    "add_inplace": (added, lambda: {"a": conv(3, 8), "c": conv(8, 8), "b": conv(8, 5)}),
    "add_itself": (lambda m, x: (lambda y: m.b(y + y))(m.a(x)), pair()),
    "add_constant": (lambda m, x: m.b(m.a(x) + 1.0), pair()),
    "add_broadcast": (lambda m, x: (lambda y: m.b(y + y.mean((2, 3), keepdim=True)))(torch.relu(m.a(x))), pair()),
    "cat_itself": (
        lambda m, x: (lambda y: m.b(torch.cat([y, y], 1)))(m.a(x)),
        lambda: {"a": conv(3, 8), "b": conv(16, 5)},
    ),
    "cat_rows": (
        lambda m, x: m.b(torch.cat([m.a(x), m.c(x)], -2)),
        lambda: {"a": conv(3, 8), "c": conv(3, 8), "b": conv(8, 5)},
    ),
    "cat_input": (lambda m, x: m.b(torch.cat([m.a(x), x], 1)), lambda: {"a": conv(3, 8), "b": conv(11, 5)}),
    "max_pool": (lambda m, x: m.b(F.max_pool2d(torch.relu(m.a(x)), 3, 2, 1)), pair()),
    "max_pool_first": (lambda m, x: m.b(torch.relu(F.max_pool2d(m.a(x), 2, ceil_mode=True))), pair()),
    "avg_pool": (lambda m, x: m.b(F.avg_pool2d(torch.relu(m.a(x)), 2)), pair()),
    "avg_pool_padded": (lambda m, x: m.b(F.avg_pool2d(m.a(x), 3, 2, 1)), pair()),
    "avg_pool_inside": (lambda m, x: m.b(F.avg_pool2d(m.a(x), 3, 2, 1, count_include_pad=False)), pair()),
    "avg_pool_ceil": (lambda m, x: m.b(F.avg_pool2d(m.a(x), 3, 2, 1, ceil_mode=True)), pair()),
    "mean": (lambda m, x: m.f(m.a(x).mean((-1, -2))), classifier()),
    "mean_keepdim": (lambda m, x: m.b(m.a(x).mean((2, 3), keepdim=True)), pair(kernel=1)),
    "adaptive": (lambda m, x: m.f(F.adaptive_avg_pool2d(torch.relu(m.a(x)), 1).view(x.shape[0], -1)), classifier()),
    "adaptive_two": (lambda m, x: m.f(F.adaptive_avg_pool2d(torch.relu(m.a(x)), 2).flatten(1)), classifier(32)),
    "option_a": (
        option_a,
        lambda: {"a": conv(3, 8), "b": conv(8, 16, stride=2), "c": conv(16, 16), "f": nn.Linear(16, 5)},
    ),
    "flatten_one": (lambda m, x: m.f(torch.relu(m.a(x)).flatten(1)), classifier(8, kernel_size=8, padding=0)),
    "flatten": (lambda m, x: m.f(torch.relu(m.a(x)).flatten(1)), classifier(72, kernel_size=6, padding=0)),
    "flatten_pool": (lambda m, x: m.f(F.max_pool2d(torch.relu(m.a(x)), 2).flatten(1)), classifier(128)),
    "tokens": (lambda m, x: m.f(m.a(x).flatten(2).transpose(1, 2)), classifier(8, kernel_size=2, stride=2, padding=0)),
    "linear_on_rows": (lambda m, x: m.f(torch.relu(m.a(x))), classifier(8)),
    "pool_linear_on_rows": (lambda m, x: m.f(F.avg_pool2d(m.a(x), 2)), classifier(4)),
    "shuffle": (shuffle, lambda: {"a": conv(3, 8), "b": conv(8, 6, groups=2)}),
    "split_shuffle": (split_shuffle, lambda: {"a": conv(3, 8), "b": conv(4, 4), "c": conv(8, 5)}),
    "dropout": with_activation(nn.Sequential(nn.ReLU(True), nn.Dropout(0.5, True))),
    "dropout_channels": with_activation(nn.Sequential(nn.ReLU(), nn.Dropout2d(0.5))),
    "hardswish": with_activation(nn.Hardswish(inplace=True)),
    "hardsigmoid": with_activation(nn.Hardsigmoid()),
    "silu": with_activation(nn.SiLU(inplace=True)),
    "sigmoid": with_activation(nn.Sigmoid()),
    "tanh": with_activation(nn.Tanh()),
    "leaky_relu": with_activation(nn.LeakyReLU(0.1)),
    "elu": with_activation(nn.ELU()),
    "gelu_tanh": with_activation(nn.GELU("tanh")),
    "mish": with_activation(nn.Mish()),
    "relu6": with_activation(nn.ReLU6(inplace=True)),
    "hardtanh": with_activation(nn.Hardtanh(-0.3, 0.4)),
    "clamp": (lambda m, x: m.b(m.a(x).clamp(-0.2, 0.5)), pair()),
    "clamp_above": (lambda m, x: m.b(m.a(x).clamp(max=0.1)), pair()),
    "clamp_positive": (lambda m, x: m.b(m.a(x).clamp(min=0.1)), pair()),
    "clamp_tensor": (lambda m, x: m.b(torch.clamp(m.a(x), min=torch.zeros(1))), pair()),
    "clamp_twice": (lambda m, x: m.b(torch.relu(m.a(x)).clamp(max=0.3)), pair()),
    "reflect": (lambda m, x: m.b(torch.relu(m.a(x))), pair(padding_mode="reflect")),
    "circular": (lambda m, x: m.b(torch.relu(m.a(x))), pair(padding_mode="circular")),
    "same": (lambda m, x: m.b(torch.relu(m.a(x))), pair(padding="same", dilation=2)),
    "same_even": (lambda m, x: m.b(torch.relu(m.a(x))), pair(kernel=4, padding="same")),
    "valid": (lambda m, x: m.b(torch.relu(m.a(x))), pair(padding="valid")),
    "pad": (lambda m, x: m.b(F.pad(m.a(x), (1, 0, 2, 1))), pair()),
    "pad_zeros": with_activation(nn.ZeroPad2d(1)),
    "pad_ones": (lambda m, x: m.b(F.pad(m.a(x), (1, 0, 2, 1), value=1.0)), pair()),
    "pad_reflect": (lambda m, x: m.b(F.pad(m.a(x), (1, 1, 1, 1), mode="reflect")), pair()),
    "groups": (lambda m, x: m.b(torch.relu(m.a(x))), lambda: {"a": conv(3, 8), "b": conv(8, 6, groups=2)}),
    "depthwise": (
        lambda m, x: m.c(torch.relu(m.b(torch.relu(m.a(x))))),
        lambda: {"a": conv(3, 8), "b": conv(8, 8, groups=8), "c": conv(8, 5, 1)},
    ),
    "multiplier": (
        lambda m, x: m.c(torch.relu(m.b(torch.relu(m.a(x))))),
        lambda: {"a": conv(3, 8), "b": conv(8, 16, groups=8), "c": conv(16, 5, 1)},
    ),
    "dilation": (lambda m, x: m.b(torch.relu(m.a(x))), pair(dilation=2, padding=2, stride=(1, 2))),
    "squeeze": (squeeze, lambda: {"a": conv(3, 8), "f1": conv(8, 4, 1), "f2": conv(4, 8, 1), "b": conv(8, 5)}),
    "encoder": (lambda m, x: m.f(m.e(x)[:, 0]), encoder, (4, 6, 32)),
    "linear": (lambda m, x: m.f(torch.relu(m.a(x))), lambda: {"a": nn.Linear(16, 8), "f": nn.Linear(8, 5)}, SHORT),
    "linear_3d": (
        lambda m, x: m.f(torch.relu(m.a(x))),
        lambda: {"a": nn.Linear(16, 8), "f": nn.Linear(8, 5)},
        (4, 3, 16),
    ),
    "linear_4d": (
        lambda m, x: m.f(torch.relu(m.a(x))),
        lambda: {"a": nn.Linear(16, 8), "f": nn.Linear(8, 5)},
        (4, 3, 2, 16),
    ),
    "convnext": (
        convnext,
        lambda: {
            "stem": conv(3, 8, 2, stride=2, padding=0),
            "dw": conv(8, 8, groups=8),
            "ln": nn.LayerNorm(8),
            "p1": nn.Linear(8, 16),
            "p2": nn.Linear(16, 8),
            "f": nn.Linear(8, 5),
        },
    ),
    "channels_last_sum": (channels_last_sum, lambda: {"a": conv(3, 8), "b": conv(3, 8), "f": nn.Linear(8, 5)}),
    "there_and_back": (there_and_back, lambda: {"a": conv(3, 8), "p": nn.Linear(8, 6), "b": conv(6, 5)}),
    "several_outputs": (several_outputs, pair()),
    "twice": (lambda m, x: m.b(torch.relu(m.b(torch.relu(m.a(x))))), lambda: {"a": conv(3, 8), "b": conv(8, 8)}),
    "from_vector": (
        lambda m, x: m.b(torch.relu(m.f(x)).view(-1, 8, 4, 4)),
        lambda: {"f": nn.Linear(16, 128), "b": conv(8, 5)},
        SHORT,
    ),
    "transposed": (
        lambda m, x: m.b(torch.relu(m.t(torch.relu(m.a(x))))),
        lambda: {"a": conv(3, 8), "t": nn.ConvTranspose2d(8, 8, 2, 2), "b": conv(8, 5)},
    ),
    "norm_after": (lambda m, x: m.b(m.n(torch.relu(m.a(x)))), lambda: {**pair()(), "n": nn.BatchNorm2d(8)}),
    "upsample": (lambda m, x: m.b(F.interpolate(torch.relu(m.a(x)), scale_factor=2)), pair()),
    "part_of_batch": (lambda m, x: m.b(torch.relu(m.a(x))[1:]), pair()),
}


@dataclass(frozen=True)
class Network:
    """A float model and batches for it."""

    model: nn.Module
    data: list[Tensor]

    def quantized(self) -> nn.Module:
        """As int8-static does it, but with every layer."""
        return fewbit.quantize(self.model, STATIC, self.data)


@pytest.fixture(scope="session")
def build(net: Any) -> Callable[[str], Network]:
    """One of MODELS by name, with four batches."""

    def make(name: str) -> Network:
        function, layers, *shape = MODELS[name]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = net(function, **layers()).eval()
            return Network(model, [torch.randn(*shape or [IMAGES]) for _ in range(4)])

    return make


@pytest.fixture(scope="session", params=MODELS)
def quantized(request: pytest.FixtureRequest, build: Any) -> tuple[nn.Module, Network]:
    """Each of MODELS, and what it was made from."""
    network = build(request.param)
    return network.quantized(), network
