"""Calibration data in the forms that people have them: tensors, tuples, dicts, a DataLoader with labels."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fewbit.errors import CalibrationError

LABELS = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True)
class Call:
    """The arguments of one forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, model: nn.Module) -> Any:
        return model(*self.args, **self.kwargs)

    def describe(self) -> str:
        """The shapes and dtypes of all tensors."""
        named = {**{str(number): value for number, value in enumerate(self.args)}, **self.kwargs}
        return ", ".join(f"{name}: {_describe(value)}" for name, value in named.items()) or "no inputs"


def calls(model: nn.Module, batches: Any) -> Iterator[Call]:
    """Each batch as the arguments of ``model``'s forward.

    A tensor is the one argument, a tuple or list are positional arguments, a mapping keyword arguments. What a data loader
    adds for training is dropped where forward does not take it: a last element beyond forward's parameters; in a list, which
    is what a DataLoader makes, also a last element of one integer an example, if forward has another optional parameter in
    that place; entries of a mapping named as in LABELS.
    CalibrationError if there is no batch, or a batch cannot be the arguments of forward.
    """
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"calibration: found one {type(batches).__name__}, needs an iterable of batches: a list of them, a DataLoader."
        )
    number = -1
    for number, batch in enumerate(batches):
        yield to_call(model, batch, f"calibration batch {number}")
    if number < 0:
        raise CalibrationError("calibration: found no batch; 100 to 1000 samples are usual.")


def to_call(model: nn.Module, batch: Any, where: str) -> Call:
    """One batch as the arguments of ``model``'s forward; CalibrationError if it cannot be."""
    signature = inspect.signature(model.forward)
    if isinstance(batch, Mapping):
        kwargs = {str(key): value for key, value in batch.items()}
        accepts_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        if not accepts_any:
            dropped = [key for key in kwargs if key in LABELS and key not in signature.parameters]
            kwargs = {key: value for key, value in kwargs.items() if key not in dropped}
        call = Call((), kwargs)
    elif isinstance(batch, (tuple, list)):
        call = Call(tuple(batch), {})
        without_label = Call(tuple(batch[:-1]), {})
        if _binds(signature, without_label) and (not _binds(signature, call) or _ends_in_labels(signature, batch)):
            call = without_label
    elif isinstance(batch, Tensor):
        call = Call((batch,), {})
    else:
        raise CalibrationError(f"{where}: found a {type(batch).__name__}, needs a tensor, a tuple or a dict of them.")
    if not _binds(signature, call):
        takes = ", ".join(str(parameter) for parameter in signature.parameters.values())
        raise CalibrationError(f"{where}: found {call.describe()}; {type(model).__name__}.forward takes ({takes}).")
    return call


def run(model: nn.Module, call: Call, where: str, gradients: bool = False) -> Any:
    """``model`` on one call; what the model raises becomes a CalibrationError that says on what."""
    try:
        with torch.set_grad_enabled(gradients):
            return call.run(model)
    except CalibrationError:
        raise
    # A model raises anything on inputs it was not made for.
    except Exception as error:
        hint = ""
        if any(isinstance(x, Tensor) and x.dim() <= 1 and not x.is_floating_point() for x in call.args):
            hint = " A one-dimensional integer tensor looks like labels: give the inputs alone."
        first = (str(error).strip().splitlines() or [""])[0]
        raise CalibrationError(
            f"{where}: {type(model).__name__} raised {type(error).__name__} on {call.describe()}: {first}{hint}"
        ) from error


def fingerprint(call: Call) -> str:
    """Equal for the same numbers."""
    digest = hashlib.sha256(call.describe().encode())
    for leaf in pytree.tree_leaves((call.args, call.kwargs)):
        data = leaf.detach().cpu().contiguous().view(-1) if isinstance(leaf, Tensor) else None
        digest.update(repr(leaf).encode() if data is None else data.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def peek(batches: Iterable[Call]) -> tuple[Call, Iterable[Call]]:
    """The first of the batches, and all of them; there must be one."""
    stream = iter(batches)
    first = next(stream)
    return first, itertools.chain([first], stream)


def chunks(batches: Iterable[Call], size: int, most: int) -> Iterator[Call]:
    """The first ``most`` examples in pieces of at most ``size``; batches whose tensors do not share a first axis whole."""
    seen = 0
    for call in batches:
        tensors = [x for x in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor) and x.dim()]
        counts = {len(x) for x in tensors}
        if len(counts) != 1:
            yield call
            seen += 1
        else:
            count = counts.pop()
            for begin in range(0, min(count, most - seen), size):
                yield _part(call, begin, min(begin + size, count, most - seen))
            seen += count
        if seen >= most:
            return


def _part(call: Call, begin: int, end: int) -> Call:
    def cut(x: Tensor) -> Tensor:
        return x[begin:end] if x.dim() else x

    args, kwargs = pytree.tree_map_only(Tensor, cut, (call.args, call.kwargs))
    return Call(args, kwargs)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in eval mode for a while; afterwards each of its modules is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _binds(signature: inspect.Signature, call: Call) -> bool:
    try:
        signature.bind(*call.args, **call.kwargs)
    except TypeError:
        return False
    return True


def _ends_in_labels(signature: inspect.Signature, batch: Sequence[Any]) -> bool:
    """Whether the last of several elements is one integer an example, for a parameter that is not named for labels."""
    if (
        isinstance(batch, tuple)
        or len(batch) < 2
        or not all(isinstance(x, Tensor) and x.dim() > 0 for x in (batch[0], batch[-1]))
    ):
        return False
    integers = not batch[-1].is_floating_point() and batch[-1].shape == batch[0].shape[:1] and batch[0].dim() > 1
    bound = list(signature.bind(*batch).arguments)
    return integers and bound[-1] not in LABELS


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
