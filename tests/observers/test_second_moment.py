"""The mean of squares for each channel."""

from __future__ import annotations

import torch

from fewbit.observers import SecondMoment


def test_mean_is_over_all_axes_but_the_first_and_all_batches() -> None:
    torch.manual_seed(0)
    observer = SecondMoment()
    parts = [torch.randn(5, 7), torch.randn(5, 2, 3), torch.randn(5, 1)]
    state = observer.init()
    for part in parts:
        state = observer.update(state, part)
    everything = torch.cat([part.flatten(1) for part in parts], 1)
    assert observer.mean(state).dtype == torch.float32
    torch.testing.assert_close(observer.mean(state), everything.square().mean(1))


def test_merge_adds_two_streams() -> None:
    torch.manual_seed(0)
    observer = SecondMoment()
    first, second = torch.randn(4, 6), 100 * torch.randn(4, 3)
    together = observer.update(observer.update(observer.init(), first), second)
    merged = observer.merge(observer.update(observer.init(), first), observer.update(observer.init(), second))
    assert torch.equal(merged["squares"], together["squares"])
    assert torch.equal(merged["count"], together["count"])


def test_half_precision_squares_do_not_overflow() -> None:
    observer = SecondMoment()
    state = observer.update(observer.init(), torch.full((2, 3), 6e4, dtype=torch.float16))
    torch.testing.assert_close(observer.mean(state), torch.full((2,), float(torch.tensor(6e4).half()) ** 2))


def test_update_leaves_its_arguments_alone() -> None:
    observer = SecondMoment()
    x = torch.randn(2, 3)
    state = observer.update(observer.init(), x)
    before, kept = state["squares"].clone(), x.clone()
    observer.update(state, x)
    assert torch.equal(state["squares"], before)
    assert torch.equal(x, kept)
