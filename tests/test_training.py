"""prepare_qat and convert: an ordinary module that starts and ends as the quantized model."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fewbit
from fewbit import PER_TOKEN, PlanError, QuantSpec, Recipe, Rule, Scheme, per_channel, per_group
from fewbit.nn import LearnedGrid, Student
from fewbit.pipeline import sites_of
from fewbit.qtensor import QTensor

INT8 = QuantSpec("int8", per_channel(0))


def train(student: nn.Module, batches: list[Tensor], steps: int = 4, rate: float = 1e-3) -> list[float]:
    """The losses of a plain loop that teaches the student zeros."""
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=rate)
    return [step(student, optimizer, batches[number % len(batches)]) for number in range(steps)]


def step(student: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> float:
    optimizer.zero_grad()
    loss = student(batch).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def assert_same(simulated: Tensor, exact: Tensor, recipe: str) -> None:
    """To the bit; an LSTM's student has float sums, and a value between two codes may get the other one."""
    if recipe == "int8-dynamic":
        torch.testing.assert_close(simulated, exact, atol=0.03 * float(exact.abs().max()), rtol=0)
    else:
        assert torch.equal(simulated, exact)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(
    params=["cnn-static", "cnn-int4", "cnn-int4-int4", "tagger-dynamic", "encoder-int4-dynamic", "encoder-static"]
)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, str, list[Tensor]]:
    name, _, recipe = request.param.partition("-")
    data = request.getfixturevalue("images" if name == "cnn" else "tokens")
    names = {"static": "int8-static", "int4": "int4-static", "int4-int4": "int4-int4-static", "dynamic": "int8-dynamic"}
    return request.getfixturevalue(name), names.get(recipe, recipe), data


def test_student_starts_and_ends_as_the_quantized_model(case: tuple[nn.Module, str, list[Tensor]]) -> None:
    model, recipe, data = case
    before = values(model)
    student = fewbit.prepare_qat(model, recipe, data)
    assert student.training and not model.training
    quantized = fewbit.quantize(model, recipe, data)
    with torch.no_grad():
        exact = quantized(data[0])
        assert_same(student.eval()(data[0]), exact, recipe)
    same = fewbit.convert(student)
    assert all(torch.equal(same.state_dict()[name], tensor) for name, tensor in quantized.state_dict().items())
    assert fewbit.plan_of(same).sites == fewbit.plan_of(quantized).sites
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_what_was_trained_is_what_runs(case: tuple[nn.Module, str, list[Tensor]]) -> None:
    model, recipe, data = case
    student = fewbit.prepare_qat(model, recipe, data)
    losses = train(student, data, 8)
    assert losses[-1] < losses[0]
    quantized = fewbit.convert(student)
    with torch.no_grad():
        assert_same(student.eval()(data[0]), quantized(data[0]), recipe)


def test_result_can_be_saved_and_loaded(cnn: nn.Module, images: list[Tensor], tmp_path: Path) -> None:
    student = fewbit.prepare_qat(cnn, "int8-static", images)
    train(student, images)
    quantized = fewbit.convert(student)
    loaded = fewbit.load(fewbit.save(quantized, tmp_path / "out"), cnn)
    assert torch.equal(loaded(images[0]), quantized(images[0]))
    assert fewbit.compare(cnn, quantized, images).outputs.sqnr > 0


def test_grids_between_layers_follow_what_training_moved(cnn: nn.Module, images: list[Tensor], static: Recipe) -> None:
    student = fewbit.prepare_qat(cnn, static, images)
    plan = fewbit.plan_of(fewbit.convert(student))
    assert plan.results
    with torch.no_grad():  # what conv2 makes is twice as large now, and goes into an addition
        student.get_parameter("conv2.weight_grid.log_scale").fill_(torch.tensor(2.0).log())
        student.get_parameter("conv2.bias").mul_(2)
        student.get_parameter("conv2.weight").mul_(2)
    moved = fewbit.convert(student)
    results = fewbit.plan_of(moved).results
    name = next(name for name in results if name.startswith("conv2"))
    assert results[name][0] == pytest.approx(2 * plan.results[name][0], rel=0.05)
    lowered = fewbit.lower(moved, images[0])
    with torch.no_grad():
        exact = moved(images[0])
        assert float((lowered(images[0]) - exact).norm() / exact.norm()) < 0.05
    other = fewbit.plan_of(fewbit.convert(student, [images[0] * 3, images[1]])).results
    assert other[name][0] > 1.1 * results[name][0]


