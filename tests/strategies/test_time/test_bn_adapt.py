from functools import partial

import pytest
import torch
from support.adaptation import adapt, batches, scores, source_network, stream, tiny_resnet, watching
from torch import nn
from torch.nn import functional as F

from cl_lightning.cli.discovery import methods
from cl_lightning.strategies.test_time.bn_adapt import BNAdapt
from cl_lightning.strategies.test_time.source import Source
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "BNAdapt": Subject(small(BNAdapt, backbone=tiny_resnet)),
}


def test_a_share_of_0_is_the_source_and_of_1_the_batch():
    source, batch = watching(Source), watching(BNAdapt)
    none, all_of_it = (watching(BNAdapt, statistics="mix", alpha=alpha) for alpha in (0.0, 1.0))
    for strategy in (source, batch, none, all_of_it):
        adapt(strategy)
    torch.testing.assert_close(scores(none), scores(source), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores(all_of_it), scores(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("statistics", ["batch", "mix", "moving"])
def test_no_parameter_changes(statistics):
    made = adapt(watching(BNAdapt, statistics=statistics))
    after, before = dict(made.strategy.network.named_parameters()), dict(source_network("source").named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items() if name in after)


def test_moving_statistics_move_and_then_predict():
    strategy = watching(BNAdapt, statistics="moving", momentum=0.3)
    made = adapt(strategy)
    plain, expected = source_network("source"), []
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3
    with torch.no_grad():
        for images, _ in batches(made.datamodule):
            plain.train()(images)
            expected.append(plain.eval()(images).logits)
    torch.testing.assert_close(scores(strategy), torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert (
        not strategy.traits.transductive
    )  # those that are not of the stream are predicted by statistics that are there


def mixed(share):
    """The source network with statistics ``(1 - a) S + a B``, in plain torch."""
    net = source_network("source")

    def forward(norm, x):
        mean = (1 - share) * norm.running_mean + share * x.mean((0, 2, 3))
        var = (1 - share) * norm.running_var + share * x.var((0, 2, 3), unbiased=False)
        return F.batch_norm(x, mean, var, norm.weight, norm.bias, eps=norm.eps)

    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.forward = partial(forward, module)
    return net


def test_a_mix_is_its_formula_in_the_stream_and_in_evaluation():
    class Noting(BNAdapt):
        def predict(self, images):
            found = super().predict(images)
            tested.append((images, found))
            return found

    tested = []
    strategy = watching(Noting, statistics="mix", alpha=0.3)
    made = adapt(strategy)
    plain = mixed(0.3)
    with torch.no_grad():
        expected = [plain(images).logits for images, _ in batches(made.datamodule)]
        torch.testing.assert_close(scores(strategy), torch.cat(expected), rtol=1e-4, atol=1e-4)
        for images, found in tested[-2:]:  # of the evaluation after the last domain
            torch.testing.assert_close(found, plain(images).logits, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(found, source_network("source")(images).logits, rtol=1e-2, atol=1e-2)


def test_small_batches_need_the_statistics_of_the_source():
    options = {"samples": 60, "batch_size": 2, "corruptions": ["gaussian_noise"], "severity": 1}
    errors = [
        adapt(watching(BNAdapt, **chosen), stream(**options)).matrix.measures()["mean_online_error"]
        for chosen in ({}, {"statistics": "mix", "prior": 16.0})
    ]
    assert errors[1] < errors[0]


def test_methods_state_whether_predictions_depend_on_the_test_batch():
    stated = {method.name: method.test_batch for method in methods() if method.family == "test-time"}
    expected = {"BNAdapt": True, "CoTTA": True, "EATA": True, "LAME": True, "Source": False, "Tent": True}
    assert {name: stated[name] for name in expected} == expected
    assert not any(method.test_batch for method in methods() if method.family != "test-time")
