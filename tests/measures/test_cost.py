"""What a run costs: time by kind, operations, bytes and peaks."""

import mmap
import time

import pytest
import torch
from support.runs import plain_net, run
from torch import nn

from cl_lightning.batch import Draw
from cl_lightning.loop.run import flops_per_image
from cl_lightning.measures import CostMeter, Stopwatch, TaskCost
from cl_lightning.measures.cost import peak_process_bytes, raw_bytes, reset_peaks
from cl_lightning.memory import Memory
from cl_lightning.strategies.baselines.finetune import Finetune


def test_peaks_of_a_gpu_that_this_process_has_not_touched_are_not_reset(monkeypatch):
    def reset(device):
        raise RuntimeError("Invalid device argument: did you call init?")  # as torch does

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    reset_peaks(torch.device("cuda", 1))


def test_seconds_go_to_one_kind_at_a_time():
    meter = CostMeter()
    meter.begin_task(torch.device("cpu"))
    began = time.perf_counter()
    for kind, seconds in (("training", 0.03), (None, 0.02), ("statistics", 0.01), ("training", 0.02)):
        meter.enter(kind)
        time.sleep(seconds)
    assert meter.enter("saving") == "training"
    meter.enter(None)
    task, all_of_it = meter.tasks[0], time.perf_counter() - began
    assert task.training >= 0.05
    assert task.statistics >= 0.01
    assert task.training + task.statistics + task.saving <= all_of_it - 0.02
    meter.move("evaluation", 0.01, source="training")
    assert task.evaluation == 0.01
    assert task.training >= 0.04


def test_a_stopwatch_is_emptied_when_it_is_read():
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch:
            time.sleep(0.01)
    assert 0.02 <= watch.take() < 1
    assert watch.take() == 0


def test_flops_of_a_small_network_are_twice_its_products():
    made = run(Finetune(backbone=plain_net), max_epochs=1)
    assert flops_per_image(made.strategy, (1, 8, 8)) == 2 * (64 * 16 + 16 * 10)
    assert made.meter.summary()["flops_per_image"] == 2 * (64 * 16 + 16 * 10)
    assert made.meter.summary()["parameters"] == 64 * 16 + 16 + 16 * 10 + 10


def test_flops_are_unknown_where_a_network_cannot_be_asked():
    class Stubborn(Finetune):
        def predict(self, images):
            if len(images) == 1:
                raise ValueError("one is too few")
            return super().predict(images)

    assert run(Stubborn(), max_epochs=1).meter.summary()["flops_per_image"] is None


def test_memory_is_counted_as_in_memory_aligned_comparisons():
    assert TaskCost(parameters=463_504, raw_bytes=2000 * 3072).memory_mb == pytest.approx(7.63, abs=0.005)
    assert TaskCost(parameters=10 * 463_504, raw_bytes=2000 * 3072).memory_mb == pytest.approx(23.54, abs=0.005)
    memory = Memory(5)
    rows = torch.zeros(9, 1, 8, 8, dtype=torch.uint8)
    memory.add(rows, torch.zeros(9, dtype=torch.int64), torch.zeros(9, dtype=torch.int64), Draw.of(9, 0))
    assert raw_bytes(nn.ModuleList([memory])) == 5 * 64


def test_trainable_parameters_are_counted_in_the_last_phase():
    cost = run(Finetune(backbone=plain_net, freeze_backbone=True), max_epochs=1).meter.summary()
    assert cost["trainable_parameters"] == 16 * 10 + 10
    assert cost["parameters"] == cost["trainable_parameters"] + 64 * 16 + 16


def test_the_peak_of_memory_is_that_of_the_task():
    size = 2**26
    meter = CostMeter()
    meter.begin_task(torch.device("cpu"))
    # Pages of its own: an allocator may hand out some that the process holds already, which is no new peak.
    with mmap.mmap(-1, size) as block:
        block.write(b"x" * size)
    meter.note_peaks()
    meter.begin_task(torch.device("cpu"))
    meter.note_peaks()
    first, second = (task.peak_process_bytes for task in meter.tasks)
    if first == second and not _peak_can_be_reset():
        pytest.skip("this system does not reset the peak of a process: it is then that of the run so far")
    assert first > second + size // 2


def _peak_can_be_reset() -> bool:
    with mmap.mmap(-1, 2**26) as block:
        block.write(b"x" * 2**26)
        held = peak_process_bytes()
    reset_peaks(torch.device("cpu"))
    return peak_process_bytes() < held


def test_a_saved_account_is_continued_and_unknown_entries_are_ignored():
    meter = CostMeter()
    meter.load_state_dict([{"training": 2.0, "images": 5.0, "unknown": 1}])
    meter.resume_task(torch.device("cpu"))
    meter.add(images=3, steps=1)
    assert (meter.tasks[0].training, meter.tasks[0].images, meter.tasks[0].steps) == (2.0, 8.0, 1)