def test_layers_that_read_one_value_share_its_grid() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            return self.left(x) + self.right(x)

    recipe = replace(fewbit.load_recipe("int8-static"), sensitive=None)
    student = fewbit.prepare_qat(Fork(), recipe, [torch.randn(4, 3, 8, 8)])
    assert student.left.input_grid is student.right.input_grid is not student.stem.input_grid
    train(student, [torch.randn(4, 3, 8, 8)])
    layers = dict(sites_of(fewbit.convert(student)))
    assert torch.equal(layers["left"].input_scale, layers["right"].input_scale)  # type: ignore[arg-type]


def test_ties_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embedding(x))

    data = [torch.randint(0, 50, (4, 6))]
    student = fewbit.prepare_qat(Tied(), Recipe("all", (Rule("*", Scheme(INT8, QuantSpec("int8", PER_TOKEN))),)))
    assert student.embedding.weight is student.head.weight and student.embedding.weight_grid is student.head.weight_grid
    train(student, data)
    quantized = fewbit.convert(student)
    assert quantized.embedding.weight_packed is quantized.head.weight_packed
    assert fewbit.plan_of(quantized).ties == (("embedding.weight", "head.weight"),)


def test_settings_of_layers_stay_readable(cnn: nn.Module, images: list[Tensor], static: Recipe) -> None:
    student = fewbit.prepare_qat(cnn, static, images)
    conv, head = student.conv2, student.head
    assert (conv.in_channels, conv.kernel_size, conv.padding) == (8, (3, 3), (1, 1))
    assert (head.in_features, head.out_features, tuple(head.weight.shape), tuple(head.bias.shape)) == (
        8,
        5,
        (5, 8),
        (5,),
    )
    assert isinstance(conv, Student) and "of Conv2d" in repr(student)


