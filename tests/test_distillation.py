"""finetune: reproducible, never worse than quantizing on what is held out, and it leaves everything else alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fewbit
from fewbit import CalibrationError, PlanError, QuantSpec, Recipe, Rule, Scheme, Training, UnsupportedError, per_channel
from fewbit.distillation import Target, _Data, _groups

LOW = Recipe(
    "low",
    (Rule("*", Scheme(QuantSpec("int4", per_channel(0)), QuantSpec("uint4", symmetric=False, observer="mse"), "mse")),),
)


def network(seed: int) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5)).eval()
    return model, list(torch.randn(256, 16).split(32))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.head((x + self.second(x)).relu().mean((2, 3)))


def held_out_error(model: nn.Module, candidate: nn.Module, batches: list[Tensor], settings: Training) -> float:
    data = _Data(model, batches, settings)
    with torch.no_grad():
        pairs = [(candidate(batch), model(batch)) for batch in data.held_out]
        return sum(float(Target.of(exact).distance(found, settings.temperature)) for found, exact in pairs) / len(pairs)


@torch.no_grad()
def error_on(x: Tensor, model: nn.Module, candidate: nn.Module) -> float:
    return float(Target.of(model(x)).distance(candidate(x), 2.0))


def equal(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("seed", range(20))
def test_result_is_never_worse_than_its_start(seed: int) -> None:
    model, batches = network(seed)
    rate = 10.0 ** (seed % 4 - 3)  # the largest destroys the model
    settings = Training(weight_rate=rate, step_rate=rate / 5, held_out=0.25, seed=seed)
    data = _Data(model, batches, settings)
    start = fewbit.quantize(model, LOW, data.calibration())
    tuned = fewbit.finetune(model, LOW, batches, steps=30, training=settings)
    before, after = (held_out_error(model, candidate, batches, settings) for candidate in (start, tuned))
    assert after <= before * (1 + 1e-4)
    fresh = torch.randn(4096, 16)  # data that neither trained nor judged
    before, after = (error_on(fresh, model, candidate) for candidate in (start, tuned))
    assert after <= before * (1 + 1e-4)


def test_training_helps() -> None:
    model, batches = network(0)
    settings = Training(weight_rate=0.02, held_out=0.25)
    start = fewbit.quantize(model, LOW, _Data(model, batches, settings).calibration())
    tuned = fewbit.finetune(model, LOW, batches, steps=300, training=settings)
    before, after = (held_out_error(model, candidate, batches, settings) for candidate in (start, tuned))
    assert after < 0.8 * before


def test_half_precision_learns_in_small_steps() -> None:
    model, batches = network(0)
    model, batches = model.bfloat16(), [batch.bfloat16() for batch in batches]
    settings = Training(held_out=0.25, step_rate=0.0)  # weights alone
    start = fewbit.quantize(model, LOW, _Data(model, batches, settings).calibration())
    tuned = fewbit.finetune(model, LOW, batches, steps=300, training=settings)
    before, after = (held_out_error(model, candidate, batches, settings) for candidate in (start, tuned))
    assert after < 0.9 * before
    assert {p.dtype for p in tuned.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_is_for_what_trains_alone(autocast: bool) -> None:
    model, batches = network(0)
    seen: dict[torch.dtype, set[bool]] = {}

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        seen.setdefault(output.dtype, set()).add(torch.is_grad_enabled())
        return output.new_zeros(())

    settings = Training(weight_rate=0.02, held_out=0.25, autocast=autocast)
    start = fewbit.quantize(model, LOW, _Data(model, batches, settings).calibration())
    tuned = fewbit.finetune(model, LOW, batches, steps=300, loss=loss, training=settings)
    half = {torch.bfloat16: {True}, torch.float32: {False}}
    assert seen == (half if autocast else {torch.float32: {True, False}})
    before, after = (held_out_error(model, candidate, batches, settings) for candidate in (start, tuned))
    assert after < 0.8 * before
    assert {p.dtype for p in tuned.parameters()} == {torch.float32}


def test_what_trains_in_bfloat16_is_compared_as_what_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.normalize(self.linear(x), dim=1)
            return y if y.dtype == torch.float32 else 1.01 * y  # as far off as bfloat16 may be

    seen: list[bool] = []
    distance = Target.distance
    monkeypatch.setattr(Target, "distance", lambda self, *rest: (seen.append(self.logits), distance(self, *rest))[1])
    batches = list(torch.randn(256, 16).split(32))
    fewbit.finetune(Encoder().eval(), LOW, batches, steps=4, training=Training(autocast=True, held_out=0.25))
    assert seen and not any(seen)


def test_a_negative_loss_that_falls_is_trained_to_the_end() -> None:
    model, batches = network(0)
    count = 0

    def counted(batch: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return batch

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        return -nn.functional.cosine_similarity(output, model(batch).detach()).mean()

    settings = Training(teacher=0.0, held_out=0.25, batch_size=32)
    fewbit.finetune(model, LOW, batches, steps=80, loss=loss, training=settings, augment=counted)
    assert count == 80


def test_features_bring_the_outputs_of_layers_nearer() -> None:
    torch.manual_seed(0)
    hidden = [layer for _ in range(5) for layer in (nn.Linear(32, 32), nn.ReLU())]
    model = nn.Sequential(*hidden, nn.Linear(32, 5)).eval()
    batches, x = list(torch.randn(512, 32).split(32)), torch.randn(1024, 32)
    found = []
    for features in (0.0, 10.0):
        settings = Training(weight_rate=0.02, held_out=0.25, features=features)
        tuned: Any = fewbit.finetune(model, LOW, batches, steps=200, training=settings)
        with torch.no_grad():
            inner, exact = tuned[:8](x), model[:8](x)
        found.append(float((inner - exact).norm() / exact.norm()))
        assert not any(module._forward_hooks for module in (*model.modules(), *tuned.modules()))
    assert found[1] < 0.85 * found[0]


class EarlyExit(nn.Module):
    """Calls its second layer only if a value is large: the student and its teacher may part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) if float(y.detach().mean()) > 0 else y


