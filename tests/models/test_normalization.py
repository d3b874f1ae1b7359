from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.fakes import batch_of, normal
from torch import Tensor, nn

from cl_lightning.distributed import sum_over_processes
from cl_lightning.models import AdaptiveBatchNorm, adapt_norms, norm_parameters, refit_norms, set_statistics


def layer(maps: int = 2) -> nn.Module:
    made = (nn.BatchNorm1d if maps == 0 else nn.BatchNorm2d)(3).double()
    with torch.no_grad():
        made.weight.copy_(normal(3, seed=1))
        made.bias.copy_(normal(3, seed=2))
        made.running_mean.copy_(normal(3, seed=3))
        made.running_var.copy_(normal(3, seed=4).square() + 0.5)
    return made


def by_hand(x: Tensor, norm: nn.Module, mean: Tensor, var: Tensor) -> Tensor:
    shape = (1, 3, *(1,) * (x.dim() - 2))
    weight = norm.weight / (var + norm.eps).sqrt()
    return (x - mean.view(shape)) * weight.view(shape) + norm.bias.view(shape)


@pytest.mark.parametrize("maps", [0, 2])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_mix_is_its_formula(maps: int, share: float):
    norm, x = layer(maps), normal(5, 3, *(4, 4)[:maps], seed=5)
    axes = (0, *range(2, x.dim()))
    mean = (1 - share) * norm.running_mean + share * x.mean(axes)
    var = (1 - share) * norm.running_var + share * x.var(axes, unbiased=False)
    made = AdaptiveBatchNorm.of(norm).eval()
    set_statistics(made, "mix", share=share)
    torch.testing.assert_close(made(x), by_hand(x, norm, mean, var))
    if share == 0.0:
        torch.testing.assert_close(made(x), norm.eval()(x))
    set_statistics(made, "mix", prior=7.0)
    share = 5 / 12
    mean = (1 - share) * norm.running_mean + share * x.mean(axes)
    var = (1 - share) * norm.running_var + share * x.var(axes, unbiased=False)
    torch.testing.assert_close(made(x), by_hand(x, norm, mean, var))


def test_statistics_of_the_batch_match_train_mode_and_update_nothing():
    norm, x = layer(), normal(5, 3, 4, 4, seed=5)
    made = AdaptiveBatchNorm.of(layer()).eval()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    set_statistics(made, "batch")
    assert torch.equal(made(x), norm.train()(x))
    assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())
    shift = torch.tensor([10.0, -3.0, 0.5]).view(1, 3, 1, 1)
    torch.testing.assert_close(made(x + shift), made(x))
    set_statistics(made, "collect", rate=0.1)
    made(x)
    torch.testing.assert_close(made.running_mean, 0.9 * before["running_mean"] + 0.1 * x.mean((0, 2, 3)))


@pytest.mark.parametrize("maps", [0, 2])
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_robust_statistics_are_updated_and_then_normalise_with_a_gradient_through_the_batch(maps: int, rate: float):
    norm, x = layer(maps), normal(5, 3, *(4, 4)[:maps], seed=5).requires_grad_()
    twin, axes = x.detach().clone().requires_grad_(), (0, *range(2, x.dim()))
    made = AdaptiveBatchNorm.of(layer(maps)).eval()
    set_statistics(made, "robust", rate=rate)
    mean, var = norm.running_mean, norm.running_var
    for seed in (6, 7):  # the second pass starts from the statistics of the first
        weights = normal(*x.shape, seed=seed)
        mean = (1 - rate) * mean.detach() + rate * twin.mean(axes)
        var = (1 - rate) * var.detach() + rate * twin.var(axes, unbiased=False)
        found, expected = made(x), by_hand(twin, norm, mean, var)
        torch.testing.assert_close(found, expected)
        for mine, wanted in ((made.running_mean, mean), (made.running_var, var)):
            torch.testing.assert_close(mine, wanted.detach())
            assert not mine.requires_grad
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(x.grad, twin.grad)
        torch.testing.assert_close(made.weight.grad, norm.weight.grad)
    assert int(made.num_batches_tracked) == 0
    statistics = [made.running_mean.clone(), made.running_var.clone()]
    set_statistics(made, "running")
    torch.testing.assert_close(made(x), by_hand(x, norm, *statistics))
    assert torch.equal(made.running_mean, statistics[0])


def test_in_train_mode_it_is_what_it_was_to_the_bit():
    norm, made, x = layer().train(), AdaptiveBatchNorm.of(layer()).train(), normal(5, 3, 4, 4, seed=5)
    assert torch.equal(norm(x), made(x))
    for name, value in norm.state_dict().items():
        assert torch.equal(value, made.state_dict()[name])


@pytest.mark.parametrize("statistics", ["train", "batch", "mix", "collect", "robust"])
def test_sums_over_processes_are_the_same_as_the_plain_layer(monkeypatch, statistics):
    x, made = normal(5, 3, 4, 4, seed=5), [AdaptiveBatchNorm.of(layer()) for _ in range(2)]
    for one in made:
        one.train(statistics == "train")
        set_statistics(one, "batch" if statistics == "train" else statistics, share=0.4, rate=0.3)
    plain = made[0](x)
    monkeypatch.setattr("cl_lightning.models.normalization.is_distributed", lambda: True)
    torch.testing.assert_close(made[1](x), plain)
    for name, value in made[0].state_dict().items():
        torch.testing.assert_close(made[1].state_dict()[name], value)


