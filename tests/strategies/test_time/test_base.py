"""What all test-time adaptation has in common: streams, scores, resets, the source network."""

from functools import partial
from typing import Any

import pytest
import torch
from support.adaptation import OtherLabels, adapt, batches, scores, source_file, source_network, stream, watching
from support.runs import assert_same
from support.runs import loop as digits_loop
from torch import nn

from cl_lightning.batch import Batch
from cl_lightning.losses import entropy
from cl_lightning.measures import mean_online_error, online_error
from cl_lightning.models import MLP, CifarResNet, CosineHead
from cl_lightning.models.backbones import read_classifier
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.test_time.base import TestTimeAdaptation
from cl_lightning.strategies.test_time.bn_adapt import BNAdapt
from cl_lightning.strategies.test_time.cotta import CoTTA
from cl_lightning.strategies.test_time.eata import EATA
from cl_lightning.strategies.test_time.lame import LAME, LaplacianAdjustment
from cl_lightning.strategies.test_time.source import Source
from cl_lightning.strategies.test_time.tent import Tent
from cl_lightning.stream import ClassIncremental, Task

frozen = partial(torch.optim.SGD, lr=0.0)
adam = partial(torch.optim.Adam, lr=0.01)


def test_online_errors_are_counted_before_each_step_and_their_mean_is_over_domains():
    assert online_error(torch.tensor([[4, 3], [10, 0], [0, 0]]))[:2].tolist() == [0.25, 1.0]
    assert mean_online_error(torch.tensor([float("nan"), 0.25, 1.0])) == 0.625
    strategy = watching(Source)
    made = adapt(strategy)
    data, plain = made.datamodule, source_network("source")
    expected, wrong = [], []
    for images, labels in batches(data):
        with torch.no_grad():
            expected.append(plain(images).logits)
        wrong.append((expected[-1].argmax(1) != labels).double())
    torch.testing.assert_close(scores(strategy), torch.cat(expected), rtol=1e-4, atol=1e-5)
    errors = torch.cat(wrong).view(2, 200).mean(1)
    torch.testing.assert_close(made.matrix.online_error[1:], errors)
    assert made.matrix.online_error[0].isnan()
    assert made.matrix.measures()["mean_online_error"] == pytest.approx(float(errors.mean()))
    assert "mean_online_error" not in made.matrix.measures(0)


