from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.runs import NormNet, assert_resumes, assert_same, assert_same_run, loop, plain_net, run, sgd

from cl_lightning.callback import ContinualCallback
from cl_lightning.callbacks.continual_evaluation import ContinualEvaluation
from cl_lightning.callbacks.ema_ensemble import EMAEnsemble
from cl_lightning.measures import last_accuracy
from cl_lightning.memory import PrototypeHead
from cl_lightning.models import MLP, LinearHead, Network
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.lwf import LwF
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.stream import ClassIncremental, Online

PUBLISHED = {
    "er_ema_cifar100": {
        "source": "AlbinSou/online_ema: src/config/cifar100/er.yml, src/online_factories.py (lmb2, step_rampup)",
        "memory_size": 2000,
        "replay_size": 32,
        "optimizer": "SGD(lr=0.1)",
        "data.scenario": "Online(base=ClassIncremental(tasks=20), batch_size=32, passes=3)",
        "data.batch_size": 32,
        "data.drop_last": True,
        "data.val_fraction": 0.05,
        "trainer.callbacks": [
            "EMAEnsemble(momentum=0.99, warmup_momentum=0.9)",
            "ContinualEvaluation(every_n_steps=1, samples=None, split=val)",
        ],
    },
}


def finetune(**options):
    return Finetune(**{"backbone": NormNet, "optimizer": sgd, **options})


def state(strategy):
    return {name: value.detach().clone() for name, value in strategy.network.state_dict().items()}


class Look(ContinualCallback):
    """Keeps the network after each optimizer step, at the end of each task, and while it is evaluated."""

    def __init__(self):
        self.steps, self.closed, self.tested, self.validated = [], [], [], []
        self.start = None

    def on_train_start(self, trainer, strategy):
        self.steps.append([state(strategy)])
        self.count = trainer.global_step

    def on_train_batch_end(self, trainer, strategy, outputs, batch, batch_idx):
        if trainer.global_step > self.count:
            self.count = trainer.global_step
            self.steps[-1].append(state(strategy))

    def on_task_end(self, trainer, strategy, task):
        self.closed.append(state(strategy))

    def on_test_epoch_start(self, trainer, strategy):
        self.tested.append(state(strategy))

    def on_validation_epoch_start(self, trainer, strategy):
        self.validated.append(state(strategy))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("warmup_steps", [None, 0, 11])
def test_the_average_is_the_sum_of_its_definition(warmup_steps, accumulate):
    ema, look = EMAEnsemble(momentum=0.95, warmup_momentum=0.7, warmup_steps=warmup_steps), Look()
    run(finetune(), ema, look, accumulate_grad_batches=accumulate)
    average, updates = {}, 0
    for task, (first, *after) in enumerate(look.steps):
        average |= {name: value.double() for name, value in first.items() if name not in average}
        for theta in after:
            warm = task == 0 if warmup_steps is None else updates < warmup_steps
            m = 0.7 if warm else 0.95
            average = {name: m * value + (1 - m) * theta[name].double() for name, value in average.items()}
            updates += 1
    assert ema.updates == updates
    counters = {name for name in average if name.endswith("num_batches_tracked")}
    assert counters
    assert ema.average.keys() == average.keys() - counters
    for name, value in ema.average.items():
        torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(value, look.tested[-1][name], rtol=0, atol=0)


def in_double():
    """What an average is taken of, apart from a run."""
    head = LinearHead(16)
    head.grow(3)
    return SimpleNamespace(network=Network(NormNet((1, 8, 8)), head).double(), task=None)


def take_a_step(ema, strategy):
    ema.on_train_batch_end(SimpleNamespace(global_step=ema.updates + 1), strategy, None, None, 0)


@pytest.mark.parametrize("momentum", [0.3, 0.95, 0.999])
def test_weights_that_do_not_move_leave_the_average_as_it_is_to_the_bit(momentum):
    ema, strategy = EMAEnsemble(momentum=momentum, warmup_steps=0), in_double()
    ema.on_fit_start(None, strategy)
    for _ in range(30):
        take_a_step(ema, strategy)
    live = strategy.network.state_dict()
    assert ema.updates == 30
    assert_same(ema.average, {name: value for name, value in live.items() if value.is_floating_point()})