def test_training_can_be_resumed(cnn: nn.Module, images: list[Tensor], static: Recipe) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        student = fewbit.prepare_qat(cnn, static, images)
        return student, torch.optim.Adam(student.parameters(), lr=1e-3)

    student, optimizer = start()
    for batch in images:
        step(student, optimizer, batch)
    file = io.BytesIO()
    torch.save({"student": student.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    other, resumed = start()
    state = torch.load(file, weights_only=True)
    other.load_state_dict(state["student"])
    resumed.load_state_dict(state["optimizer"])
    for batch in images:
        assert step(student, optimizer, batch) == step(other, resumed, batch)
    first, second = values(fewbit.convert(student)), values(fewbit.convert(other))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_deepcopy_is_independent(cnn: nn.Module, images: list[Tensor]) -> None:
    student = fewbit.prepare_qat(cnn, "int8-static", images)
    twin = copy.deepcopy(student)
    before = values(twin)
    train(student, images)
    assert all(torch.equal(twin.state_dict()[name], tensor) for name, tensor in before.items())
    fewbit.convert(twin)


def test_autocast_trains_near_float(case: tuple[nn.Module, str, list[Tensor]]) -> None:
    model, recipe, data = case
    gradients = []
    for enabled in (False, True):
        student = fewbit.prepare_qat(model, recipe, data)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = student(data[0]).float().square().mean()
        loss.backward()
        weights = [p.grad.flatten() for n, p in student.named_parameters() if "grid" not in n and p.grad is not None]
        gradients.append(torch.cat(weights))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.9


def test_gradient_checkpointing_changes_nothing(cnn: nn.Module, images: list[Tensor], static: Recipe) -> None:
    found = []
    for checkpointed in (False, True):
        student = fewbit.prepare_qat(cnn, static, images)
        y = checkpoint(student, images[0], use_reentrant=False) if checkpointed else student(images[0])
        y.square().mean().backward()
        found.append([p.grad for p in student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_only_a_share_of_the_layers_can_be_trained(
    cnn: nn.Module, images: list[Tensor], static: Recipe, share: float
) -> None:
    student = fewbit.prepare_qat(cnn, static, images, trainable=share)
    layers = [module for module in student.modules() if isinstance(module, Student)]
    trained = [layer for layer in layers if layer.get_parameter("weight").requires_grad]
    assert len(trained) == {0.0: 0, 0.3: 1, 1.0: 3}[share]
    grids = [module for module in student.modules() if isinstance(module, LearnedGrid)]
    assert all(p.requires_grad for grid in grids for p in grid.parameters())
    assert all(layer.get_parameter("bias").requires_grad for layer in layers)
    before = values(student)
    train(student, images)
    fixed = [f"{name}.weight" for name, m in student.named_modules() if isinstance(m, Student) and m not in trained]
    assert all(torch.equal(before[name], student.state_dict()[name]) for name in fixed)


def test_share_without_data_goes_by_the_weights(mlp: nn.Module) -> None:
    recipe = Recipe("all", (Rule("*", Scheme(INT8, QuantSpec("int8", PER_TOKEN))),))
    student = fewbit.prepare_qat(mlp, recipe, trainable=0.5)
    assert sum(m.get_parameter("weight").requires_grad for m in student.modules() if isinstance(m, Student)) == 2


def test_frozen_layers_stay_frozen_and_frozen_models_are_trained(mlp: nn.Module) -> None:
    recipe = Recipe("all", (Rule("*", Scheme(INT8)),))
    mlp[0].requires_grad_(False)
    student = fewbit.prepare_qat(mlp, recipe)
    assert [student[i].weight.requires_grad for i in (0, 2, 4)] == [False, True, True]
    mlp.requires_grad_(False)
    student = fewbit.prepare_qat(mlp, recipe)
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in mlp.parameters())


def test_4_bit_activations_have_16_codes(cnn: nn.Module, images: list[Tensor]) -> None:
    quantized = fewbit.quantize(cnn, "int4-int4-static", images)
    plan = fewbit.plan_of(quantized)
    formats = {name: (site.scheme.weight.format, site.scheme.input.format) for name, site in plan.sites.items()}  # type: ignore[union-attr]
    assert formats == {"conv1": ("int8", "uint8"), "conv2": ("int4", "uint4"), "head": ("int8", "uint8")}
    x = quantized.conv2.quantized_input(torch.randn(1000) * 10)  # type: ignore[operator]
    assert len(x.unique()) <= 16
    with torch.no_grad():
        assert float((quantized(images[0]) - cnn(images[0])).norm() / cnn(images[0]).norm()) < 0.5


def test_errors(cnn: nn.Module, images: list[Tensor], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"is no student: make one with fewbit\.prepare_qat"):
        fewbit.convert(cnn)
    with pytest.raises(PlanError, match=r"trainable must be a share of the layers between 0 and 1, found 2\."):
        fewbit.prepare_qat(cnn, "int8-static", images, trainable=2)
    student = fewbit.prepare_qat(cnn, "int8-static", images)
    for wrong in (lambda: fewbit.save(student, tmp_path), lambda: fewbit.lower(student, images[0])):
        with pytest.raises(PlanError, match=r"fewbit\.convert"):
            wrong()
    for again in (fewbit.quantize, fewbit.prepare_qat):
        with pytest.raises(PlanError, match="is a student"):
            again(student, "int8-static", images)
    with pytest.raises(fewbit.CalibrationError, match="needs calibration batches"):
        fewbit.prepare_qat(cnn, "int8-static")


def test_two_processes_train_like_one() -> None:
    def losses(processes: int) -> list[float]:
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        command += ["--standalone", str(Path(__file__).parent / "data_parallel.py")]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-2000:]
        return [float(word) for word in result.stdout.split()]

    one, two = losses(1), losses(2)
    assert len(one) == 12 and one[5] < one[0]
    assert one == pytest.approx(two, rel=1e-3)
    assert one[:6] == pytest.approx(one[6:], rel=1e-3)


TWO_LEVELS = QuantSpec(
    "int4",
    per_group(16),
    symmetric=False,
    scale=QuantSpec("uint8", per_channel(0), symmetric=False),
    scale_dtype="bfloat16",
)


def test_scales_of_two_levels_are_trained() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 24)), torch.randn(50, 64)
    recipe = Recipe("two levels", (Rule("type:Linear", Scheme(TWO_LEVELS, method="mse")),))
    student, start = fewbit.prepare_qat(model, recipe), fewbit.quantize(model, recipe)
    [(_, before)] = sites_of(fewbit.convert(student))
    assert torch.equal(before.qtensor().packed, dict(sites_of(start))["0"].qtensor().packed)
    optimizer = torch.optim.Adam([p for name, p in student.named_parameters() if "log_scale" in name], lr=0.01)
    losses = []
    for _ in range(30):
        loss = (student(x) - model(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    trained = fewbit.convert(student)
    [(_, after)] = sites_of(trained)
    old, new = before.qtensor().scale, after.qtensor().scale
    assert isinstance(old, QTensor) and isinstance(new, QTensor)
    assert torch.equal(old.scale, new.scale) and not torch.equal(old.codes, new.codes)  # type: ignore[arg-type]
    torch.testing.assert_close(trained(x), student.eval()(x), atol=1e-5, rtol=0)


def test_scales_of_two_levels_do_not_round_to_zero() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24))
    student = fewbit.prepare_qat(model, Recipe("two levels", (Rule("type:Linear", Scheme(TWO_LEVELS, method="mse")),)))
    grid = student.get_submodule("0").get_submodule("weight_grid")
    assert isinstance(grid, LearnedGrid)
    with torch.no_grad():
        grid.log_scale.fill_(-20.0)
    scale, _ = grid.values()
    assert isinstance(scale, QTensor) and int(scale.codes.min()) == 1
    student(torch.randn(8, 64)).sum().backward()
    assert grid.log_scale.grad is not None and bool((grid.log_scale.grad != 0).all())
