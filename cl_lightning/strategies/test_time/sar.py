"""SAR, sharpness-aware and reliable entropy minimisation (Niu et al., ICLR 2023, arXiv:2302.12400).

``Tent`` on samples of low entropy, with a sharpness-aware step and a reset before the predictions collapse. With theta
the scales and shifts of the normalisation layers before the last stage, and E_0 = margin ln C, each step is

    S_1 = {i: H_i(theta) < E_0},   g = gradient of mean_{S_1} H_i(theta),   e = rho g / (||g|| + 1e-12)
    S_2 = {i in S_1: H_i(theta + e) < E_0},   L_2 = mean_{S_2} H_i(theta + e)
    theta <- theta - lr * gradient of L_2 at theta + e               by the optimizer
    m <- 0.9 m + 0.1 L_2;   if m < threshold: network, optimizer and m are reset to the source

||g|| is over all trained parameters together. rho -> radius, threshold -> reset_threshold. Without a sample in S_1 or
in S_2 no step is taken. The first forward pass predicts the batch. Departs from the authors' code: the second pass is
over the whole batch, so that statistics of batch normalisation are of the batch, not of S_1; the method is meant for
networks with group or layer normalisation, for which there is no difference.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from cl_lightning.checks import above, at_least
from cl_lightning.strategies.base import mean_gradient, output_at
from cl_lightning.strategies.test_time.base import ADAPT, TestTimeAdaptation, Trained
from cl_lightning.strategies.test_time.parts.filters import EntropyFilter, SampleFilter
from cl_lightning.strategies.test_time.parts.restoration import EntropyReset, RestorationRule
from cl_lightning.strategies.test_time.tent import Tent
from cl_lightning.strategy import Batch, Output


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
        **kwargs: Any,
    ) -> None:
        above(self, 0, margin=margin)
        above(self, 0, reset_threshold=reset_threshold, optional=True)
        at_least(self, 0, radius=radius)
        chosen: Trained = params
        resets: list[RestorationRule] = [] if reset_threshold is None else [EntropyReset(reset_threshold)]
        super().__init__(
            params=chosen,
            filters=[EntropyFilter(margin), *(filters or ())],
            restoration=[*resets, *(restoration or ())],
            **kwargs,
        )
        self.radius = radius
        self._seen: list[tuple[Batch, Tensor | None]] = []  # batches of this step, and their selected rows

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        terms = super().losses(batch, output)
        if self.phase.name == ADAPT and self.radius:
            self._seen.append((batch, self.parts.selected))
        return terms

    def edit_gradients(self, batch: Batch) -> None:
        super().edit_gradients(batch)
        seen, self._seen = self._seen, []
        parameters = self.trained_parameters()
        if not seen or any(value.grad is None for value in parameters.values()):
            return
        gradients = [value.grad for value in parameters.values() if value.grad is not None]
        length = torch.nn.utils.get_total_norm(gradients)
        moved = {
            name: (value + self.radius / (length + 1e-12) * gradient).detach().requires_grad_()
            for (name, value), gradient in zip(parameters.items(), gradients, strict=True)
        }
        totals = [torch.zeros_like(gradient) for gradient in gradients]
        for part, selected in seen:
            self.parts.begin_batch(selected)
            with torch.enable_grad():
                output = output_at(self.network, moved, part.images)
                output = Output(output.features, output.logits[:, : self.num_source])
                hidden = part.replace(labels=torch.full_like(part.labels, -1))
                terms = self.parts.averaged(self, self.adapt(hidden, output)[1], hidden, output)
                loss = torch.stack(list(terms.values())).sum()
            torch._foreach_add_(totals, list(mean_gradient(loss, moved, part.weight).values()), alpha=1 / len(seen))
        for value, total in zip(parameters.values(), totals, strict=True):
            value.grad = total
        super().edit_gradients(batch)  # no sample may be selected at the moved weights
