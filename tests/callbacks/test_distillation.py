import pytest
import torch
from support.runs import NormNet, assert_resumes, assert_same, assert_same_run, loop, plain_net, run, sgd

from cl_lightning.callbacks.distillation import Distillation
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.lwf import LwF
from cl_lightning.strategies.rehearsal.er import ER


def finetune(**options):
    return Finetune(**{"backbone": NormNet, "optimizer": sgd, "loss_classes": "current", **options})


@pytest.mark.parametrize("scaled", [False, True])
def test_finetune_with_distillation_is_lwf_to_the_bit(scaled):
    options = {"temperature": 3.0, "scale_by_temperature": scaled}
    callback = Distillation(weight=2.0, **options)
    lwf = run(LwF(backbone=NormNet, optimizer=sgd, distill_weight=2.0, **options))
    ours = run(finetune(), callback)
    assert_same_run(ours, lwf)
    assert_same(callback.teacher.state_dict(), lwf.strategy.teacher.state_dict())
    assert callback.bytes_kept() == {"teachers": lwf.strategy.bytes_kept()["teachers"]}


def test_a_resumed_run_is_that_of_lwf_too(tmp_path):
    assert_resumes(lambda: (finetune(), [Distillation()]), tmp_path / "ours")
    resumed = torch.load(tmp_path / "ours" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    lwf = run(LwF(backbone=NormNet, optimizer=sgd)).strategy.network.state_dict()
    assert all(torch.equal(resumed[f"network.{name}"], value) for name, value in lwf.items())


@pytest.mark.parametrize(("space", "form"), [("features", "softmax"), ("logits", "sigmoid")])
def test_other_forms_resume_to_the_bit(space, form, tmp_path):
    assert_resumes(lambda: (finetune(), [Distillation(space=space, form=form)]), tmp_path)


def test_two_spaces_go_together_and_resume(tmp_path):
    assert_resumes(lambda: (finetune(), [Distillation(), Distillation(space="features")]), tmp_path)


@pytest.mark.parametrize("space", ["logits", "features"])
def test_weight_0_is_finetuning_to_the_bit(space):
    assert_same_run(run(finetune(), Distillation(space=space, weight=0.0)), run(finetune()))


class Watch(Distillation):
    """Keeps what it added in each step, and the gradient of the first step of a task."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def losses(self, strategy, batch, output):
        terms = super().losses(strategy, batch, output)
        self.seen.append((strategy.task.index, {name: float(term.detach()) for name, term in terms.items()}))
        return terms


@pytest.mark.parametrize(
    ("options", "name"),
    [({}, "distill"), ({"form": "sigmoid"}, "distill"), ({"space": "features"}, "distill_features")],
)
def test_nothing_is_added_during_the_first_task(options, name):
    callback = Watch(**options)
    run(finetune(), callback, max_epochs=1)
    assert all((set(terms) == {name}) == (task > 0) for task, terms in callback.seen)
    assert {task for task, _ in callback.seen} == {0, 1, 2}


def test_features_start_each_task_where_the_teacher_has_them():
    callback = Watch(space="features")
    run(finetune(backbone=plain_net), callback, max_epochs=1)
    first = next(terms for task, terms in callback.seen if task == 1)
    assert first["distill_features"] == 0.0


def test_distilled_features_hold_the_backbone_back():
    def drift(*callbacks):
        before = {}

        class Remember(Distillation):
            def on_task_start(self, trainer, strategy, task):
                before[task.index] = [p.detach().clone() for p in strategy.network.backbone.parameters()]

        made = run(
            finetune(backbone=plain_net, optimizer=lambda p: torch.optim.SGD(p, lr=0.005)),
            Remember(weight=0),
            *callbacks,
        )
        after = made.strategy.network.backbone.parameters()
        return sum(float((p - q).detach().square().sum()) for p, q in zip(after, before[2], strict=True))

    class Other(Distillation):
        @property
        def state_key(self):
            return "other"

    assert drift(Other(space="features", weight=2.0)) < 0.5 * drift()


def test_only_logits_make_the_strategy_train_old_rows():
    def kept(callback):
        made = run(finetune(), callback)
        return made.strategy.network.head.blocks[0].weight.requires_grad

    assert kept(Distillation())
    assert not kept(Distillation(space="features"))


def test_the_teacher_takes_no_gradient_and_stays_in_eval_mode():
    class Check(Distillation):
        checked = 0

        def losses(self, strategy, batch, output):
            if self.teacher:
                assert not any(module.training for module in self.teacher.modules())
                assert not any(parameter.requires_grad for parameter in self.teacher.parameters())
                self.checked += 1
            return super().losses(strategy, batch, output)

    callback = Check()
    run(finetune(), callback, max_epochs=1)
    assert callback.checked > 0


def test_a_teacher_from_a_checkpoint_takes_no_gradient_either(tmp_path):
    callback, again = Distillation(), Distillation()
    run(finetune(), callback, folder=tmp_path, options={"stop_after_task": 1})
    loop(finetune(), again, folder=tmp_path).test(tmp_path / "checkpoints" / "last.ckpt")
    assert again.bytes_kept() == callback.bytes_kept()
    assert again.teacher.num_columns == 7
    assert not any(parameter.requires_grad for parameter in again.teacher.parameters())
    assert not any(module.training for module in again.teacher.modules())
    assert_same(again.state_dict(), callback.state_dict())


def test_with_replay_the_exemplars_are_taught_too():
    callback = Watch()
    run(ER(backbone=plain_net, memory_size=50), callback, max_epochs=1)
    assert all(terms["distill"] > 0 for task, terms in callback.seen if task > 0)


def test_a_strategy_that_distils_logits_already_says_so():
    with pytest.raises(ValueError, match="'distill' exists already"):
        run(LwF(backbone=plain_net), Distillation(), max_epochs=1)


@pytest.mark.parametrize(
    "options", [{"space": "pixels"}, {"form": "hinge"}, {"weight": -1.0}, {"temperature": 0.0}], ids=str
)
def test_options_out_of_range_are_errors(options):
    (name, _), *_ = options.items()
    with pytest.raises(ValueError, match=f"^Distillation: {name} is "):
        Distillation(**options)
