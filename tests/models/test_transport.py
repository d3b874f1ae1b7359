import torch

from cl_lightning.models import transport


def test_the_plan_has_uniform_marginals_and_the_form_of_its_optimum():
    cost = torch.rand(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = transport(cost, 0.1)
    torch.testing.assert_close(plan.sum(1), torch.full((4,), 1 / 4, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(0), torch.full((6,), 1 / 6, dtype=torch.float64))
    potentials = 0.1 * plan.log() + cost  # f_i + g_j
    cross = potentials[1:, 1:] - potentials[:1, 1:] - potentials[1:, :1] + potentials[:1, :1]
    torch.testing.assert_close(cross, torch.zeros_like(cross), rtol=0, atol=1e-12)


def test_of_two_classes_the_plan_is_its_closed_form():
    plan = transport(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 0.5)
    stays = 1 / (1 + torch.exp(torch.tensor(-2.0, dtype=torch.float64))) / 2
    torch.testing.assert_close(plan, torch.stack([stays, 0.5 - stays, 0.5 - stays, stays]).view(2, 2))


def test_iterations_end_when_they_change_nothing_and_not_before():
    cost = torch.rand(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for reg in (0.5, 0.01):  # some ten and some hundred iterations
        plan = transport(cost, reg, iterations=20_000)
        torch.testing.assert_close(plan.sum(1), torch.full((5,), 1 / 5, dtype=torch.float64), rtol=0, atol=1e-12)
        assert torch.equal(plan, transport(cost, reg, iterations=10**9))
    assert (transport(cost, 0.5, iterations=1).sum(1) - 1 / 5).abs().max() > 1e-3