@pytest.mark.parametrize("momentum", [0.3, 0.95])
def test_the_average_of_n_steps_is_its_closed_form(momentum):
    ema, strategy = EMAEnsemble(momentum=momentum, warmup_steps=0), in_double()
    ema.on_fit_start(None, strategy)
    live, generator, n = strategy.network.state_dict(), torch.Generator().manual_seed(0), 25
    thetas = [{name: value.clone() for name, value in ema.average.items()}]
    for _ in range(n):
        for name in ema.average:
            live[name].copy_(torch.rand(live[name].shape, generator=generator, dtype=torch.float64))
        thetas.append({name: live[name].clone() for name in ema.average})
        take_a_step(ema, strategy)
    m = momentum
    for name, value in ema.average.items():
        expected = m**n * thetas[0][name] + (1 - m) * sum(m ** (n - k) * thetas[k][name] for k in range(1, n + 1))
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-15)


def test_momentum_0_is_the_live_network():
    ema = EMAEnsemble(momentum=0.0)
    made = run(finetune(), ema)
    assert_same_run(made, run(finetune()))
    live = made.strategy.network.state_dict()
    assert all(torch.equal(live[name], value) for name, value in ema.average.items())


def test_training_does_not_notice_and_the_end_of_a_task_sees_live_weights():
    ours, plain = Look(), Look()
    with_average = run(LwF(backbone=NormNet, optimizer=sgd), EMAEnsemble(), ours, data={"val_fraction": 0.2})
    without = run(LwF(backbone=NormNet, optimizer=sgd), plain, data={"val_fraction": 0.2})
    assert_same(with_average.strategy.state_dict(), without.strategy.state_dict())
    for mine, other in zip(ours.closed, plain.closed, strict=True):
        assert_same(mine, other)
    assert not torch.equal(with_average.matrix.R_ci[2], without.matrix.R_ci[2])


def test_validation_in_the_middle_of_a_fit_changes_nothing():
    options = {"data": {"val_fraction": 0.2}, "val_check_interval": 2}
    look, ema, quiet = Look(), EMAEnsemble(), EMAEnsemble()
    made = run(finetune(), ema, look, **options)
    other = run(finetune(), quiet, limit_val_batches=0, **options)
    assert len(look.validated) > 6
    assert_same_run(made, other)
    assert_same(ema.state_dict(), quiet.state_dict())
    assert not torch.equal(
        look.validated[-1]["backbone.layers.1.weight"], look.steps[-1][-1]["backbone.layers.1.weight"]
    )


def test_it_resumes_to_the_bit_in_the_middle_of_a_task(tmp_path):
    assert_resumes(lambda: (finetune(), [EMAEnsemble()]), tmp_path / "one", accumulate_grad_batches=2)
    assert_resumes(lambda: (finetune(), [EMAEnsemble(restart=True)]), tmp_path / "two", data={"val_fraction": 0.2})


def test_a_checkpoint_holds_the_live_weights_and_is_tested_with_the_average(tmp_path):
    made = run(finetune(), EMAEnsemble(), folder=tmp_path)
    last = tmp_path / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)["state_dict"]
    live = made.strategy.state_dict()
    assert all(torch.equal(saved[name], live[name]) for name in live)
    again = loop(finetune(), EMAEnsemble(), folder=tmp_path)
    assert torch.equal(again.test(last).R_ci[2], made.matrix.R_ci[2])
    plain = loop(finetune(), folder=tmp_path)
    assert not torch.equal(plain.test(last).R_ci[2], made.matrix.R_ci[2])


def test_new_rows_enter_with_their_first_value():
    class First(EMAEnsemble):
        def on_train_start(self, trainer, strategy):
            super().on_train_start(trainer, strategy)
            for name, value in strategy.network.head.blocks[-1].named_parameters():
                entered = self.average[f"head.blocks.{strategy.task.index}.{name}"]
                assert torch.equal(entered, value)
                assert entered.data_ptr() != value.data_ptr()

    ema = First()
    run(finetune(), ema, max_epochs=1)
    assert "head.blocks.2.weight" in ema.average


