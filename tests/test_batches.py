"""Calibration data in the forms that people have them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fewbit import CalibrationError
from fewbit.batches import Call, calls, evaluating, run, to_call


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.ones(4, 2)


class Two(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x


class Any_(nn.Module):
    def forward(self, **kwargs: Tensor) -> Tensor:
        return kwargs["x"]


X, LABELS = torch.randn(3, 4), torch.tensor([0, 1, 2])


def same(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return (
        len(call.args) == len(args)
        and all(a is b for a, b in zip(call.args, args, strict=True))
        and call.kwargs.keys() == kwargs.keys()
        and all(call.kwargs[key] is kwargs[key] for key in kwargs)
    )


@pytest.mark.parametrize(
    ("model", "batch", "args", "kwargs"),
    [
        (One(), X, (X,), {}),
        (One(), (X,), (X,), {}),
        (One(), [X], (X,), {}),
        (One(), (X, LABELS), (X,), {}),
        (One(), [X, LABELS], (X,), {}),
        (Two(), (X, LABELS), (X, LABELS), {}),
        (Two(), [X, LABELS], (X,), {}),
        (Two(), (X, X, LABELS), (X, X), {}),
        (One(), {"x": X}, (), {"x": X}),
        (One(), OrderedDict(x=X), (), {"x": X}),
        (One(), {"x": X, "labels": LABELS}, (), {"x": X}),
        (Two(), {"x": X, "mask": X, "target": LABELS}, (), {"x": X, "mask": X}),
        (Any_(), {"x": X, "labels": LABELS}, (), {"x": X, "labels": LABELS}),
    ],
)
def test_forms(model: nn.Module, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert same(to_call(model, batch, "here"), args, kwargs)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("text", "here: found a str"),
        (3, "here: found a int"),
        ((X, X, X), r"here: found 0: float32 \[3, 4\], .*; One.forward takes \(x"),
        ({"y_": X}, "here: found y_: float32"),
        ((), "here: found no inputs"),
    ],
    ids=["text", "number", "too-many", "wrong-name", "nothing"],
)
def test_what_cannot_be_arguments_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        to_call(One(), batch, "here")


@pytest.mark.parametrize("batches", [X, {"x": X}, 3, None], ids=["tensor", "mapping", "number", "none"])
def test_what_is_not_an_iterable_of_batches_is_refused(batches: Any) -> None:
    with pytest.raises(CalibrationError, match="needs an iterable of batches"):
        next(calls(One(), batches))


def test_no_batch_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no batch"):
        list(calls(One(), []))


def test_the_number_of_the_batch_is_named() -> None:
    with pytest.raises(CalibrationError, match="calibration batch 1: found a str"):
        list(calls(One(), [X, "text"]))


def test_data_loader_with_labels_and_generator() -> None:
    loader = DataLoader(TensorDataset(torch.randn(6, 4), torch.arange(6)), batch_size=4)
    assert [call.args[0].shape for call in calls(One(), loader)] == [(4, 4), (2, 4)]
    assert len(list(calls(One(), (X for _ in range(3))))) == 3


def test_batches_are_taken_one_by_one() -> None:
    taken: list[int] = []

    def batches() -> Any:
        for number in range(3):
            taken.append(number)
            yield X

    next(calls(One(), batches()))
    assert taken == [0]


def test_what_the_model_raises_says_on_what() -> None:
    with pytest.raises(CalibrationError, match=r"here: One raised RuntimeError on 0: float32 \[3, 5\]") as caught:
        run(One(), Call((torch.randn(3, 5),), {}), "here")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_labels_are_recognized() -> None:
    with pytest.raises(CalibrationError, match="looks like labels"):
        run(One(), Call((LABELS,), {}), "here")


def test_run_makes_no_graph() -> None:
    layer = nn.Linear(4, 2)
    assert not run(layer, Call((X,), {}), "here").requires_grad


def test_evaluating_restores_the_mode_of_each_module() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == [True, True, False, False]
