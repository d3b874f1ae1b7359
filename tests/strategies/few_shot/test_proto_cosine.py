import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from support import ROOT
from support.few_shot import OPTIONS, sessions
from support.runs import assert_same, loop
from torch.nn import functional as F

from cl_lightning.cli import main
from cl_lightning.datamodules.npz import NpzData
from cl_lightning.loop import TaskLoop
from cl_lightning.loop.results import measures
from cl_lightning.models import Backbone
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.few_shot.proto_cosine import ProtoCosine
from cl_lightning.stream import FewShot
from cl_lightning.stream.scenarios import read_lists
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "ProtoCosine": Subject(
        small(ProtoCosine),
        first_task_is_finetuning=False,
        reason="class means take the place of the head when the session ends",
    ),
}


def test_sessions_take_no_step_and_leave_the_backbone_and_older_prototypes_as_they_are():
    made = sessions(ProtoCosine(**OPTIONS), until=0)
    strategy, steps = made.strategy, made.trainer.global_step
    before = {name: value.clone() for name, value in strategy.network.backbone.state_dict().items()}
    means = strategy.prototypes.means.clone()
    for task in made.stream.tasks[1:]:
        made._run_task(task, None)
    assert made.trainer.global_step == steps > 0
    assert_same(before, strategy.network.backbone.state_dict())
    assert torch.equal(strategy.prototypes.means[:6], means)
    assert strategy.prototypes.counts.tolist()[6:] == [5, 5, 5, 5]


def test_the_base_session_is_trained_under_scaled_cosines_that_are_thrown_away():
    made = loop(ProtoCosine(**OPTIONS, scale=9.0), max_epochs=1, options={"stop_after_task": 0})
    made._prepare(None)
    strategy = made.strategy
    strategy.network.head.grow(3)
    features = torch.randn(4, 64)
    rows = strategy.network.head.temporary.weight()
    expected = 9.0 * F.cosine_similarity(features[:, None], rows[None], dim=2)
    torch.testing.assert_close(strategy.network.head(features), expected)
    strategy.end_phase(strategy.phases(made.stream.tasks[0])[0])
    assert not strategy.network.head.temporary.blocks


def test_scores_are_cosines_to_means_of_raw_features():
    made = sessions(ProtoCosine(**OPTIONS))
    strategy = made.strategy.eval()
    with torch.no_grad():
        features, labels = strategy.passes.all_features()  # of the last session
        images = next(strategy.passes.batches()).images
        for column in (8, 9):
            mean = features[labels == column].double().mean(0)
            expected = F.cosine_similarity(strategy.network.backbone(images).double(), mean, dim=1)
            torch.testing.assert_close(strategy.predict(images)[:, column].double(), expected, rtol=1e-5, atol=1e-6)


class Told(Backbone):
    """One-hot vectors of what the first pixel says."""

    def __init__(self, image_shape, classes: int) -> None:
        super().__init__(image_shape)
        self.num_features, self.scale = classes, torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        told = (images[:, 0, 0, 0] * 255).round().long()
        return F.one_hot(told, self.num_features) * self.scale


def fscil_files(folder: Path, classes: int = 12) -> Path:
    """Images whose first pixel is their label, 20 for training and 4 for testing a class, in a mixed order."""
    chance = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 20), ("test", 4)):
        labels = chance.permutation(np.repeat(np.arange(classes), count))
        images = chance.integers(0, 256, (len(labels), 6, 6), dtype=np.uint8)
        images[:, 0, 0] = labels
        arrays |= {f"x_{part}": images, f"y_{part}": labels}
    np.savez(folder / "data.npz", **arrays, class_names=np.array([f"c{i}" for i in range(classes)]))
    return folder / "data.npz"


