"""The switch for oneDNN: off inside, as it was outside."""

from __future__ import annotations

import pytest
import torch

from pesc.machine.onednn import without_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


def is_on() -> bool:
    return torch.backends.mkldnn.enabled


def test_few_tokens_on_a_cpu_do_without_it() -> None:
    with without_onednn(torch.zeros(32, 4), up_to=32):
        assert not is_on()
    assert is_on()


@pytest.mark.parametrize("x_TD", [torch.zeros(33, 4), torch.zeros(1, 4, device="meta")])
def test_many_tokens_and_other_devices_keep_it(x_TD: torch.Tensor) -> None:
    with without_onednn(x_TD, up_to=32):
        assert is_on()


def test_an_error_inside_turns_it_on_again() -> None:
    with pytest.raises(RuntimeError), without_onednn(torch.zeros(1, 4), up_to=1):
        raise RuntimeError
    assert is_on()


def test_who_switched_it_off_before_keeps_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with without_onednn(torch.zeros(1, 4), up_to=1):
        assert not is_on()
    assert not is_on()


def test_threads_that_overlap_leave_it_on() -> None:
    """In either order of entering and leaving."""
    for first_leaves_first in (True, False):
        blocks = [without_onednn(torch.zeros(1, 4), up_to=1) for _ in range(2)]
        for block in blocks:
            block.__enter__()
        for block in blocks if first_leaves_first else reversed(blocks):
            block.__exit__(None, None, None)
        assert is_on()
