import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from support.runs import assert_same_run, loop, plain_net, run, sgd

from cl_lightning.data import TensorSource
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.loop import LoopOptions, TaskLoop, run_files
from cl_lightning.models import CifarResNet
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.ewc import EWC
from cl_lightning.strategies.exemplar_free.lwf import LwF
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.strategies.rehearsal.foster import FOSTER
from cl_lightning.strategy import PhaseOptions
from cl_lightning.stream import ClassIncremental, Online

ER_SMALL = partial(ER, backbone=plain_net, optimizer=sgd, memory_size=60)
FOSTER_SMALL = partial(
    FOSTER, backbone=plain_net, optimizer=sgd, memory_size=60, compress_options=PhaseOptions(epochs=3)
)
ONLINE = Online(ClassIncremental(sizes=[4, 3, 3]), batch_size=20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": -1}, r"trainer.max_epochs is -1"),
        ({"max_epochs": 0}, r"trainer.max_epochs is 0"),
        ({"max_steps": 10}, r"trainer.max_steps is 10"),
        ({"strategy": "ddp_spawn", "devices": 2}, "use 'auto' or 'ddp'"),
        ({"precision": "64-true"}, "trainer.precision is '64-true'"),
        ({"reload_dataloaders_every_n_epochs": 1}, "must stay 0"),
    ],
)
def test_a_trainer_that_cannot_learn_a_stream_is_reported(options, message):
    with pytest.raises(ValueError, match=message):
        loop(Finetune(), **options)


@pytest.mark.parametrize("wrong", [{"first_task_epochs": 0}, {"phase_epochs": {"train": 0}}, {"keep_tasks": -1}])
def test_impossible_options_are_reported(wrong):
    with pytest.raises(ValueError, match="loop"):
        LoopOptions(**wrong)


def test_epochs_of_a_phase_that_there_is_not_are_reported():
    with pytest.raises(ValueError, match="phase_epochs names a phase 'trian'; Finetune has train"):
        run(Finetune(backbone=plain_net), options={"phase_epochs": {"trian": 3}})