def test_a_restarted_average_forgets_earlier_tasks():
    ema, look = EMAEnsemble(momentum=0.9, restart=True), Look()
    run(finetune(), ema, look)
    first, *after = look.steps[-1]
    average = first["backbone.layers.1.weight"].double()
    for theta in after:
        average = 0.9 * average + 0.1 * theta["backbone.layers.1.weight"].double()
    torch.testing.assert_close(ema.average["backbone.layers.1.weight"].double(), average, rtol=1e-5, atol=1e-6)
    assert ema.updates == len(after)


def test_frozen_weights_and_statistics_of_the_head_are_the_live_ones():
    ema, look = EMAEnsemble(), Look()
    run(finetune(head=PrototypeHead, freeze_backbone=True), ema, look)
    assert not any(name.startswith("backbone.") and name.endswith(("weight", "bias")) for name in ema.average)
    assert "head.prototypes.means" not in ema.average
    assert torch.equal(look.tested[-1]["head.prototypes.means"], look.closed[-1]["head.prototypes.means"])


def test_weights_that_a_strategy_rewrites_at_the_end_of_a_task_enter_as_they_are():
    class Aligned(Finetune):
        """Scales the newest rows, as weight alignment does."""

        def end_task(self, task):
            super().end_task(task)
            self.network.head.blocks[-1].weight *= 0.5

    ema, look = EMAEnsemble(), Look()
    run(Aligned(backbone=plain_net, optimizer=sgd), ema, look, max_epochs=1)
    live, tested = look.closed[-1], look.tested[-1]
    changed = {name for name in tested if not torch.equal(tested[name], live[name])}
    assert "head.blocks.2.weight" not in changed
    assert {"head.blocks.2.bias", "head.blocks.0.weight", "backbone.layers.1.weight"} <= changed


def test_it_closes_the_stability_gap_of_replay_on_a_stream_that_is_seen_once():
    data = {"scenario": Online(ClassIncremental(tasks=5), batch_size=10)}
    lowest, last = [], []
    for averages in ([], [EMAEnsemble(momentum=0.95)]):
        watch = ContinualEvaluation(every_n_steps=1)
        er = ER(backbone=partial(MLP, hidden=(64,)), optimizer=partial(torch.optim.SGD, lr=0.1), memory_size=200)
        made = run(er, watch, *averages, data=data)
        lowest.append(watch.measures(4)["min_accuracy"])
        last.append(last_accuracy(made.matrix.R_ci))
    assert lowest[1] > lowest[0] + 0.2
    assert last[1] > last[0] - 0.05


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("stage", ["validation", "test"])
def test_an_exception_during_evaluation_leaves_the_live_weights(stage):
    class Fail(Look):
        def on_validation_epoch_end(self, trainer, strategy):
            if stage == "validation" and len(self.validated) == 2:
                raise BrokenError

        def on_test_epoch_end(self, trainer, strategy):
            raise BrokenError

    fail = Fail()
    made = loop(finetune(), EMAEnsemble(), fail, data={"val_fraction": 0.2})
    with pytest.raises(BrokenError):
        made.fit()
    assert_same(state(made.strategy), fail.steps[-1][-1])


def test_weights_in_half_precision_are_averaged_in_single():
    ema = EMAEnsemble(momentum=0.999, warmup_steps=0)
    network = Network(plain_net((1, 8, 8)), LinearHead(16)).to(torch.bfloat16)
    strategy = SimpleNamespace(network=network, task=None)
    ema.on_fit_start(None, strategy)
    with torch.no_grad():
        network.backbone.layers[1].weight.fill_(1.0)
    start = ema.average["backbone.layers.1.weight"].clone()
    ema.on_train_batch_end(SimpleNamespace(global_step=1), strategy, None, None, 0)
    torch.testing.assert_close(ema.average["backbone.layers.1.weight"], start + 0.001 * (1 - start))


@pytest.mark.parametrize(
    "options", [{"momentum": 1.0}, {"momentum": -0.1}, {"warmup_momentum": 1.0}, {"warmup_steps": -1}], ids=str
)
def test_options_out_of_range_are_errors(options):
    (name, _), *_ = options.items()
    with pytest.raises(ValueError, match=f"^EMAEnsemble: {name} is "):
        EMAEnsemble(**options)
