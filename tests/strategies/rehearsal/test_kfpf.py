"""k-FPF, periodic fine-tuning of the modules that forget most."""

from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.runs import assert_same_run, plain_net, run, sgd

from cl_lightning.memory import valid_columns
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.rehearsal.kfpf import KFPF
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "KFPF": Subject(
        small(KFPF, periods=4, steps=3, replay_size=8, logit_weight=0.1),
        first_task_is_finetuning=False,
        reason="the head is trained on the memory in the first task too",
    ),
}

SMALL = partial(KFPF, backbone=plain_net, optimizer=sgd, memory_size=60)


class Notes(KFPF):
    """Notes at which steps a fine-tuning takes place, and what it changes."""

    def __init__(self, **options):
        super().__init__(backbone=plain_net, optimizer=sgd, memory_size=60, **options)
        self.at, self.changed, self.modes = [], set(), set()

    def finetune(self):
        before = {name: value.clone() for name, value in self.network.named_parameters()}
        super().finetune()
        after = dict(self.network.named_parameters())
        self.changed |= {name for name, value in before.items() if not torch.equal(value, after[name])}
        self.modes.add(self.network.training)
        self.at.append(self.trainer.global_step)


@pytest.mark.parametrize("periods", [1, 3, 5])
def test_fine_tunings_have_equal_distances_over_the_stream_and_the_last_is_at_its_end(periods):
    strategy = Notes(periods=periods, steps=2)
    made = run(strategy, max_epochs=2)
    sizes = [len(part) for part in made.stream.train]
    seen, expected, due = 0.0, [], 1
    for size in sizes:
        steps = 2 * -(-size // 64)
        for _ in range(steps):
            seen += size / steps / sum(sizes)
            expected.append(seen >= due / periods - 1e-9)
            due += expected[-1]
    assert strategy.at == [index + 1 for index, now in enumerate(expected) if now]
    assert len(strategy.at) == periods
    assert strategy.at[-1] == made.trainer.global_step
    assert all(name.startswith("head.") for name in strategy.changed)
    assert strategy.changed
    assert strategy.modes == {True}


def test_without_periods_or_without_steps_it_is_finetuning_to_the_bit():
    plain = run(Finetune(backbone=plain_net, optimizer=sgd), max_epochs=1)
    for options in ({"periods": 0}, {"steps": 0}):
        assert_same_run(run(SMALL(**options), max_epochs=1), plain)


def test_the_stream_is_trained_without_replay_and_the_memory_stores_logits_if_they_are_used():
    made = run(SMALL(periods=1, steps=1, logit_weight=0.5), max_epochs=1)
    widths = valid_columns(made.strategy.memory.fields["logits"]).sum(1)
    assert torch.equal(
        widths, torch.tensor([made.stream.tasks[t].num_seen for t in made.strategy.memory.tasks.tolist()])
    )
    assert run(SMALL(periods=1, steps=1), max_epochs=1).strategy.memory.fields == {}
    assert made.strategy.terms.samples == len(made.stream.train[2]) % 64


def test_patterns_of_names_choose_what_is_trained():
    strategy = Notes(periods=2, steps=2, names=["backbone.*.weight"])
    run(strategy, max_epochs=1)
    assert strategy.changed == {"backbone.layers.1.weight"}


def test_it_is_far_above_finetuning():
    made = run(KFPF(backbone=plain_net, optimizer=sgd, memory_size=200, periods=6, steps=60), max_epochs=2)
    none = finetuning({"backbone": plain_net, "optimizer": sgd}, max_epochs=2).measures()["average_accuracy"]
    # Measured: .81 against .23.
    assert made.matrix.measures()["average_accuracy"] > none + 0.2


@pytest.mark.parametrize(
    "options",
    [{"periods": -1}, {"steps": -1}, {"lr": 0}, {"logit_weight": -1}, {"replay_size": 0}, {"memory_size": -1}],
)
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match=r"KFPF|Memory"):
        KFPF(**options)
