"""One weight to codes: one file a method, one line an entry in METHODS."""

from __future__ import annotations

from fewbit.methods.gptq import Gptq, Moments
from fewbit.methods.method import Method
from fewbit.methods.mse import MeanSquaredError
from fewbit.methods.pair_safe import PairSafe
from fewbit.methods.rtn import RoundToNearest

METHODS: dict[str, Method] = {
    "rtn": RoundToNearest(),
    "mse": MeanSquaredError(),
    "pair_safe": PairSafe(),
    "gptq": Gptq(),
}

__all__ = ["METHODS", "Gptq", "MeanSquaredError", "Method", "Moments", "PairSafe", "RoundToNearest"]
