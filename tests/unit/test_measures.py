"""What a step logs besides its losses: the numbers fit together, and survive a restart."""

import mmap
import time
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_support import job, make_config

from xlstm_distill.contract import ledger
from xlstm_distill.contract.flops import StepFlops
from xlstm_distill.contract.job import World
from xlstm_distill.runtime import device as device_module
from xlstm_distill.runtime import measures as measures_module
from xlstm_distill.runtime.clock import Clock
from xlstm_distill.runtime.device import Peak, listed_peak, measured_peak, memory_gb, peak_flops
from xlstm_distill.runtime.measures import StepMeasures
from xlstm_distill.runtime.metrics import Metrics, read_metrics

CPU = torch.device("cpu")
FLOPS = StepFlops(teacher=1e6, forward=2e6, backward=4e6)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(measures_module, "peak_flops", lambda device, dtype: Peak(1e9, "as told"))
    return job(tmp_path, "align", make_config(tmp_path))


class Taken:
    """A clock that says what it is told."""

    def __init__(self, **parts):
        self.parts = dict.fromkeys(("data", "forward", "checkpoint", "validation", "other"), 0.0) | parts

    def take(self):
        return self.parts


def test_speed_and_utilisation_are_those_of_the_steps_own_seconds(folder):
    with Metrics(folder.path, 9, resume_at=-1) as metrics:
        measures = StepMeasures(folder, World(size=4), FLOPS, CPU, metrics, step=0)
        clock = Taken(data=0.5, forward=1.0, checkpoint=3.0, validation=7.0, other=0.5)
        values = measures.record(3, 64, clock)
    assert (values["seconds"], values["tokens"]) == (2.0, 192.0)
    assert (values["tokens_per_s"], values["tokens_per_s_per_device"]) == (32.0, 8.0)
    assert values["mfu"] == pytest.approx(32 * 7e6 / (4 * 1e9))
    assert {k: v for k, v in values.items() if k.startswith("time/")} == {
        f"time/{k}": v for k, v in clock.parts.items()
    }
    assert values["restarts"] == 0
    assert 0.01 < values["memory/rss_gb"] < 100


def test_a_restart_goes_on_with_the_count_and_the_goodput_of_the_job(folder):
    append = {"event": "start", "time": time.time() - 100, "step": 0}
    ledger.append_line(folder.path / "ledger.jsonl", append)
    with Metrics(folder.path, 9) as metrics:
        metrics.log(1, {"seconds": 30.0})
        metrics.log(2, {"seconds": 20.0})
    with Metrics(folder.path, 9, resume_at=1) as metrics:
        measures = StepMeasures(folder, World(), FLOPS, CPU, metrics, step=1)
        metrics.log(2, measures.record(2, 64, Taken(forward=10.0)))
    last = read_metrics(folder.path)[-1]
    assert last["restarts"] == 1
    assert last["goodput"] == pytest.approx(40 / 100, rel=0.1)
    assert last["goodput"] == pytest.approx(ledger.goodput(folder.path), rel=0.01)
    _, second = ledger.starts(folder.path)
    assert (second["step"], second["ranks"], second["strategy"]) == (1, 1, folder.config.strategy.name)
    assert {"host", "version"} <= second.keys()


def test_tensorboard_has_the_settings_and_every_start_as_text(folder):
    for step in (0, 3):
        with Metrics(folder.path, 9, resume_at=step, tensorboard=True) as metrics:
            StepMeasures(folder, World(size=step + 1), FLOPS, CPU, metrics, step)
    board = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    texts = {
        name: [(e.step, e.tensor_proto.string_val[0].decode()) for e in board.Tensors(f"{name}/text_summary")]
        for name in ("config", "starts")
    }
    assert [step for step, _ in texts["starts"]] == [0, 3]
    rows = texts["starts"][-1][1].splitlines()
    assert len(rows) == 4
    assert [cell.strip() for cell in rows[3].split("|")][3:5] == ["3", "4"]
    config = texts["config"][0][1]
    assert config.startswith("```yaml\n")
    assert f"sequence: {folder.config.data.sequence}" in config


def test_other_ranks_measure_nothing_and_write_nothing(folder):
    with Metrics(folder.path, 9, enabled=False) as metrics:
        clock = Clock(CPU)
        measures = StepMeasures(folder, World(rank=1, size=2), FLOPS, CPU, metrics, step=0)
        with clock("data"):
            time.sleep(0.01)
        assert measures.record(1, 64, clock) == {}
        assert clock.take()["data"] == 0.0  # taken, so that marks do not pile up
    assert ledger.starts(folder.path) == []


def test_the_ledger_says_that_a_training_is_finished_on_rank_0_alone(folder):
    for rank in (0, 1):
        with Metrics(folder.path, 9, enabled=rank == 0) as metrics:
            StepMeasures(folder, World(rank=rank, size=2), FLOPS, CPU, metrics, step=0).end(9)
    events = [(line["event"], line["step"]) for line in ledger.read_lines(folder.path / "ledger.jsonl")]
    assert events == [("start", 0), ("end", 9)]


def test_the_log_says_what_the_peak_is_and_where_it_is_from(folder, capsys):
    config = replace(folder.config, strategy=replace(folder.config.strategy, precision="bfloat16"))
    with Metrics(folder.path, 9) as metrics:
        StepMeasures(replace(folder, config=config), World(), FLOPS, CPU, metrics, step=0)
    assert capsys.readouterr().out == "peak for MFU: 0.001 TFLOP/s (bfloat16, as told)\n"


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A40", 149.7), ("NVIDIA A10", 125), ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500),
        ("AMD Instinct MI250X/MI250", 191.5), ("AMD Instinct MI300X", 1307.4),
        ("Tesla V100-SXM2-32GB", None), ("NVIDIA A10G", None), ("NVIDIA A1000", None), ("Some L400", None),
    ],
)  # fmt: skip
def test_a_device_is_known_by_whole_words_of_its_name(name, tera):
    assert listed_peak(name) == (tera and tera * 1e12)


def test_a_cpu_is_measured_and_the_random_numbers_stay_as_they_were(monkeypatch):
    monkeypatch.setattr(device_module, "MEASURE_SECONDS", 0.02)
    before = torch.get_rng_state()
    peak = peak_flops(CPU, torch.float32)
    assert "measured" in peak.source
    assert torch.equal(before, torch.get_rng_state())
    matrix, began = torch.ones(1024, 1024), time.perf_counter()
    matrix @ matrix
    assert peak.flops > 0.1 * 2 * 1024**3 / (time.perf_counter() - began)
    assert measured_peak(CPU, torch.float32) < 1e14


def test_memory_grows_by_what_is_allocated():
    """A mapping of its own: a tensor may take what earlier tests left free in the heap, which is resident already."""
    before = memory_gb(CPU)["memory/rss_gb"]
    with mmap.mmap(-1, 200_000_000) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        assert memory_gb(CPU)["memory/rss_gb"] - before == pytest.approx(0.2, rel=0.2)
