"""Whether the first and the last layer are worth their place in 8 bits: measured on the model's outputs.

The first layer reads the data themselves, the last one makes the answer; both are often a small part of a model and a large
part of its error. Each is taken out of a simulation of the quantized model, on calibration examples; a small layer that makes
more than the recipe's share of the output's error stays float.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fewbit.batches import Call, chunks, run
from fewbit.calibration import Grid
from fewbit.correction import simulate
from fewbit.plan import Plan
from fewbit.progress import progress
from fewbit.qtensor import QTensor

EXAMPLES = 64  # that are looked at
CHUNK = 8  # at a time
SMALL = 0.05  # of all weights: a layer with more of them stays quantized whatever it costs


def sensitive_ends(
    twin: nn.Module,
    plan: Plan,
    order: Sequence[str],
    weights: Mapping[str, Mapping[str, QTensor]],
    grids: Mapping[str, Grid | None],
    biases: Mapping[str, Tensor],
    batches: Iterable[Call],
) -> dict[str, str]:
    """The first and the last of the static layers in ``order`` that are to stay float, with the reason.

    ``twin``: the float twin of the plan; ``biases``: those that correction found.
    """
    share = plan.recipe.sensitive
    total = sum(site.count for site in plan.sites.values()) + plan.float_weights
    ends = [name for name in dict.fromkeys((*order[:1], *order[-1:])) if plan.sites[name].count <= SMALL * total]
    if share is None or not ends or len(order) < 2:
        return {}
    models = [copy.deepcopy(twin, {id(p): p for p in twin.parameters()}) for _ in range(1 + len(ends))]
    for model, left_out in zip(models, [None, *ends], strict=True):
        chosen = {name: grid for name, grid in grids.items() if name != left_out}
        simulate(model, plan, weights, chosen)
        for name, bias in biases.items():
            if name != left_out:
                model.get_submodule(name)._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
    errors = torch.zeros(len(models), dtype=torch.float64)
    for number, call in enumerate(progress(chunks(batches, CHUNK, EXAMPLES), "first and last layer")):
        expected = run(twin, call, f"calibration chunk {number}")
        for index, model in enumerate(models):
            errors[index] += _squared_error(run(model, call, f"calibration chunk {number}"), expected)
    found = {}
    for name, error in zip(ends, errors[1:].tolist(), strict=True):
        gain = 1 - error / max(float(errors[0]), 1e-30)
        if gain > share:
            found[name] = f"sensitive: in 8 bits it makes {100 * gain:.0f} % of the output's squared error"
    return found


def _squared_error(results: object, expected: object) -> float:
    pairs = zip(pytree.tree_leaves(results), pytree.tree_leaves(expected), strict=True)
    tensors = [(x, y) for x, y in pairs if isinstance(x, Tensor) and x.is_floating_point()]
    return sum(float((x - y).double().square().sum()) for x, y in tensors)
