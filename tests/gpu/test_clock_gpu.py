"""The clock on a GPU: events, no synchronisation inside a step."""

import time

import pytest
import torch

from xlstm_distill.runtime.clock import OTHER, Clock

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_kernel_counts_towards_the_part_that_launched_it_and_nobody_waits_for_it():
    device = torch.device("cuda")
    matrix = torch.ones(4096, 4096, device=device)
    matrix @ matrix
    torch.cuda.synchronize()
    clock, began = Clock(device), time.perf_counter()
    with clock("forward"):
        for _ in range(50):
            matrix @ matrix
    with clock("data"):
        pass
    launched = time.perf_counter() - began
    taken = clock.take()
    assert launched < 0.5 * taken["forward"]
    assert taken["data"] + taken[OTHER] < 0.1 * taken["forward"]
    assert sum(taken.values()) == pytest.approx(time.perf_counter() - began, rel=0.2)


def test_waiting_on_the_host_counts_when_the_device_is_idle():
    clock = Clock(torch.device("cuda"))
    with clock("data"):
        time.sleep(0.1)
    assert clock.take()["data"] == pytest.approx(0.1, rel=0.2)
