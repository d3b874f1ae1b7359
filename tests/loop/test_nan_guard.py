import json
import math
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from support import forks
from support.runs import NormNet, assert_same, loop, plain_net, run, sgd

from cl_lightning.callbacks.importance_penalty import ImportancePenalty
from cl_lightning.loop import LoopOptions, NotFiniteError
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.rehearsal.gem import AGEM


class Breaks(Callback):
    """Makes the loss of one step nan, or its gradients infinite, on one process."""

    def __init__(self, task=1, epoch=1, batch=3, *, rank=0, times=math.nan):
        self.position, self.rank, self.times = (task, epoch, batch), rank, times

    def losses(self, strategy, batch, output):
        trainer = strategy.trainer
        here = (strategy.task.index, strategy.epoch, trainer.fit_loop.epoch_loop.batch_idx)
        broken = here == self.position and trainer.global_rank == self.rank
        return {"broken": output.logits.sum() * (self.times if broken else 0.0)}


def small(**options):
    return Finetune(backbone=plain_net, optimizer=sgd, **options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run_and_says_where(tmp_path, value):
    options = {"save_every_n_steps": 2, "save_every_seconds": 0.0}
    made = loop(small(), Breaks(times=value), folder=tmp_path, options=options)
    with pytest.raises(NotFiniteError, match=r"is -?(nan|inf) in task 1, phase 'train', epoch 1, batch 3; lower"):
        made.fit()
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    assert json.loads((tmp_path / "results.json").read_text())["finished"] == 1
    resumed = loop(small(), folder=tmp_path, options=options)  # with what caused it mended
    resumed.fit("last")
    assert resumed.matrix.learned == 3


def test_no_checkpoint_is_written_of_a_network_that_is_lost(tmp_path):
    class Late(Breaks):
        """Breaks the last step of the stream but a few, so that only the end of the epoch would tell."""

    made = loop(small(), Late(2, 1, 4), folder=tmp_path, options={"save_every_seconds": 0.0})
    with pytest.raises(NotFiniteError, match="task 2"):
        made.fit()
    for path in (tmp_path / "checkpoints").glob("*.ckpt"):
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in saved.values()), path


class BreaksWeights(Callback):
    """The last update makes a weight, or a statistic of a normalisation layer, infinite; no loss shows it yet."""

    def __init__(self, name, batch):
        self.name, self.batch = name, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.task.index == 1 and pl_module.epoch == 1 and batch_idx == self.batch:
            pl_module.state_dict()[self.name].view(-1)[0] = math.inf


@pytest.mark.parametrize("name", ["network.backbone.layers.1.weight", "network.backbone.layers.2.running_var"])
@pytest.mark.parametrize("batch", [2, -1])
def test_weights_are_checked_before_a_checkpoint_and_not_the_losses_alone(tmp_path, name, batch):
    options = {"save_every_n_steps": 1, "save_every_seconds": 0.0, "keep_last": 5}
    epoch = len(run(Finetune(backbone=NormNet, optimizer=sgd), max_epochs=1).datamodule.stream.train[1]) // 64
    broken = BreaksWeights(name, batch if batch >= 0 else epoch)
    made = loop(Finetune(backbone=NormNet, optimizer=sgd), broken, folder=tmp_path, options=options)
    with pytest.raises(NotFiniteError, match=f"{name} is not finite in task 1, .* lower learning rate"):
        made.fit()
    files = list((tmp_path / "checkpoints").glob("*.ckpt"))
    assert len(files) > 2
    for path in files:
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in saved.values()), path


def test_steps_without_finite_gradients_are_left_out_and_kept_count_of(tmp_path):
    with pytest.warns(UserWarning, match="gradients are not finite in task 1, phase 'train', epoch 1, batch 3"):
        made = run(small(), Breaks(), folder=tmp_path, options={"nan_loss": "skip"})
    assert all(value.isfinite().all() for value in made.strategy.state_dict().values())
    found = json.loads((tmp_path / "results.json").read_text())["finite_loss"]
    assert found == {"skipped_steps": ["in task 1, phase 'train', epoch 1, batch 3"]}


@pytest.mark.parametrize("strategy", [small, lambda: AGEM(backbone=plain_net, optimizer=sgd, memory_size=60)])
def test_a_step_that_is_left_out_moves_nothing(strategy):
    """Neither momentum nor weight decay, nor a method that edits gradients."""
    weights = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            weights.append([p.detach().clone() for p in pl_module.network.parameters()])

    with pytest.warns(UserWarning, match="skipped"):
        run(strategy(), Breaks(1, 0, 3), Watch(), options={"nan_loss": "skip"}, max_epochs=1)
    still = [number for number, (first, second) in enumerate(pairwise(weights)) if _same(first, second)]
    assert len(still) == 1


def _same(first, second):
    return len(first) == len(second) and all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_the_path_of_synaptic_intelligence_passes_over_a_step_that_is_left_out():
    penalty = ImportancePenalty(estimator="si", weight=0.1)
    with pytest.warns(UserWarning, match="skipped"):
        run(small(), penalty, Breaks(1, 0, 3), options={"nan_loss": "skip"})
    assert all(value.isfinite().all() for value in penalty.state_dict().values())


def test_where_nothing_is_wrong_watching_changes_nothing():
    states = [
        run(small(), options={"nan_loss": nan_loss}).strategy.state_dict() for nan_loss in ("stop", "skip", "ignore")
    ]
    assert_same(states[0], states[1])
    assert_same(states[0], states[2])


def test_it_can_be_ignored():
    made = run(small(), Breaks(), options={"nan_loss": "ignore"})
    assert made.matrix.learned == 3
    assert any(value.isnan().any() for value in made.strategy.state_dict().values())


def test_checkpoints_keep_the_key_of_earlier_releases(tmp_path):
    run(small(), folder=tmp_path, options={"stop_after_task": 0})
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["FiniteLoss"] == {"skipped": []}


def test_another_action_is_reported():
    with pytest.raises(ValueError, match="nan_loss is 'mend'; use 'stop', 'skip' or 'ignore'"):
        LoopOptions(nan_loss="mend")


def _stopped_pair(nan_loss):
    made = loop(
        small(),
        Breaks(rank=1),
        options={"nan_loss": nan_loss},
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
    )
    if nan_loss == "skip":
        made.fit()
        assert made.nan_guard.skipped == ["in task 1, phase 'train', epoch 1, batch 3"]
        return
    with pytest.raises(NotFiniteError, match="task 1, phase 'train', epoch 1, batch 3"):
        made.fit()


@pytest.mark.parametrize("nan_loss", ["stop", "skip"])
def test_two_processes_stop_or_skip_together_where_one_breaks(nan_loss):
    forks.pair(_stopped_pair, nan_loss)
