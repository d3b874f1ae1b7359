import itertools
from functools import partial

import pytest
import torch
from support.pretrained import in_tasks
from support.runs import run

from cl_lightning.measures import last_accuracy
from cl_lightning.models import MLP, least_change, shortfall
from cl_lightning.strategies.exemplar_free.sequential_max_margin import SequentialMaxMargin
from cl_lightning.stream import RotatedDomains, Subset
from cl_lightning.testing import Subject, small

PIXELS = partial(MLP, hidden=())
WHY = "the head has a closed form, nothing is trained"
SUBJECTS = {
    "SequentialMaxMargin": Subject(
        small(SequentialMaxMargin, backbone=PIXELS), first_task_is_finetuning=False, reason=WHY
    ),
    "SequentialMaxMargin(regularisation)": Subject(
        small(SequentialMaxMargin, backbone=PIXELS, regularisation=1.0, against="task"),
        first_task_is_finetuning=False,
        reason=WHY,
    ),
}


class Look(SequentialMaxMargin):
    """Compares each task's weights with the projection of the weights before."""

    def end_task(self, task):
        head = self.network.head
        before = head.weight()
        super().end_task(task)
        features, labels = self.passes.features()
        torch.testing.assert_close(head.weight(), least_change(before, features, labels), rtol=0, atol=1e-7)
        assert float(shortfall(head.weight(), features.double(), labels).max()) < 1e-9
        self.tasks_seen = getattr(self, "tasks_seen", 0) + 1


def test_each_task_is_the_projection_of_the_weights_before():
    made = in_tasks(partial(Look, backbone=PIXELS), 5)
    assert made.strategy.tasks_seen == 5


def test_margins_within_a_task_keep_the_rows_of_other_classes():
    rows = []

    class Kept(SequentialMaxMargin):
        def end_task(self, task):
            super().end_task(task)
            rows.append(self.network.head.weight())

    seen = in_tasks(partial(SequentialMaxMargin, backbone=PIXELS), 5).matrix
    within = in_tasks(partial(Kept, backbone=PIXELS, against="task"), 5).matrix
    for earlier, later in itertools.pairwise(rows):
        assert torch.equal(later[: len(earlier)], earlier)
    # Measured: .24 and .57; a task is learnt without error, and nothing but its set is considered.
    assert last_accuracy(within.R_ci) > last_accuracy(seen.R_ci) + 0.15
    assert float(seen.R_ci.diag().min()) > 0.9


def test_the_same_classes_rotated_are_learnt_and_the_first_domain_is_partly_forgotten():
    scenario = Subset(RotatedDomains(degrees=[0.0, 20.0, 40.0]), per_class=15)
    matrix = run(SequentialMaxMargin(backbone=PIXELS), data={"scenario": scenario}, max_epochs=1).matrix.R_ci
    # Measured: .9 of each domain when it is learnt; of the first one at the end .47.
    assert float(matrix.diag().min()) > 0.8
    assert 0.3 < float(matrix[2, 0]) < float(matrix[0, 0]) - 0.1


def test_a_task_that_no_plane_separates_is_refused():
    with pytest.raises(ValueError, match=r"not separable.*more features, or regularisation above 0"):
        in_tasks(partial(SequentialMaxMargin, backbone=partial(MLP, hidden=(2,))), 2)


@pytest.mark.parametrize("options", [{"regularisation": -1.0}, {"against": "all"}])
def test_options_out_of_range_are_errors(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} is '?{value}"):
        SequentialMaxMargin(**options)