def test_layers_that_only_one_of_the_two_calls_are_not_compared() -> None:
    torch.manual_seed(0)
    model = EarlyExit().eval()
    fewbit.finetune(model, LOW, list(torch.randn(256, 16).split(32)), steps=30, training=Training(batch_size=4))


def test_the_same_seed_gives_the_same_model_and_touches_no_random_state() -> None:
    model, batches = network(0)
    state = torch.get_rng_state()
    tuned = fewbit.finetune(model, LOW, batches, steps=20)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert equal(fewbit.finetune(model, LOW, batches, steps=20), tuned)
    assert not equal(fewbit.finetune(model, LOW, batches, steps=20, training=Training(seed=1)), tuned)


def test_model_is_unchanged_and_result_is_an_ordinary_quantized_model(cnn: nn.Module, images: list[Tensor]) -> None:
    cnn.train()
    before = copy.deepcopy(cnn.state_dict())
    tuned = fewbit.finetune(cnn, "int8-static", images, steps=4)
    assert cnn.training and all(torch.equal(cnn.state_dict()[name], before[name]) for name in before)
    assert not tuned.training and fewbit.plan_of(tuned).recipe.name == "int8-static"
    fewbit.lower(tuned, images[0])


def test_all_forms_of_batches_are_taken(cnn: nn.Module, images: list[Tensor]) -> None:
    data, labels = torch.cat(images), torch.arange(16) % 5
    expected = fewbit.finetune(cnn, "int8-static", images, steps=3)
    forms: list[Any] = [
        iter(images),
        [(x,) for x in images],
        [{"x": x, "labels": y} for x, y in zip(images, labels.split(4), strict=True)],
        DataLoader(TensorDataset(data, labels), batch_size=4),
    ]
    for form in forms:
        assert equal(fewbit.finetune(cnn, "int8-static", form, steps=3), expected)