def test_a_single_value_takes_the_statistics_of_the_source():
    norm, x = layer(0), normal(1, 3)
    made = AdaptiveBatchNorm.of(norm).eval()
    for statistics in ("batch", "mix", "robust"):
        set_statistics(made, statistics, share=0.5, rate=0.5)
        torch.testing.assert_close(made(x), norm.eval()(x))
    torch.testing.assert_close(made.running_var, layer(0).running_var)


def test_all_layers_are_exchanged_under_their_names_and_keep_what_timm_puts_in_them():
    class WithAct(nn.BatchNorm2d):
        def __init__(self) -> None:
            super().__init__(3)
            self.drop, self.act = nn.Identity(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.drop(super().forward(x)))

    net = nn.Sequential(nn.Conv2d(3, 3, 1), WithAct(), nn.GroupNorm(1, 3), nn.Sequential(nn.BatchNorm2d(3))).eval()
    x, names = torch.randn(4, 3, 5, 5), list(net.state_dict())
    before = net(x)
    assert len(adapt_norms(net)) == 2
    assert list(net.state_dict()) == names
    assert torch.equal(net(x), before)
    assert adapt_norms(net) == []
    found = norm_parameters(net)
    assert list(found) == ["1.weight", "1.bias", "2.weight", "2.bias", "3.0.weight", "3.0.bias"]
    assert found["1.weight"] is net[1].weight


def test_statistics_are_computed_again_as_means_over_batches_of_what_layers_see_in_training():
    net = nn.Sequential(layer(), nn.Dropout(), nn.Conv2d(3, 3, 1).double(), layer()).train()
    batches = [normal(n, 3, 4, 4, seed=n) for n in (5, 3, 1)]
    sums = []
    for x in batches[:2]:
        var = x.var((0, 2, 3), unbiased=False)
        hidden = net[2](by_hand(x, net[0], x.mean((0, 2, 3)), var))
        sums.append([len(x) * v for y in (x, hidden) for v in (y.mean((0, 2, 3)), y.var((0, 2, 3)))])
    expected = [(first + second) / 8 for first, second in zip(*sums, strict=True)]
    norms, before = [net[0], net[3]], {name: value.clone() for name, value in net.named_parameters()}
    refit_norms(net, [batch_of(torch.zeros(len(x), dtype=torch.int64), images=x) for x in batches])
    assert [net[0], net[3]] == norms
    assert all(module.training for module in net.modules())
    found = [value for norm in norms for value in (norm.running_mean, norm.running_var)]
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted)
    assert all(torch.equal(value, before[name]) for name, value in net.named_parameters())


def test_statistics_of_frozen_layers_are_kept_and_without_layers_nothing_is_read():
    net, plain = nn.Sequential(layer(), layer()), layer()
    refit_norms(net, iter([batch_of(torch.zeros(5, dtype=torch.int64), images=normal(5, 3, 4, 4))]), [net[0]])
    assert torch.equal(net[0].running_mean, plain.running_mean)
    assert not torch.equal(net[1].running_mean, plain.running_mean)
    for nothing, frozen in ((nn.Linear(2, 2), []), (net, [net])):
        unread = iter([None])
        refit_norms(nothing, unread, frozen)
        assert list(unread) == [None]


def _in_two(rank: int, folder: str, statistics: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    made = AdaptiveBatchNorm.of(layer().float())
    made.train(statistics == "train")
    set_statistics(made, "batch" if statistics == "train" else statistics, share=0.4)
    x = normal(7, 3, 4, 4, seed=5).float()
    mine = (x[:5] if rank == 0 else x[5:]).clone().requires_grad_()
    weights = normal(7, 3, 4, 4, seed=6).float()
    out = made(mine)
    (out * (weights[:5] if rank == 0 else weights[5:])).sum().backward()
    parts = (out.detach(), mine.grad, made.weight.grad, made.running_mean, made.running_var)
    torch.save([part.detach() for part in parts], f"{folder}/{rank}.pt")
    total = sum_over_processes(torch.tensor([rank + 1.0], requires_grad=True))
    assert total.item() == 3.0
    dist.destroy_process_group()


@pytest.mark.parametrize("statistics", ["train", "batch", "mix", "robust"])
def test_two_processes_give_what_one_gives_with_gradient(tmp_path: Path, statistics: str):
    mp.spawn(_in_two, (str(tmp_path), statistics), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    made = AdaptiveBatchNorm.of(layer().float())
    made.train(statistics == "train")
    set_statistics(made, "batch" if statistics == "train" else statistics, share=0.4)
    x = normal(7, 3, 4, 4, seed=5).float().requires_grad_()
    out = made(x)
    (out * normal(7, 3, 4, 4, seed=6).float()).sum().backward()
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(torch.cat([first[0], second[0]]), out.detach(), **close)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), x.grad, **close)
    torch.testing.assert_close(first[2] + second[2], made.weight.grad, **close)
    for one, other, whole in zip(first[3:], second[3:], (made.running_mean, made.running_var), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, whole, **close)