def test_a_stream_is_that_of_plain_torch_with_one_optimizer_over_all_domains():
    strategy = watching(Tent, optimizer=adam)
    made = adapt(strategy)
    plain = source_network()
    norms = [p for m in plain.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    optimizer, expected = adam(norms), []
    for images, _ in batches(made.datamodule):
        logits = plain(images).logits
        expected.append(logits.detach())
        optimizer.zero_grad()
        entropy(logits).mean().backward()
        optimizer.step()
    torch.testing.assert_close(scores(strategy), torch.cat(expected), rtol=1e-2, atol=1e-2)  # Adam magnifies rounding


def test_other_labels_are_another_score():
    made = [adapt(watching(Tent, optimizer=adam), data) for data in (stream(), stream(OtherLabels()))]
    errors = [one.matrix.measures()["mean_online_error"] for one in made]
    assert errors[1] > errors[0] + 0.2


def test_a_prediction_after_the_step_is_surer():
    plain, after = watching(BNAdapt), watching(Tent, optimizer=adam, reset="batch", predict_when="after")
    adapt(plain)
    adapt(after)
    assert entropy(scores(after)).mean() < entropy(scores(plain)).mean()


def test_evaluation_learns_nothing_and_has_the_statistics_of_its_batches():
    made = adapt(watching(BNAdapt), stream(evaluated="all", batch_size=50))
    strategy, matrix = made.strategy, made.matrix
    assert matrix.totals.tolist() == [200, 200, 200]
    errors = 1 - matrix.R_ci.diagonal()[1:]
    torch.testing.assert_close(errors, matrix.online_error[1:])  # nothing was params: the same batches again
    before = {name: value.clone() for name, value in strategy.network.state_dict().items()}
    made._evaluate(made.stream.tasks[2])
    assert_same(before, strategy.network.state_dict())
    only = adapt(watching(BNAdapt)).matrix
    assert only.totals.tolist() == [200, 0, 0]
    assert only.R_ci[:, 1:].isnan().all()


def test_without_files_the_first_task_trains_the_source():
    strategy = watching(Tent, backbone=partial(CifarResNet, depth=8, width=4), source_head=None, optimizer=adam)
    made = adapt(strategy, stream(source_part="train"), max_epochs=4)
    assert [phase.name for phase in strategy.phases(made.stream.tasks[0])] == ["source"]
    assert float(made.matrix.R_ci[0, 0]) > 0.8
    assert made.matrix.measures()["mean_online_error"] < 0.5


def test_rows_of_the_classifier_go_to_the_columns_of_their_classes(tmp_path):
    weight = torch.arange(12.0).view(4, 3)
    torch.save({"model": {"module.fc.weight": weight, "module.fc.bias": torch.arange(4.0)}}, tmp_path / "w.pt")
    strategy = Source(backbone=partial(MLP, hidden=(3,)), source_head=str(tmp_path / "w.pt"))
    strategy.build((1, 2, 2))
    task = Task(0, "source", (2, 0, 3), (0, 1, 2), (2, 0, 3), 3, 3)
    strategy.mark_columns(task)
    strategy.begin_task(task)
    assert torch.equal(strategy.network.head.weight(), weight[[2, 0, 3]])
    assert strategy.network.head.blocks[0].bias.tolist() == [2.0, 0.0, 3.0]
    with pytest.raises(ValueError, match="source_head has 4 classes, the source domain has a class 4"):
        strategy._load_head(Task(0, "source", (4,), (0,), (4,), 1, 1), str(tmp_path / "w.pt"))
    with pytest.raises(ValueError, match="takes 3 features, the backbone gives 5"):
        Source(backbone=partial(MLP, hidden=(5,)), source_head=str(tmp_path / "w.pt")).build((1, 2, 2))
    torch.save({"conv.weight": weight}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match="has no classifier"):
        read_classifier(str(tmp_path / "none.pt"), 3)


def test_classes_that_the_source_did_not_have_are_never_predicted():
    strategy = Source(backbone=partial(MLP, hidden=(3,)))
    strategy.build((1, 2, 2))
    for index, (classes, seen) in enumerate([((0, 1), 2), ((2,), 3)]):
        task = Task(index, "t", classes, classes, classes, len(classes), seen)
        strategy.mark_columns(task)
        strategy.begin_task(task)
    found = strategy.predict(torch.randn(4, 1, 2, 2))
    assert (found[:, 2] == -torch.inf).all()
    assert found[:, :2].isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reset": "often"}, "reset is 'often'"),
        ({"predict_when": "now"}, "predict_when is 'now'"),
        ({"statistics": "mine"}, "statistics is 'mine'"),
        ({"alpha": 1.5}, r"alpha is 1\.5"),
        ({"prior": -1.0}, r"prior is -1\.0"),
        ({"momentum": 0.0}, r"momentum is 0\.0"),
        ({"params": "some"}, "params is 'some'"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=f"Tent: .*{words}"):
        Tent(**options)


def test_a_network_without_what_is_to_be_trained_is_an_error():
    with pytest.raises(ValueError, match="Tent: params is 'norm', of which MLP has no parameters"):
        Tent(backbone=MLP).build((1, 8, 8))
    with pytest.raises(ValueError, match=r"params is \['nowhere\*'\]"):
        Tent(backbone=MLP, params=["nowhere*"]).build((1, 8, 8))
    with pytest.raises(ValueError, match="source_head goes into a LinearHead, not into a CosineHead"):
        Source(head=CosineHead, source_head=str(source_file())).build((1, 8, 8))


def test_patterns_choose_what_is_trained():
    strategy = watching(Tent, params=["backbone.layer3.*", "head.*"], optimizer=adam)
    made = adapt(strategy)
    after, before = made.strategy.network.state_dict(), source_network("source").state_dict()
    moved = {name for name in after if name in before and not torch.equal(after[name], before[name])}
    assert moved
    assert all(name.startswith("backbone.layer3.") for name in moved)
    assert not torch.equal(after["head.blocks.0.weight"], before["head.weight"])


def made_of(cls: type[TestTimeAdaptation], **options: Any) -> Any:
    chosen = {CoTTA: {"views": 0, "restore": 0.0}, EATA: {"margin": 1.0, "diversity": 2.0}}.get(cls, {})
    return watching(cls, **{"optimizer": partial(torch.optim.Adam, lr=0.01), **chosen, **options})


@pytest.mark.parametrize("cls", [Tent, EATA, CoTTA])
def test_a_domain_after_a_reset_is_as_if_it_were_the_first(cls):
    """The network, the optimizer and whatever a method has beside them begin anew."""
    both, alone = (made_of(cls, reset="domain") for _ in range(2))
    adapt(both)
    adapt(alone, stream(corruptions=["contrast"]))
    kept = made_of(cls)
    adapt(kept)
    assert torch.equal(torch.cat(both.noted[2]), torch.cat(alone.noted[1]))
    assert not torch.equal(torch.cat(kept.noted[2]), torch.cat(alone.noted[1]))
    assert torch.equal(torch.cat(kept.noted[1]), torch.cat(both.noted[1]))


def test_moving_statistics_are_reset_too():
    both, alone = (watching(BNAdapt, statistics="moving", reset="domain") for _ in range(2))
    adapt(both)
    adapt(alone, stream(corruptions=["contrast"]))
    assert torch.equal(torch.cat(both.noted[2]), torch.cat(alone.noted[1]))


@pytest.mark.parametrize("cls", [Tent, EATA, CoTTA])
def test_a_reset_before_each_batch_leaves_normalisation_alone(cls):
    episodic, plain = made_of(cls, reset="batch"), watching(BNAdapt)
    made = adapt(episodic)
    adapt(plain)
    assert torch.equal(scores(episodic), scores(plain))  # predicted before the one step
    source, state = source_network("source").state_dict(), made.strategy.network.state_dict()
    shared = [name for name in source if name in state]
    assert_same({name: state[name] for name in shared}, {name: source[name] for name in shared})


@pytest.mark.parametrize("cls", [Tent, EATA, CoTTA, LAME])
def test_labels_of_the_stream_change_nothing_but_the_score(cls):
    given, shuffled = (made_of(cls) if cls is not LAME else watching(LAME) for _ in range(2))
    adapt(given)
    adapt(shuffled, stream(OtherLabels()))
    assert torch.equal(scores(given), scores(shuffled))
    assert not torch.equal(given.online.counts, shuffled.online.counts)


def test_only_what_the_stream_can_change_is_kept_for_a_reset():
    made = adapt(watching(Tent, reset="domain")).strategy
    assert made.bytes_kept()["source"] < 0.1 * sum(p.nbytes for p in made.network.parameters())
    assert set(made.start.tensors) == set(made.trained_parameters())
    assert made.bytes_kept()["teachers"] == 0


def test_an_output_head_goes_with_any_method():
    plain, adjusted = made_of(Tent), made_of(Tent, output=LaplacianAdjustment("rbf", 3))
    adapt(plain)
    adapt(adjusted)
    assert adjusted.traits.transductive
    assert torch.equal(
        adjusted.network.state_dict()["backbone.bn1.weight"], plain.network.state_dict()["backbone.bn1.weight"]
    )
    first, other = plain.noted[1][0], adjusted.noted[1][0]
    assert not torch.allclose(first.softmax(1), other.softmax(1), atol=1e-2)
    both = [watching(LAME, affinity="rbf"), watching(Source)]
    both[1].parts.output = LaplacianAdjustment("rbf")
    for strategy in both:
        adapt(strategy)
    assert torch.equal(*(scores(strategy) for strategy in both))


def test_batches_of_the_stream_are_not_augmented_and_those_of_the_source_are():
    seen: dict[str, set[bool]] = {}
    data = stream()
    finish = data.finish
    strategy = watching(Tent, source_head=None)

    def noting(batch: Batch, *, augment: bool, epoch: int | None = None) -> Batch:
        if strategy.trainer.training:
            seen.setdefault(strategy.phase.name, set()).add(augment)
        return finish(batch, augment=augment, epoch=epoch)

    data.finish = noting  # type: ignore[method-assign]
    adapt(strategy, data)
    assert seen == {"source": {True}, "adapt": {False}}


def test_a_run_of_this_package_with_another_order_of_classes_is_adapted(tmp_path):
    """Rows of a head stand in the order in which classes arrived; the source network has them by raw label."""

    def trained(tasks: int, name: str, **options: Any) -> tuple[str, Any]:
        scenario = ClassIncremental(tasks=tasks, class_order=[3, 9, 4, 0, 5, 1, 2, 6, 8, 7])
        strategy = Finetune(backbone=partial(CifarResNet, depth=8, width=4))
        run = digits_loop(strategy, folder=tmp_path / name, data={"scenario": scenario}, options=options)
        run.fit()
        return str(tmp_path / name / "checkpoints" / "last.ckpt"), run

    path, run = trained(1, "whole")
    options = {"backbone": partial(CifarResNet, depth=8, width=4, weights=path), "source_head": path}
    adapted = adapt(watching(Source, **options), stream(corruptions=["brightness"]))
    assert float(run.matrix.R_ci[0, 0]) > 0.4
    assert float(adapted.matrix.R_ci[0, 0]) == pytest.approx(float(run.matrix.R_ci[0, 0]), abs=0.1)
    path, _ = trained(2, "half", stop_after_task=0)
    with pytest.raises(ValueError, match=r"source_head .* is of a run that has not learnt class 1 of"):
        adapt(watching(Source, source_head=path))
