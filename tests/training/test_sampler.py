"""The data's order: every example once, batches of like lengths in no order, the same at every resumption."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from pesc.training.sampler import LengthGroupedSampler

LENGTHS = [random.Random(i).randint(10, 500) for i in range(803)]


def batches(*, seed: int = 0, epoch: int = 0, batch_size: int = 4) -> list[list[int]]:
    order = iter(LengthGroupedSampler(LENGTHS, batch_size, seed, lambda: epoch))
    return [list(batch) for batch in iter(lambda: list(itertools.islice(order, batch_size)), [])]


@pytest.mark.parametrize("batch_size", [1, 4, 803, 1000])
def test_an_epoch_holds_every_example_once(batch_size: int) -> None:
    drawn = batches(batch_size=batch_size)
    assert sorted(itertools.chain(*drawn)) == list(range(803))
    assert len(LengthGroupedSampler(LENGTHS, batch_size, 0, lambda: 0)) == 803


def test_seed_and_epoch_alone_decide_the_order() -> None:
    torch.manual_seed(1)
    random.seed(1)
    first = batches(seed=1, epoch=2)
    torch.manual_seed(2)
    random.seed(2)
    assert batches(seed=1, epoch=2) == first
    assert len({str(batches(seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_batches_hold_like_lengths_and_come_in_no_order_of_length() -> None:
    drawn = batches()
    longest = [max(LENGTHS[i] for i in batch) for batch in drawn]
    padded = sum(len(batch) * length for batch, length in zip(drawn, longest, strict=True))
    unsorted = [LENGTHS[i : i + 4] for i in range(0, 803, 4)]
    assert padded / sum(LENGTHS) - 1 < 0.1 < sum(len(b) * max(b) for b in unsorted) / sum(LENGTHS) - 1
    # A batch tells nothing of the length of the one after it, unlike sorted ones.
    assert abs(statistics.correlation(longest[:-1], longest[1:])) < 0.2
    assert statistics.correlation(sorted(longest)[:-1], sorted(longest)[1:]) > 0.9


@pytest.mark.parametrize("processes", [1, 2])
def test_every_process_of_a_resumed_epoch_sees_what_is_left(processes: int) -> None:
    """Through accelerate's loaders, as the trainer builds them."""
    epoch = 0

    def loaders(skip: int) -> list[list[list[int]]]:
        seen = []
        for process in range(processes):
            sampler = LengthGroupedSampler(LENGTHS[:16], 2, 0, lambda: epoch)
            loader = DataLoader(list(range(16)), batch_size=2, sampler=sampler)
            loader = prepare_data_loader(loader, num_processes=processes, process_index=process, put_on_device=False)
            loader = skip_first_batches(loader, skip) if skip else loader
            loader.set_epoch(epoch)
            seen.append([batch.tolist() for batch in loader])
        return seen

    first = loaders(0)
    epoch = 1
    complete = loaders(0)
    assert complete != first
    assert sorted(itertools.chain(*itertools.chain(*complete))) == list(range(16))
    assert loaders(3) == [batches[3:] for batches in complete]