def told_of_phases(strategy, scenario):
    """What is said of phases and of data that are seen once, and the epochs of each task."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made = run(strategy, data={"scenario": scenario}, max_epochs=2)
    messages = [str(warning.message) for warning in told]
    return [text for text in messages if "each phase takes one pass over its data" in text], made.meter.tasks


def test_a_stream_that_is_seen_once_is_seen_once_by_each_phase_which_is_reported_once():
    told, tasks = told_of_phases(FOSTER_SMALL(), ONLINE)
    assert len(told) == 1
    assert "FOSTER has the phases boost, compress" in told[0]
    assert [task.epochs for task in tasks] == [{"train": 1}, *[{"boost": 1, "compress": 1}] * 2]


@pytest.mark.parametrize(
    ("make", "scenario"), [(ER_SMALL, ONLINE), (FOSTER_SMALL, ONLINE.base)], ids=["one phase", "several epochs"]
)
def test_nothing_is_reported_of_a_method_of_one_phase_nor_of_several_epochs(make, scenario):
    assert told_of_phases(make(), scenario)[0] == []


def test_one_trainer_counts_epochs_and_steps_over_the_whole_stream():
    made = run(Finetune(backbone=plain_net), options={"first_task_epochs": 3, "phase_epochs": {}})
    assert made.trainer.current_epoch == 3 + 2 + 2
    steps = [-(-len(part) // 64) for part in made.stream.train]
    assert made.trainer.global_step == 3 * steps[0] + 2 * steps[1] + 2 * steps[2]
    assert torch.isnan(made.matrix.R_ci[0, 1:]).all()
    assert not torch.isnan(made.matrix.R_ci[2]).any()


def test_a_run_that_stopped_after_a_task_is_resumed_to_the_same_end(tmp_path):
    whole = run(ER_SMALL())
    first = run(ER_SMALL(), folder=tmp_path, options={"stop_after_task": 0})
    assert first.matrix.learned == 1
    second = loop(ER_SMALL(), folder=tmp_path)
    second.fit("last")
    assert_same_run(whole, second)
    assert second.trainer.global_step == whole.trainer.global_step


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    done = run(ER_SMALL(), folder=tmp_path)
    again = loop(ER_SMALL(), folder=tmp_path)
    again.fit("last")
    assert_same_run(done, again)
    assert again.trainer.global_step == 0 or again.trainer.global_step == done.trainer.global_step


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    run(ER_SMALL(), folder=tmp_path, options={"stop_after_task": 0})
    with pytest.raises(ValueError, match="holds a run already; add --ckpt_path last"):
        run(ER_SMALL(), folder=tmp_path)


def test_the_last_checkpoints_of_tasks_are_kept(tmp_path):
    for keep, expected in ((0, []), (2, ["task_001.ckpt", "task_002.ckpt"]), (None, None)):
        folder = tmp_path / str(keep)
        run(Finetune(backbone=plain_net), folder=folder, options={"keep_tasks": keep}, max_epochs=1)
        found = sorted(path.name for path in (folder / "checkpoints").glob("task_*.ckpt"))
        assert found == (expected if expected is not None else [f"task_00{index}.ckpt" for index in range(3)])
        assert (folder / "checkpoints" / "last.ckpt").is_file()


def test_a_checkpoint_of_another_strategy_or_stream_or_seed_is_refused(tmp_path):
    run(ER_SMALL(), folder=tmp_path, options={"stop_after_task": 0})
    with pytest.raises(ValueError, match="of another strategy"):
        loop(LwF(backbone=plain_net), folder=tmp_path).fit("last")
    halves = loop(ER_SMALL(), folder=tmp_path, data={"scenario": ClassIncremental(sizes=[5, 5])})
    with pytest.raises(ValueError, match="stream"):
        halves.fit("last")
    wide = loop(ER(optimizer=sgd, memory_size=60), folder=tmp_path)
    with pytest.raises(ValueError, match="of another network or other options"):
        wide.fit("last")


def test_evaluating_a_checkpoint_gives_the_last_row_again(tmp_path):
    done = run(ER_SMALL(), folder=tmp_path, options={"stop_after_task": 1})
    again = loop(ER_SMALL(), folder=tmp_path).test("last")
    assert torch.equal(again.R_ci[1, :2], done.matrix.R_ci[1, :2])
    earlier = loop(ER_SMALL(), folder=tmp_path)
    with pytest.raises(ValueError, match="no validation samples"):
        earlier.validate("last")


def test_validation_sees_all_tasks_so_far(tmp_path):
    data = {"val_fraction": 0.2}
    made = run(ER_SMALL(), folder=tmp_path, data=data)
    values = loop(ER_SMALL(), folder=tmp_path, data=data).validate("last")
    assert 0.4 < values["val/accuracy"] <= 1
    assert sum(len(part) for part in made.stream.val) > 200


def test_early_stopping_is_reset_at_each_task():
    stopping = EarlyStopping("val/loss", patience=1, mode="min", min_delta=10.0)  # nothing is ever better by that much
    made = run(Finetune(backbone=plain_net), stopping, data={"val_fraction": 0.2}, max_epochs=9)
    assert made.trainer.current_epoch == 3 * 2
    assert made.matrix.learned == 3


@pytest.mark.parametrize(
    ("monitor", "data", "message"),
    [
        ("val/acc", {"val_fraction": 0.2}, "the validation metrics are val/accuracy and val/loss"),
        ("val/loss", {}, "--data.val_fraction"),
    ],
)
def test_monitoring_a_missing_metric_is_an_error_before_training(monitor, data, message):
    made = loop(Finetune(backbone=plain_net), EarlyStopping(monitor), data=data)
    with pytest.raises(ValueError, match=message):
        made.fit()
    assert not made.started


def test_channels_may_come_last(tmp_path):
    def learnt(last, **where):
        torch.manual_seed(0)
        made = loop(Finetune(backbone=partial(CifarResNet, depth=8, width=4)), options={"channels_last": last}, **where)
        made.fit()
        return made

    plain, other = learnt(False), learnt(True, folder=tmp_path)
    weight = other.strategy.network.backbone.layer2[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    torch.testing.assert_close(plain.matrix.R_ci, other.matrix.R_ci, atol=0.1, rtol=0, equal_nan=True)
    again = loop(
        Finetune(backbone=partial(CifarResNet, depth=8, width=4)), folder=tmp_path, options={"channels_last": True}
    )
    assert torch.equal(again.test("last").R_ci[-1], other.matrix.R_ci[-1])


@pytest.fixture
def compiler():
    """A backend that traces and differentiates as others do, and generates no code."""
    from torch._dynamo.eval_frame import is_dynamo_supported

    if not is_dynamo_supported():
        pytest.skip("torch.compile does not run on this Python or system")
    return "aot_eager"


def test_a_compiled_backbone_outlives_growth_teachers_and_checkpoints(tmp_path, compiler):
    plain = run(LwF(backbone=plain_net), folder=tmp_path / "plain")
    made = loop(LwF(backbone=plain_net), folder=tmp_path / "made", options={"compile": compiler})
    made.fit()
    assert made.strategy.network.backbone._compiled_call_impl is not None
    torch.testing.assert_close(made.matrix.R_ci, plain.matrix.R_ci, atol=0.1, rtol=0, equal_nan=True)
    compiled, weights = made.strategy.state_dict(), plain.strategy.state_dict()
    assert list(compiled) == list(weights)
    for name, value in weights.items():
        torch.testing.assert_close(compiled[name], value, atol=1e-4, rtol=1e-3)
    again = loop(LwF(backbone=plain_net), folder=tmp_path / "made")  # what was compiled loads into what is not
    assert torch.equal(again.test("last").R_ci[-1], made.matrix.R_ci[-1])


def test_importance_of_weights_is_measured_on_a_compiled_backbone(compiler):
    plain = run(EWC(backbone=plain_net))
    made = loop(EWC(backbone=plain_net), options={"compile": compiler})
    made.fit()
    omegas = plain.strategy.consolidation.importance.omegas
    for name, value in made.strategy.consolidation.importance.omegas.items():
        torch.testing.assert_close(value, omegas[name], atol=1e-5, rtol=1e-2)


def test_a_compiler_that_torch_does_not_have_is_reported():
    with pytest.raises(ValueError, match=r"compile is 'gcc'; use .*'inductor'.*, or null"):
        LoopOptions(compile="gcc")


class Gaining(ContinualDataModule):
    """Six classes of tiny images, of which the first ``known`` are there."""

    mean, std = (0.5,), (0.5,)

    def __init__(self, known: int, changed: bool = False) -> None:
        super().__init__(scenario=ClassIncremental(increment=2), batch_size=10)
        self.known, self.changed = known, changed

    def source(self, *, train: bool) -> TensorSource:
        rng = np.random.default_rng(0 if train else 1)
        count = 20 if train else 5
        images = rng.integers(0, 60, (6, count, 1, 4, 4))
        for label in range(6):
            images[label, :, 0, label % 4, label // 4 :] += 180
        if self.changed and train:
            images[0, 0] += 1
        labels = np.repeat(np.arange(self.known), count)
        names = [f"class {label}" for label in range(self.known)]
        return TensorSource(images[: self.known].reshape(-1, 1, 4, 4).astype(np.uint8), labels, class_names=names)


def remade(folder, options):
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, **settings)
    return TaskLoop(trainer, ER_SMALL(), Gaining(**options), run_dir=folder)


def test_a_finished_stream_with_new_classes_learns_the_new_classes_alone(tmp_path):
    yesterday = remade(tmp_path, {"known": 4})
    yesterday.fit()
    before = yesterday.trainer.global_step
    today = remade(tmp_path, {"known": 6})
    today.fit("last")
    assert today.matrix.learned == 3
    assert today.trainer.global_step - before == 2 * 4  # one task of 40 images, 2 epochs
    assert torch.equal(today.matrix.R_ci[:2, :2].nan_to_num(-1), yesterday.matrix.R_ci.nan_to_num(-1))
    assert today.strategy.network.head.block_sizes() == [2, 2, 2]
    at_once = remade(tmp_path / "other", {"known": 6})
    at_once.fit()
    assert_same_run(at_once, today)


def test_data_that_changed_since_the_checkpoint_are_reported(tmp_path):
    remade(tmp_path, {"known": 4}).fit()
    with pytest.raises(ValueError, match=r"task 0 .* has other classes or other samples"):
        remade(tmp_path, {"known": 6, "changed": True}).fit("last")


@pytest.mark.parametrize(("keep", "expected"), [(1, [1002]), (2, [1001, 1002]), (None, [998, 999, 1000, 1001, 1002])])
def test_the_newest_tasks_are_kept_also_in_streams_of_more_than_a_thousand(tmp_path, monkeypatch, keep, expected):
    folder = tmp_path / "checkpoints"
    made = loop(Finetune(backbone=plain_net, optimizer=sgd), folder=tmp_path, options={"keep_tasks": keep})
    made.files.save = lambda **_: folder / "last.ckpt"
    monkeypatch.setattr(run_files.results, "collect", lambda run: {})
    folder.mkdir()
    (folder / "last.ckpt").write_bytes(b"state")
    for index in (998, 999, 1000, 1001, 1002):
        made.files.write_task(SimpleNamespace(index=index))
    names = {path.name for path in folder.glob("task_*.ckpt")}
    assert names == {f"task_{index}.ckpt" for index in expected}