def published(path: Path, folder: Path) -> list[list[int]]:
    """Lists of 3 images for each of the classes 6 to 11, two classes a session, and a file of them."""
    labels = np.load(path)["y_train"]
    lists = [
        [int(i) for label in (first, first + 1) for i in np.flatnonzero(labels == label)[-3:]] for first in (6, 8, 10)
    ]
    (folder / "lists.txt").write_text("# three sessions\n" + "\n".join(" ".join(map(str, row)) for row in lists))
    return lists


def test_the_whole_protocol_with_lists_from_a_file(tmp_path):
    """With features that are the label, every session is right, lists, test sets and measures as well."""
    path = fscil_files(tmp_path)
    lists = published(path, tmp_path)
    scenario = FewShot(base=6, way=2, shot=3, index_lists=str(tmp_path / "lists.txt"))
    data = NpzData(str(path), scenario=scenario, batch_size=32, mean=[0.0], std=[1.0])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    trainer = Trainer(**quiet, accelerator="cpu", devices=1, enable_model_summary=False, num_sanity_val_steps=0)
    made = TaskLoop(trainer, ProtoCosine(backbone=partial(Told, classes=12)), data)
    matrix = made.fit()
    assert [sorted(part.tolist()) for part in made.stream.train[1:]] == [sorted(row) for row in lists]
    assert matrix.totals.tolist() == [24, 8, 8, 8]  # all test images of the classes
    for t in range(4):
        found = measures(matrix, made.stream, t)
        assert found["average_accuracy"] == 1.0
        if t:
            assert (found["harmonic_accuracy"], found["performance_drop"]) == (1.0, 0.0)


def test_accuracy_is_that_of_base_and_novel_classes_by_their_number():
    made = sessions(ProtoCosine(**OPTIONS))
    per_class, totals = made.matrix.per_class, made.matrix.confusion.sum(1).double()
    for t, seen in ((1, 8), (2, 10)):
        found = measures(made.matrix, made.stream, t)
        parts = [per_class[t, :6].mean(), per_class[t, 6:seen].mean()]
        assert [found["base_accuracy"], found["novel_accuracy"]] == pytest.approx([float(part) for part in parts])
        weighted = (per_class[t, :seen] * totals[:seen]).sum() / totals[:seen].sum()
        assert found["average_accuracy"] == pytest.approx(float(weighted))
    drop = float(made.matrix.R_ci[0, 0]) - found["average_accuracy"]
    assert found["performance_drop"] == pytest.approx(drop)


def test_sessions_are_learnt_while_fine_tuning_forgets_the_base():
    mine, plain = (measures((m := sessions(cls(**OPTIONS))).matrix, m.stream, 2) for cls in (ProtoCosine, Finetune))
    # Measured: a harmonic mean of .73 against 0, an average accuracy of .79.
    assert mine["harmonic_accuracy"] > plain["harmonic_accuracy"] + 0.35
    assert mine["average_accuracy"] > 0.6


def test_a_scale_that_is_not_positive_is_an_error():
    with pytest.raises(ValueError, match=r"ProtoCosine: scale is 0\.0"):
        ProtoCosine(scale=0.0)


def test_published_lists_of_cifar100_are_eight_sessions_of_25():
    lists = read_lists(str(ROOT / "experiments" / "data" / "cifar100_fscil_sessions.txt"))
    assert [len(row) for row in lists] == [25] * 8
    assert len({index for row in lists for index in row}) == 200
    assert lists[0][:3] == [29774, 33344, 4815]


def test_the_command_line_learns_sessions(tmp_path, monkeypatch):
    root = ROOT / "experiments"
    shutil.copytree(root, tmp_path / "experiments")
    monkeypatch.chdir(tmp_path)
    command = "fit --config digits_fscil --config teen --run_dir run"
    short = "--trainer.max_epochs 2 --trainer.enable_progress_bar false --trainer.accelerator cpu"
    assert main([*command.split(), *short.split()]) == 0
    found = json.loads((tmp_path / "run" / "results.json").read_text())["measures"]
    assert {"base_accuracy", "novel_accuracy", "harmonic_accuracy", "performance_drop"} <= found.keys()
