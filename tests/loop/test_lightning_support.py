"""Callbacks and options of Lightning: each is known to the tables, and starts again with each fit or is refused."""

import inspect
import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer, callbacks
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from support.runs import loop, plain_net, run, sgd

from cl_lightning.loop.lightning_support import CALLBACKS, TRAINER, reset_best
from cl_lightning.strategies.baselines.finetune import Finetune


def finetune():
    return Finetune(backbone=plain_net, optimizer=sgd)


def test_the_table_knows_each_callback_of_lightning():
    names = {getattr(callbacks, name) for name in callbacks.__all__}
    assert names == set(CALLBACKS), "decide whether it works with a stream, and add it to CALLBACKS"


def test_the_table_knows_each_option_of_the_trainer():
    names = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert names == set(TRAINER), "decide whether it works with a stream, and add it to TRAINER"


class Unfreezes(BaseFinetuning):
    def freeze_before_training(self, pl_module): ...

    def finetune_function(self, pl_module, epoch, optimizer): ...


REFUSED = {
    callbacks.BackboneFinetuning: lambda: callbacks.BackboneFinetuning(),
    callbacks.BaseFinetuning: Unfreezes,
    callbacks.BatchSizeFinder: lambda: callbacks.BatchSizeFinder(),
    callbacks.GradientAccumulationScheduler: lambda: callbacks.GradientAccumulationScheduler({0: 1, 1: 4}),
    callbacks.LearningRateFinder: lambda: callbacks.LearningRateFinder(),
    callbacks.ModelPruning: lambda: callbacks.ModelPruning("l1_unstructured"),
    callbacks.OnExceptionCheckpoint: lambda: callbacks.OnExceptionCheckpoint("folder"),
    callbacks.SpikeDetection: lambda: callbacks.SpikeDetection(),
    callbacks.StochasticWeightAveraging: lambda: callbacks.StochasticWeightAveraging(0.1),
    callbacks.EMAWeightAveraging: lambda: callbacks.EMAWeightAveraging(),
    callbacks.WeightAveraging: lambda: callbacks.WeightAveraging(),
}


def test_each_refused_callback_has_a_case():
    assert set(REFUSED) == {kind for kind, reason in CALLBACKS.items() if reason is not None}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_a_callback_of_one_fit_is_refused_with_what_to_use(kind):
    callback = REFUSED[kind]()
    with pytest.raises(
        ValueError, match=rf"^trainer\.callbacks: {type(callback).__name__} does not work .*; use"
    ) as raised:
        loop(finetune(), callback, enable_checkpointing=True)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profiler": "simple"}, "trainer.profiler SimpleProfiler ends with the first fit; use"),
        ({"profiler": "advanced"}, "trainer.profiler AdvancedProfiler ends"),
        ({"profiler": "pytorch"}, "trainer.profiler PyTorchProfiler ends"),
        ({"overfit_batches": 2}, "trainer.overfit_batches is 2; .* use trainer.limit_train_batches"),
        ({"limit_train_batches": 0}, "trainer.limit_train_batches is 0; .* give at least 1"),
        ({"limit_test_batches": 0.0}, "trainer.limit_test_batches is 0; .* give at least 1"),
        ({"min_steps": 5}, "trainer.min_steps is 5; .* use trainer.min_epochs"),
        ({"max_steps": 5}, "trainer.max_steps is 5; .* use trainer.max_epochs"),
        ({"barebones": True, "log_every_n_steps": None}, "trainer.barebones .*; use trainer.logger false"),
        ({"plugins": [AsyncCheckpointIO()]}, "trainer.plugins has AsyncCheckpointIO; .* leave it out"),
    ],
)
def test_an_option_of_one_fit_is_refused_with_what_to_use(options, message):
    with pytest.raises(ValueError, match=message):
        loop(finetune(), **options)


class OneCycle(Finetune):
    """The learning rate rises and falls within each phase, step by step, as Lightning's documentation shows it."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_estimated_steps_match_the_fit(accumulate):
    rows = []

    class Notes(Callback):
        def on_train_start(self, trainer, pl_module):
            self.before = trainer.global_step

        def on_train_end(self, trainer, pl_module):
            steps = trainer.global_step - self.before
            rows.append((steps, int(trainer.estimated_stepping_batches), trainer.optimizers[0].param_groups[0]["lr"]))

    run(OneCycle(backbone=plain_net), Notes(), accumulate_grad_batches=accumulate)
    assert len(rows) == 3
    for steps, estimated, rate in rows:
        assert steps == estimated
        assert rate < 0.01  # of 0.1


def test_a_model_checkpoint_with_a_monitor_keeps_the_best_of_each_task(tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="val/accuracy", mode="max")
    run(finetune(), saver, data={"val_fraction": 0.2}, enable_checkpointing=True)
    tasks = [torch.load(file, weights_only=True)["cl_lightning"]["place"]["task"] for file in tmp_path.glob("*.ckpt")]
    assert sorted(tasks) == [0, 1, 2]


@pytest.mark.parametrize("make", [lambda **o: EarlyStopping(**o), lambda **o: ModelCheckpoint(**o)])
@pytest.mark.parametrize(("mode", "worst"), [("min", math.inf), ("max", -math.inf)])
def test_the_best_value_is_forgotten(make, mode, worst):
    callback = make(monitor="val/loss", mode=mode)
    fresh = {name: str(value) for name, value in vars(callback).items()}
    name = "best_score" if isinstance(callback, EarlyStopping) else "kth_value"
    assert float(getattr(callback, name)) == worst
    setattr(callback, name, torch.tensor(0.5))
    callback.best_model_score, callback.best_k_models = torch.tensor(0.5), {"a": torch.tensor(0.5)}
    reset_best([callback])
    assert {key: str(value) for key, value in vars(callback).items() if key in fresh} == fresh


@pytest.mark.filterwarnings("ignore:.*you need to define a `flops_per_batch`")
def test_callbacks_that_work_do_so_for_all_tasks(tmp_path):
    """Those of the table that a run needs nothing else for; the others have tests of their own."""
    logger = CSVLogger(tmp_path)
    seen = [callbacks.LambdaCallback(), LearningRateMonitor(), callbacks.DeviceStatsMonitor(cpu_stats=False)]
    seen += [callbacks.ModelSummary(), callbacks.RichModelSummary(), callbacks.TQDMProgressBar(refresh_rate=0)]
    seen += [callbacks.ThroughputMonitor(batch_size_fn=len, window_size=2)]
    made = run(finetune(), *seen, logger=logger, enable_progress_bar=True, enable_model_summary=True, max_epochs=1)
    assert made.matrix.learned == 3