def test_loss_gets_the_output_and_the_batch_with_its_labels() -> None:
    model, inputs = network(1)
    batches = [(x, torch.full((32,), 3)) for x in inputs]
    seen = []

    def loss(output: Tensor, batch: Any) -> Tensor:
        seen.append(batch[1])
        return nn.functional.cross_entropy(output, batch[1])

    settings = Training(weight_rate=0.2, teacher=0.0)
    tuned = fewbit.finetune(model, LOW, batches, steps=60, loss=loss, training=settings)
    assert all(bool((labels == 3).all()) for labels in seen)
    share = [float((m(torch.cat(inputs)).argmax(1) == 3).float().mean()) for m in (model, tuned)]
    assert share[1] > share[0] + 0.3


def test_only_what_is_trained_on_is_augmented(cnn: nn.Module, images: list[Tensor]) -> None:
    pairs = [(batch, torch.full((len(batch),), number)) for number, batch in enumerate(images)]
    given: list[Tensor] = []
    seen: list[Tensor] = []

    def augment(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        given.append(batch[1])
        return batch[0].flip(-1), batch[1] + 100

    def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(batch[1])
        return output.sum() * 0

    settings = Training(batch_size=4, held_out=0.25)
    fewbit.finetune(cnn, "int8-static", pairs, steps=3, loss=loss, training=settings, augment=augment)
    assert len(given) == 3 and all(bool((labels < 100).all()) for labels in given)
    trained = [labels for labels in seen if bool((labels >= 100).all())]
    assert [labels.tolist() for labels in trained] == [(labels + 100).tolist() for labels in given]
    assert len(seen) > len(trained)  # judged as they were
    plain = fewbit.finetune(cnn, "int8-static", pairs, steps=0, training=settings)
    again = fewbit.finetune(cnn, "int8-static", pairs, steps=0, training=settings, augment=augment)
    assert equal(plain, again)


def test_what_augment_does_to_a_batch_does_not_last(tagger: nn.Module) -> None:
    torch.manual_seed(3)
    batches = [{"tokens": torch.randint(0, 200, (2, length))} for length in (5, 6, 7, 8)]
    kept = copy.deepcopy(batches)

    def mask(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batch["tokens"].zero_()
        return batch

    fewbit.finetune(tagger, "int8-dynamic", batches, steps=6, augment=mask)
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(batches, kept, strict=True))


def test_what_training_does_not_improve_is_what_quantize_gives() -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    batches = list(torch.randn(64, 3, 8, 8).split(16))
    settings = Training()
    start = fewbit.quantize(model, "int8-static", _Data(model, batches, settings).calibration())
    tuned = fewbit.finetune(model, "int8-static", batches, steps=0, training=settings)
    assert equal(start, tuned)
    assert fewbit.plan_of(start).results and fewbit.plan_of(start).results == fewbit.plan_of(tuned).results


def test_batches_of_different_shapes_are_kept_as_they_are(tagger: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 200, (3, length), generator=generator) for length in (5, 6, 7, 8)]
    data = _Data(tagger, batches, Training())
    stream = data.shuffled()
    seen = [next(stream).shape[1] for _ in range(6)]
    held = [batch.shape[1] for batch in data.held_out]
    assert len(held) == 1 and sorted({*seen, *held}) == [5, 6, 7, 8] and not set(seen) & set(held)
    fewbit.finetune(tagger, "int8-dynamic", batches, steps=2)


def test_minutes_end_it() -> None:
    model, batches = network(2)
    fewbit.finetune(model, LOW, batches, minutes=0.05)


def test_minutes_that_the_start_takes_leave_what_quantize_gives_and_say_so() -> None:
    model, batches = network(2)
    with pytest.warns(UserWarning, match="took 0.0 minutes, all of minutes = 1e-06: nothing was trained"):
        found = fewbit.finetune(model, LOW, batches, minutes=1e-6)
    start = fewbit.finetune(model, LOW, batches, steps=0)
    assert torch.equal(found(batches[0]), start(batches[0]))


