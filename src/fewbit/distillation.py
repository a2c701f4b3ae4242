"""The verb finetune: quantization-aware training with the float model as the teacher."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fewbit.batches import Call, run, to_call
from fewbit.divergence import divergence
from fewbit.errors import CalibrationError, PlanError, UnsupportedError
from fewbit.graph import batch_size
from fewbit.nn import LearnedGrid, Student
from fewbit.pipeline import float_twin
from fewbit.plan import Recipe
from fewbit.progress import progress
from fewbit.training import STUDENT, convert, origin_of, prepare_qat
from fewbit.verify.outputs import float_tensors, main_output

Loss = Callable[[Any, Any], Tensor]  # of the student's output and the batch as it was given
CALIBRATION = 1000  # examples that ranges are taken from
CHECKS = 20  # of the held-out loss, in a whole training; fewer if they would take more examples than the training
PATIENCE = 10  # checks that end it if all are worse than the best by more than NOISE
NOISE = 0.05
WARM_UP = 0.1  # of the training
PARTS = 8  # of the held-out examples, at least if there are as many: their spread says what is chance
HALF = (torch.float16, torch.bfloat16)
FEWEST = 4  # examples that are held out, but no more than a quarter


@dataclass(frozen=True)
class Training:
    """How ``finetune`` trains.

    ``weight_rate``: how far AdamW moves a weight in an update, in steps of its grid; other parameters as far as an 8-bit weight
    of their size. ``step_rate``: by which share it changes a step, or the gain of a norm. Both rise linearly for WARM_UP of the
    training and fall as a cosine. ``teacher``: the weight of the distance to the float model's outputs, of logits the
    Kullback-Leibler divergence at ``temperature``; 0 leaves ``loss`` alone. ``features``: the weight, beside it, of what the
    quantized layers give: the mean of their squared errors, each as a share of the float layer's squares. It is trained on, but
    does not judge. ``average``: the decay of the moving average of all parameters, which is what is kept. ``held_out``: the
    share of the data that is not trained on but judges. ``autocast``: training runs in bfloat16 (torch.autocast), ``loss`` too,
    which is faster on CPUs that have its products (avx512_bf16, amx) and on GPUs; what judges does not. ``trainable``: see
    ``prepare_qat``. ``logits``: whether the output is logits; None: what a mapping has as "logits" is, and so is a tensor with
    two axes, unless all its rows have length 1.

    PlanError for values outside of what is possible.
    """

    weight_rate: float = 0.005
    step_rate: float = 1e-3
    teacher: float = 1.0
    temperature: float = 2.0
    features: float = 10.0
    average: float = 0.99
    held_out: float = 0.1
    batch_size: int = 64
    autocast: bool = False
    trainable: float = 1.0
    logits: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        limits: dict[str, tuple[str, Callable[[float], bool]]] = {
            **dict.fromkeys(("weight_rate", "step_rate", "teacher", "features"), ("at least 0", lambda x: x >= 0)),
            **dict.fromkeys(("average", "held_out"), ("at least 0 and below 1", lambda x: 0 <= x < 1)),
            "temperature": ("above 0", lambda x: x > 0),
            "batch_size": ("at least 1", lambda x: x >= 1),
        }
        for name, (words, allows) in limits.items():
            if not allows(getattr(self, name)):
                raise PlanError(f"Training: found {name} = {getattr(self, name)}; it must be {words}.")


def finetune(
    model: nn.Module,
    recipe: str | Path | Recipe,
    batches: Any,
    minutes: float = 5.0,
    steps: int | None = None,
    loss: Loss | None = None,
    training: Training | None = None,
    calibration: Any = None,
    augment: Callable[[Any], Any] | None = None,
) -> nn.Module:
    """A quantized copy of ``model``, trained to give the float model's outputs. ``model`` itself is not changed.

    ``batches`` are read once and kept in memory; the first axis of their tensors counts examples, which are mixed anew in every
    epoch if all batches have the same shapes. Labels in them are for ``loss`` alone. Training ends ``minutes`` after the call,
    quantizing at the start included, or after ``steps`` updates if they are given: then the same seed gives the same result.
    ``loss(output, batch)``, if given, is added to the distance to the teacher.

    ``calibration``: what ``quantize`` is given at the start, instead of up to CALIBRATION examples (or as many batches, if
    shapes differ) of those that are trained on: fewer will do where an example is a long text. ``augment(batch)``, if given,
    makes of a batch what is trained on: mirrored and shifted images, say. Take what the float model was trained with. What
    calibrates and what judges stay as they are.

    The student trains in eval mode: without dropout, its norms as they are. What is returned has the least loss on held-out
    examples, and is what ``quantize`` gives if training did not improve on that by more than chance.

    Raises what ``quantize`` raises, PlanError for settings that leave nothing to do, and UnsupportedError if an output has
    nothing to compare.
    """
    start = time.monotonic()
    settings = training or Training()
    if loss is None and not settings.teacher:
        raise PlanError("finetune: teacher = 0 and no loss leave nothing to learn; give one of them.")
    if minutes <= 0 or (steps is not None and steps < 0):
        raise PlanError(
            f"finetune: found minutes = {minutes}, steps = {steps}; minutes must be above 0, steps at least 0."
        )
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise CalibrationError(f"finetune: found one {type(batches).__name__}, needs an iterable of batches.")
    data = _Data(model, list(batches), settings)
    first = data.calibration() if calibration is None else calibration
    student = prepare_qat(model, recipe, first, trainable=settings.trainable).eval()
    schedule = _timed(start, minutes) if steps is None else (step / steps for step in range(steps))
    stream = data.shuffled() if augment is None else map(augment, data.shuffled())
    origin = origin_of(student)
    bar = progress(schedule, "training", total=steps)
    if not _train(student, float_twin(model, origin.plan), data, stream, loss, settings, bar):
        setattr(student, STUDENT, replace(origin, examples=()))  # no value has moved: results keep their grids
    return convert(student)


class _Data:
    """Batches, cut anew from all examples in every epoch where they fit together; some of them held out."""

    def __init__(self, model: nn.Module, batches: list[Any], settings: Training) -> None:
        self._model, self._pool = model, _pooled(batches)
        self._batches = batches if self._pool is None else []
        self._random = torch.Generator().manual_seed(settings.seed)
        self._size = 1 if self._pool is None else settings.batch_size
        count = len(batches) if self._pool is None else batch_size(self._pool)
        if not count or count < 2:
            raise CalibrationError(
                f"finetune: found {count or 0} batches, needs two at least: one to train on, one to judge by."
            )
        order = torch.randperm(count, generator=self._random)
        kept = max(1, round(settings.held_out * count), min(FEWEST, count // 4))
        kept = min(count - 1, kept)
        self.steps_of_check = kept / self._size  # that take as many examples
        self._training, held_out = order[kept:], order[:kept]
        self.held_out = [self._batch(part) for part in held_out.split(max(1, min(self._size, kept // PARTS)))]

    def calibration(self) -> list[Any]:
        """The first CALIBRATION examples of those to train on, or as many batches."""
        return [self._batch(part) for part in self._training[:CALIBRATION].split(min(self._size, 100))]

    def shuffled(self) -> Iterator[Any]:
        """Batches to train on, without end."""
        while True:
            order = self._training[torch.randperm(len(self._training), generator=self._random)]
            parts = order.split(self._size)
            yield from (
                self._batch(part) for part in (parts[:-1] if len(parts) > 1 and len(parts[-1]) < self._size else parts)
            )

    def call(self, batch: Any) -> Call:
        return to_call(self._model, batch, "finetune")

    def _batch(self, indices: Tensor) -> Any:
        if self._pool is None:  # a copy: what is done to a batch must not last
            return pytree.tree_map_only(Tensor, torch.clone, self._batches[int(indices)])
        return pytree.tree_map_only(Tensor, lambda x: x[indices.to(x.device)], self._pool)


def _pooled(batches: list[Any]) -> Any:
    """All batches as one; None if they do not fit together."""
    leaves = [pytree.tree_leaves(batch) for batch in batches]
    kinds = [
        (pytree.tree_structure(batch), batch_size(batch), [_kind(leaf) for leaf in own])
        for batch, own in zip(batches, leaves, strict=True)
    ]
    alike = bool(kinds) and all(kind[::2] == kinds[0][::2] and kind[1] is not None for kind in kinds)
    if not alike or any(isinstance(x, Tensor) and not x.dim() for x in leaves[0]):
        return None
    joined = [torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0] for parts in zip(*leaves, strict=True)]
    return pytree.tree_unflatten(joined, kinds[0][0])


def _kind(leaf: Any) -> Any:
    """Equal for leaves of two batches that can be joined, or are the same."""
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.shape[1:]
    return leaf if leaf is None or isinstance(leaf, (bool, int, float, str)) else id(leaf)


def _timed(start: float, minutes: float) -> Iterator[float]:
    """Shares of what is left of the minutes when the training begins."""
    begun = time.monotonic()
    left = start + 60 * minutes - begun
    if left <= 0:
        warnings.warn(
            f"finetune: the quantized model that training starts from took {(begun - start) / 60:.1f} minutes, all of "
            f"minutes = {minutes:g}: nothing was trained; give more.",
            stacklevel=5,
        )
    while left > 0 and (share := (time.monotonic() - begun) / left) < 1:
        yield share


def _train(
    student: nn.Module,
    teacher: nn.Module,
    data: _Data,
    stream: Iterator[Any],
    loss: Loss | None,
    settings: Training,
    schedule: Iterable[float],
) -> bool:
    """Leaves ``student`` with the parameters that had the least loss on the held-out examples of ``data``; ``stream``: batches
    to train on. False if those are the parameters that it had."""
    groups = _groups(student, settings)
    parameters = [p for group in groups for p in group["params"]]
    # In half precision updates of a hundredth of a step would round to nothing.
    masters = [nn.Parameter(p.detach().float()) if p.dtype in HALF else p for p in parameters]
    halves = [(p, master) for p, master in zip(parameters, masters, strict=True) if p is not master]
    for group, master in zip(groups, masters, strict=True):
        group["params"] = [master]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    layers = [name for name, module in student.named_modules() if isinstance(module, Student)]
    if not settings.teacher or not settings.features:
        layers = []

    kind = parameters[0].device.type

    def in_precision() -> AbstractContextManager[None]:
        return torch.autocast(kind, torch.bfloat16) if settings.autocast else nullcontext()

    def output_of(model: nn.Module, batch: Any) -> Any:
        return run(model, data.call(batch), "finetune", gradients=torch.is_grad_enabled())

    def total(batch: Any, target: Target | None) -> Tensor:
        output = output_of(student, batch)
        error = torch.zeros(()) if loss is None else loss(output, batch)
        return error if target is None else error + settings.teacher * target.distance(output, settings.temperature)

    @torch.no_grad()
    def target_of(batch: Any) -> Target | None:
        return Target.of(output_of(teacher, batch), logits) if settings.teacher else None

    @torch.no_grad()
    def judged(values: list[Tensor]) -> Tensor:
        kept = _exchange(parameters, values)
        errors = torch.tensor([float(total(*pair)) for pair in held_out])
        _exchange(parameters, kept)
        return errors

    logits = settings.logits
    held_out = [(batch, target_of(batch)) for batch in data.held_out]
    logits = held_out[0][1].logits if held_out[0][1] is not None else logits  # trained on as it is judged
    average = [p.detach().clone() for p in masters]
    start, at_start = [p.clone() for p in average], judged(average)
    best, least, waiting, due, checks = start, at_start, 0, 1 / CHECKS, 0
    for step, share in enumerate(schedule):
        batch = next(stream)
        factor = min(1.0, (share + 1e-3) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * share))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        student.zero_grad()
        with _outputs(teacher, layers) as exact, in_precision():
            target = target_of(batch)
        with _outputs(student, layers) as found, in_precision():
            error = total(batch, target)
        if [x.shape for x in found] == [x.shape for x in exact]:  # not where values decide what is called
            error = error + settings.features * _mean_share(found, exact)
        error.backward()
        for parameter, master in halves:
            master.grad = None if parameter.grad is None else parameter.grad.float()
        optimizer.step()
        with torch.no_grad():
            for parameter, master in halves:
                parameter.copy_(master)
            decay = min(settings.average, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [p.detach() for p in masters], 1 - decay)
        if share >= due and step >= (checks + 1) * data.steps_of_check:
            due, checks = due + 1 / CHECKS, checks + 1
            now = judged(average)
            least_mean = float(least.mean())
            waiting = 0 if float(now.mean()) < least_mean + NOISE * abs(least_mean) else waiting + 1
            if now.mean() < least.mean():
                best, least = [p.clone() for p in average], now
            if waiting >= PATIENCE:
                break
    last = judged(average)
    if last.mean() < least.mean():
        best, least = average, last
    improved = _is_less(least, at_start)
    _exchange(parameters, best if improved else start)
    return improved


def _is_less(errors: Tensor, others: Tensor) -> bool:
    """Whether errors on the same parts of the data are less by more than two standard errors."""
    gains = (others - errors).double()
    spread = float(gains.std()) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return float(gains.mean()) > 2 * spread


@torch.no_grad()
def _exchange(parameters: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    """Gives the parameters these values; returns those they had."""
    kept = [p.detach().clone() for p in parameters]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
    return kept


def _groups(student: nn.Module, settings: Training) -> list[dict[str, Any]]:
    """What is trained and how fast. UnsupportedError if nothing is."""
    rates: dict[nn.Parameter, float] = {}
    for module in student.modules():
        if isinstance(module, LearnedGrid):
            rates.update((p, settings.step_rate) for p in module.parameters(recurse=False))
        elif isinstance(module, Student):
            for name in module.quantized_names:
                rates[module.get_parameter(name)] = settings.weight_rate * float(module.weight_scale(name).mean())
    for name, parameter in student.named_parameters():
        size = float(parameter.detach().float().square().mean().sqrt()) if parameter.numel() else 0.0
        is_gain = parameter.dim() == 1 and name.split(".")[-1] == "weight"
        # An 8-bit grid has about 30 steps in the root mean square of a weight matrix.
        rates.setdefault(parameter, max(size, 1e-3) * (settings.step_rate if is_gain else settings.weight_rate / 30))
    groups = [{"params": [p], "lr": rate} for p, rate in rates.items() if p.requires_grad]
    if not groups:
        raise UnsupportedError(f"finetune: this {type(student).__name__} has no parameter that requires a gradient.")
    return groups


@dataclass(frozen=True)
class Target:
    """What a student's output for a batch is compared with: tensors of the float model's output, one if it is ``logits``."""

    exact: list[Tensor]
    logits: bool

    @staticmethod
    def of(output: Any, logits: bool | None = None) -> Target:
        """``logits``: see ``Training``. Nothing else of the output is kept."""
        exact, found = main_output(output)
        if logits is None:  # normalized embeddings are no logits
            logits = found and not bool(((exact.float().norm(dim=-1) - 1).abs() < 1e-3).all())
        return Target([exact] if logits else list(float_tensors(output)), logits)

    def distance(self, output: Any, temperature: float) -> Tensor:
        """How far an output is from it: of logits the divergence, in units that do not depend on the temperature; of features
        the squared error as a share of their squares."""
        if not self.logits:
            return _mean_share(float_tensors(output), self.exact)
        found, _ = main_output(output)
        return divergence(self.exact[0], found, temperature)


def _mean_share(found: Iterable[Tensor], exact: Iterable[Tensor]) -> Tensor:
    """The mean of the squared errors of tensors, each as a share of the squares of what is exact; 0 without tensors."""
    pairs = zip(found, exact, strict=True)
    shares = [(x - y).float().square().sum() / y.float().square().sum().clamp(min=1e-12) for x, y in pairs]
    return torch.stack(shares).mean() if shares else torch.zeros(())


@contextmanager
def _outputs(model: nn.Module, names: Iterable[str]) -> Iterator[list[Tensor]]:
    """The tensors that the named layers return, in the order of the calls."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.extend(float_tensors(output))

    handles = [model.get_submodule(name).register_forward_hook(keep) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
