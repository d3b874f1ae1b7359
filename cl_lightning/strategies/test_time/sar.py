"""SAR, sharpness-aware and reliable entropy minimisation (Niu et al., ICLR 2023, arXiv:2302.12400).

``Tent`` on samples of low entropy, with a sharpness-aware step and a reset before the predictions collapse. With theta
the scales and shifts of the normalisation layers before the last stage, and E_0 = margin ln C, each step is

    S_1 = {i: H_i(theta) < E_0},   g = gradient of mean_{S_1} H_i(theta),   e = rho g / (||g|| + 1e-12)
    S_2 = {i in S_1: H_i(theta + e) < E_0},   L_2 = mean_{S_2} H_i(theta + e)
    theta <- theta - lr * gradient of L_2 at theta + e               by the optimizer
    m <- 0.9 m + 0.1 L_2;   if m < threshold: network, optimizer and m are reset to the source

||g|| is over all trained parameters together. rho -> radius, threshold -> reset_threshold. Without a sample in S_1 or
in S_2 no step is taken. The first forward pass predicts the batch. The parts are ``EntropyFilter``, the optimizer
``SAM`` and ``EntropyReset``; each goes with other methods too. Departs from the authors' code: the second pass is
over the whole batch, so that statistics of batch normalisation are of the batch, not of S_1; the method is meant for
networks with group or layer normalisation, for which there is no difference.
"""

from functools import partial
from typing import Any, Literal

from lightning.pytorch.cli import OptimizerCallable

from cl_lightning.checks import above, at_least
from cl_lightning.optim import SAM
from cl_lightning.strategies.test_time.base import TestTimeAdaptation, Trained, adam
from cl_lightning.strategies.test_time.parts.filters import EntropyFilter, SampleFilter
from cl_lightning.strategies.test_time.parts.restoration import EntropyReset, RestorationRule
from cl_lightning.strategies.test_time.tent import Tent


class SAR(Tent):
    """Sharpness-aware entropy minimisation on samples of low entropy, with resets before a collapse.

    Args:
        margin: Threshold of the entropy as a share of its largest value ln C, above 0.
        radius: rho, at least 0; 0 for plain steps.
        reset_threshold: Least value of the moving mean entropy in nats, above 0; None for no resets. 0.2 in the paper
            for 1,000 classes.
        params: Parameters that are trained, see ``TestTimeAdaptation``.
        filters: Further filters, see ``TestTimeAdaptation``.
        restoration: Further rules, see ``TestTimeAdaptation``.
        optimizer: Optimizer that takes the steps, see ``TestTimeAdaptation``; it is wrapped by ``SAM``.
        kwargs: Options of ``Tent``.
    """

    traits = TestTimeAdaptation.traits.but(
        family="test-time", paper="Niu et al., ICLR 2023, arXiv:2302.12400", transductive=True
    )

    def __init__(
        self,
        *,
        margin: float = 0.4,
        radius: float = 0.05,
        reset_threshold: float | None = 0.2,
        params: Literal["norm", "early_norm", "all"] | list[str] = "early_norm",
        filters: list[SampleFilter] | None = None,
        restoration: list[RestorationRule] | None = None,
        optimizer: OptimizerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        above(self, 0, margin=margin)
        above(self, 0, reset_threshold=reset_threshold, optional=True)
        at_least(self, 0, radius=radius)
        chosen: Trained = params
        base = optimizer or adam
        resets: list[RestorationRule] = [] if reset_threshold is None else [EntropyReset(reset_threshold)]
        super().__init__(
            params=chosen,
            filters=[EntropyFilter(margin), *(filters or ())],
            restoration=[*resets, *(restoration or ())],
            optimizer=partial(SAM, base=base, rho=radius) if radius else base,
            **kwargs,
        )
