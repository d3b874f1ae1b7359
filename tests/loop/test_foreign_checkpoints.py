"""Checkpoints that callbacks of Lightning write: for test and predict, never for an inexact resume."""

import re

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from support.runs import StopAt, assert_same_run, loop, plain_net, run, sgd

from cl_lightning.strategies.baselines.finetune import Finetune


def finetune():
    return Finetune(backbone=plain_net, optimizer=sgd)


class Saves(Callback):
    """Saves in the middle of a step, as a user's callback does."""

    def __init__(self, dirpath):
        self.dirpath = dirpath

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.dirpath / "mine.ckpt")


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1),
        lambda folder: ModelCheckpoint(folder, every_n_epochs=1, save_top_k=-1),
        lambda folder: ModelCheckpoint(folder, monitor="val/accuracy", mode="max"),
        lambda folder: ModelCheckpoint(folder, save_last=True),
        Saves,
    ],
)
def test_a_file_of_a_callback_is_tested_but_not_resumed(tmp_path, make):
    data = {"val_fraction": 0.1}
    made = loop(
        finetune(),
        make(tmp_path / "theirs"),
        StopAt(1, 3),
        folder=tmp_path / "run",
        data=data,
        enable_checkpointing=True,
    )
    with pytest.raises(StopAt.CrashError):
        made.fit()
    files = sorted((tmp_path / "theirs").glob("*.ckpt"))
    assert files
    for file in files:
        again = loop(finetune(), data=data)
        with pytest.raises(ValueError, match=f"{re.escape(str(file))}: a callback wrote it .*; use --ckpt_path last"):
            again.fit(file)
    assert loop(finetune(), data=data).test(files[0]).learned
    resumed = loop(finetune(), folder=tmp_path / "run", data=data)
    resumed.fit("last")
    assert_same_run(run(finetune(), data=data), resumed)


@pytest.mark.parametrize("options", [{"save_last": True}, {"filename": "last"}, {"filename": "task_001"}])
def test_a_callback_does_not_replace_the_checkpoints_of_the_run(tmp_path, options):
    for dirpath in (None, tmp_path / "run" / "checkpoints"):
        made = loop(finetune(), ModelCheckpoint(dirpath, **options), folder=tmp_path / "run", enable_checkpointing=True)
        with pytest.raises(ValueError, match=r"ModelCheckpoint: (last|task_001)\.ckpt is a name of the run's own"):
            made.fit()
    assert not (tmp_path / "run").exists()
