"""Phases and their options."""

from functools import partial

import pytest
import torch
from support.runs import loop, plain_net, run, sgd

from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategy import Phase, PhaseOptions


@pytest.mark.parametrize(
    ("options", "said"), [({"epochs": -1}, "epochs is -1"), ({"batch_size": 0}, "batch_size is 0")]
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ValueError, match=f"PhaseOptions: {said}"):
        PhaseOptions(**options)


def test_an_optimizer_fills_in_with_its_schedule_where_none_is_named():
    adam, step = torch.optim.Adam, partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    assert PhaseOptions(epochs=3).filled(adam, step) == PhaseOptions(epochs=3, optimizer=adam, scheduler=step)
    assert PhaseOptions(optimizer=sgd).filled(adam, step) == PhaseOptions(optimizer=sgd)  # no schedule of another one
    own = partial(torch.optim.lr_scheduler.StepLR, step_size=2)
    assert PhaseOptions(scheduler=own).filled(adam, step) == PhaseOptions(optimizer=adam, scheduler=own)


class Two(Finetune):
    """A phase that trains and freezes what it names, on the samples that it names, and one that may not be needed."""

    needed = True

    def phases(self, task):
        head = Phase(
            "head",
            PhaseOptions(epochs=1),
            trains=self.network.head.parameters,
            freezes=lambda: [self.network.backbone],
            samples=lambda labels, replayed: labels == labels.min(),
            unaugmented=True,
            needed=lambda: self.needed,
        )
        return [Phase(), head]

    def begin_phase(self, phase, origin, sources=()):
        super().begin_phase(phase, origin, sources)
        self.seen = {**getattr(self, "seen", {}), (self.task.index, phase.name): []}

    def losses(self, batch, output):
        self.seen[self.task.index, self.phase.name] += batch.labels.tolist()
        if self.phase.name == "head":
            assert not self.network.backbone.training
            assert not any(parameter.requires_grad for parameter in self.network.backbone.parameters())
            torch.testing.assert_close(batch.images, self.data.finish(batch).images)
        return super().losses(batch, output)


def test_a_phase_trains_what_it_names_on_the_samples_that_it_names():
    made = run(Two(backbone=plain_net, optimizer=sgd), max_epochs=1)
    seen = made.strategy.seen
    assert list(seen) == [(task, name) for task in range(3) for name in ("train", "head")]
    for task in made.stream.tasks:
        assert set(seen[task.index, "train"]) == set(task.columns)
        assert set(seen[task.index, "head"]) == {min(task.columns)}


def test_a_phase_that_is_not_needed_is_left_out_and_the_run_resumes_after_it(tmp_path):
    class Unneeded(Two):
        needed = False

    options = {"stop_after_task": 0}
    made = loop(Unneeded(backbone=plain_net, optimizer=sgd), max_epochs=1, folder=tmp_path, options=options)
    made.fit()
    assert list(made.strategy.seen) == [(0, "train")]
    again = loop(Unneeded(backbone=plain_net, optimizer=sgd), max_epochs=1, folder=tmp_path)
    again.fit(ckpt_path="last")
    assert list(again.strategy.seen) == [(1, "train"), (2, "train")]