def test_the_start_may_have_a_calibration_of_its_own() -> None:
    model, batches = network(0)
    started = fewbit.finetune(model, LOW, batches, steps=0, calibration=batches[:1])
    assert equal(started, fewbit.quantize(model, LOW, batches[:1]))
    assert not equal(started, fewbit.finetune(model, LOW, batches, steps=0))


@pytest.mark.parametrize(("held_out", "checks"), [(0.5, 2), (0.125, 11)])
def test_judging_takes_no_more_examples_than_training(held_out: float, checks: int) -> None:
    model, batches = network(0)
    trained, judged = [], []

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        (trained if torch.is_grad_enabled() else judged).append(len(batch))
        return output.square().mean() * 0

    fewbit.finetune(model, LOW, batches, steps=12, loss=loss, training=Training(batch_size=32, held_out=held_out))
    kept = int(held_out * 256)
    assert sum(trained) == 12 * 32
    assert sum(judged) == kept * (2 + checks)  # at the start, at the end, and between


def test_gains_of_norms_move_like_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    nn.init.constant_(model[1].weight, 3.0)  # type: ignore[arg-type]
    student = fewbit.prepare_qat(model, Recipe("w", (Rule("type:Linear", Scheme(QuantSpec("int8", per_channel(0)))),)))
    settings = Training(weight_rate=0.3, step_rate=0.01)
    rates = {id(group["params"][0]): group["lr"] for group in _groups(student, settings)}
    assert rates[id(student.get_parameter("1.weight"))] == pytest.approx(3.0 * 0.01)
    assert rates[id(student.get_parameter("1.bias"))] == pytest.approx(1e-3 * 0.3 / 30)


def test_distance_of_logits_ignores_a_constant_and_that_of_features_does_not() -> None:
    x = torch.randn(6, 5)
    assert float(Target.of(x).distance(x + 3, 2.0)) == pytest.approx(0, abs=1e-5)
    unit = nn.functional.normalize(x, dim=1)
    assert float(Target.of(unit).distance(unit + 3, 2.0)) > 1
    assert float(Target.of({"a": x[None]}).distance({"a": x[None] * 1.1}, 2.0)) == pytest.approx(0.01, rel=1e-3)
    assert float(Target.of(x, logits=False).distance(x + 3, 2.0)) > 1
    masked = torch.where(torch.arange(5) == 2, -torch.inf, x)
    assert float(Target.of(masked).distance(masked, 2.0)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight_rate", -1),
        ("temperature", 0),
        ("batch_size", 0),
        ("held_out", 1),
        ("average", 1),
        ("features", float("nan")),
    ],
)
def test_settings_that_are_impossible(name: str, value: float) -> None:
    with pytest.raises(PlanError, match=f"Training: found {name} = "):
        Training(**{name: value})  # type: ignore[arg-type]


def test_errors(cnn: nn.Module, images: list[Tensor]) -> None:
    with pytest.raises(CalibrationError, match="found 1 batches, needs two at least"):
        fewbit.finetune(cnn, "int8-static", [images[0][:1]], steps=1)
    with pytest.raises(CalibrationError, match="found one Tensor, needs an iterable of batches"):
        fewbit.finetune(cnn, "int8-static", images[0], steps=1)
    integers = nn.Sequential(nn.Linear(8, 8))
    integers.register_forward_hook(lambda module, args, y: y.long())
    recipe = Recipe("all", (Rule("*", Scheme(QuantSpec("int8", per_channel(0)))),))
    with pytest.raises(UnsupportedError, match="has no float tensor to compare"):
        fewbit.finetune(integers, recipe, [torch.randn(4, 8)] * 2, steps=1)
    with pytest.raises(PlanError, match="teacher = 0 and no loss leave nothing to learn"):
        fewbit.finetune(cnn, "int8-static", images, training=Training(teacher=0.0))
    with pytest.raises(PlanError, match="found minutes = 0, steps = None"):
        fewbit.finetune(cnn, "int8-static", images, minutes=0)
