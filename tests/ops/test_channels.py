"""dequantize_channels: constants back to float, one scale a channel."""

from __future__ import annotations

import pytest
import torch

dequantize_channels = torch.ops.fewbit.dequantize_channels.default


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32])
@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2, 5), (0,), (4, 0)], ids=str)
def test_each_channel_has_its_scale(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    codes, scale = torch.randint(-128, 128, shape, dtype=dtype), torch.rand(shape[0])
    found = dequantize_channels(codes, scale)
    assert found.dtype == torch.float32 and found.shape == codes.shape
    for channel in range(shape[0]):
        assert torch.equal(found[channel], codes[channel].float() * scale[channel])


def test_on_meta() -> None:
    found = dequantize_channels(torch.empty(4, 3, dtype=torch.int8, device="meta"), torch.empty(4, device="meta"))
    assert (found.shape, found.dtype, found.device.type) == ((4, 3), torch.float32, "meta")


def test_schema() -> None:
    torch.library.opcheck(dequantize_channels, (torch.ones(3, 2, dtype=torch.int8), torch.ones(3)))
