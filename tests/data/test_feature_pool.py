"""Phases that train a head on features."""

from functools import partial
from itertools import chain

import torch
from support.runs import NormNet, loop, run, sgd

from cl_lightning.batch import Draw
from cl_lightning.callbacks.distillation import Distillation
from cl_lightning.data import FeaturePool, RandomCrop
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategy import Phase, PhaseOptions
from cl_lightning.testing import check_strategy, small


class Probe(Finetune):
    """Fine-tuning, then the head alone on the features of the task, each seen twice per epoch."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def phases(self, task):
        return [
            Phase(options=PhaseOptions(epochs=1)),
            Phase("head", PhaseOptions(epochs=2, batch_size=100), features=self.twice),
        ]

    def twice(self):
        features, labels = self.passes.all_features()
        return FeaturePool(features.repeat(2, 1), labels.repeat(2))

    def begin_phase(self, phase, origin, sources=()):
        super().begin_phase(phase, origin, sources)
        self.before = {name: value.clone() for name, value in self.network.state_dict().items()}

    def losses(self, batch, output):
        if self.phase.features is not None:
            assert not self.network.backbone.training
            assert torch.equal(self.task_columns[batch.tasks, batch.labels], torch.ones(len(batch), dtype=torch.bool))
            self.seen.append((self.task.index, self.epoch, batch.images.shape, batch.labels.tolist()))
        return super().losses(batch, output)

    def end_phase(self, phase):
        after = self.network.state_dict()
        changed = {name.split(".")[0] for name in after if not torch.equal(after[name], self.before[name])}
        assert changed == ({"head"} if phase.features is not None else {"head", "backbone"})


def test_a_phase_on_features_trains_the_head_alone_on_each_row_once_per_epoch():
    strategy = Probe(backbone=NormNet, optimizer=sgd)
    made = run(strategy, Distillation())  # which asks a teacher about images, and is left out
    for task, part in enumerate(made.stream.train):
        for epoch in range(2):
            rows = [labels for t, e, _, labels in strategy.seen if (t, e) == (task, epoch)]
            assert [len(row) for row in rows] == [100] * (2 * len(part) // 100) + [2 * len(part) % 100]
            expected = made.stream.columns_of(made.datamodule.samples(train=True).labels[part])
            assert sorted(chain(*rows)) == sorted([*expected.tolist()] * 2)
    assert {shape[1:] for _, _, shape, _ in strategy.seen} == {(16,)}
    counted = made.meter.tasks[0]
    assert counted.images == len(made.stream.train[0])  # features are no images


def test_features_of_all_samples_come_in_the_order_of_the_data_set():
    made = loop(
        Finetune(backbone=partial(NormNet, units=8)), options={"stop_after_task": 0}, data={"eval_batch_size": 37}
    )
    made.fit()
    data, strategy = made.datamodule, made.strategy.eval()
    features, labels = strategy.passes.all_features()
    raw = data.samples(train=True)
    images = raw.take(torch.as_tensor(made.stream.train[0].copy()))
    images = data.normalize(images, Draw.of(len(images), 0))
    torch.testing.assert_close(features, strategy.network.backbone(images))
    assert labels.tolist() == made.stream.columns_of(raw.labels[made.stream.train[0]]).tolist()
    data.augmentation.transforms.append(RandomCrop(padding=2))
    assert torch.equal(strategy.passes.all_features()[0], features)  # un-augmented


def test_a_run_resumes_to_the_bit_inside_a_phase_on_features():
    check_strategy(small(Probe), checks=["resume"], every_place=True)
