"""Round to nearest is quantize itself."""

from __future__ import annotations

import torch

from fewbit.methods import METHODS
from fewbit.qtensor import quantize
from fewbit.spec import QuantSpec, per_channel


def test_rtn_keeps_the_full_range_whatever_the_importance() -> None:
    torch.manual_seed(0)
    weight, spec = torch.randn(4, 9), QuantSpec("int4", per_channel(0))
    q = METHODS["rtn"].quantize(weight, spec, torch.rand(9))
    expected = quantize(weight, spec)
    assert not METHODS["rtn"].uses_importance
    assert torch.equal(q.codes, expected.codes)
    assert torch.equal(q.scale_values, expected.scale_values)
