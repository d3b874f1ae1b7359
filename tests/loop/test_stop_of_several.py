"""A request to stop that one of two processes gets in an evaluation or in a pass of statistics."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from support.forks import pair
from support.runs import assert_same_run, loop, plain_net, run

from cl_lightning import distributed
from cl_lightning.loop import Interrupted
from cl_lightning.loop.stopping import StopRequest
from cl_lightning.strategies.base.passes import Passes
from cl_lightning.strategies.pretrained.simplecil import SimpleCIL

# A batch of 3: the evaluation of 250 images after task 1, and the pass over its 436 images, end with a batch of a
# single image, which process 1 has and process 0 has not.
TWO = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False, "data": {"eval_batch_size": 3}}
COMMON_TESTS, COMMON_PASS = 83, 145


def simplecil():
    return SimpleCIL(backbone=plain_net)


class Watched(Callback):
    """Counts the batches of one evaluation; process 1 gets a signal before a batch of it."""

    def __init__(self, task: int, batch: int, seconds: float = 0.0) -> None:
        self.task, self.batch, self.seconds, self.seen = task, batch, seconds, 0

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if pl_module.task.index == self.task:
            self.seen += 1
            time.sleep(self.seconds)
            if batch_idx == self.batch and distributed.rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)


def of_both(number):
    return distributed.all_gather_rows(torch.tensor([number])).tolist()


def stopped(folder, *callbacks):
    with pytest.raises(Interrupted) as stop:
        loop(simplecil(), *callbacks, folder=folder, **TWO).fit()
    assert stop.value.signum == signal.SIGTERM
    return torch.load(stop.value.path, weights_only=True)["cl_lightning"]["place"]


def resumed(folder):
    made = loop(simplecil(), folder=folder, **TWO)
    made.fit("last")
    return made


def in_an_evaluation(folder):
    watched = Watched(1, 3, seconds=0.02)
    place = stopped(Path(folder), watched)
    assert (place["task"], place["learnt"], place["done"]) == (1, True, False)
    first, second = of_both(watched.seen)
    assert first == second < COMMON_TESTS
    assert_same_run(run(simplecil(), **TWO), resumed(Path(folder)))


def in_a_batch_that_one_process_has(folder):
    watched = Watched(1, COMMON_TESTS)
    place = stopped(Path(folder), watched)
    assert (place["task"], place["done"]) == (1, True)
    assert of_both(watched.seen) == [COMMON_TESTS, COMMON_TESTS + 1]
    assert resumed(Path(folder)).matrix.learned == 3


def in_a_pass(folder):
    whole = run(simplecil(), **TWO)
    original, seen = Passes.batches, []

    def batches(self, **options):
        for batch in original(self, **options):
            if self._strategy.task.index == 1:
                seen.append(None)
                time.sleep(0.02)
                if len(seen) == 4 and distributed.rank() == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    Passes.batches = batches
    place = stopped(Path(folder))
    Passes.batches = original
    assert (place["task"], place["done"]) == (0, True)
    first, second = of_both(len(seen))
    assert first == second < COMMON_PASS
    assert_same_run(whole, resumed(Path(folder)))


@pytest.mark.parametrize("where", [in_an_evaluation, in_a_batch_that_one_process_has, in_a_pass])
def test_both_processes_stop_though_one_got_the_signal_and_one_has_fewer_batches(tmp_path, where):
    pair(where, str(tmp_path))


def test_a_signal_that_arrives_while_processes_exchange_is_seen_at_the_next_exchange(monkeypatch):
    request = StopRequest(loop(simplecil()).trainer)
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with request.listening():
        assert not request.made(now=True)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
        assert request.made(now=True)
    assert request.signum == signal.SIGTERM
