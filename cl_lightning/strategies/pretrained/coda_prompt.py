"""CODA-Prompt (Smith et al., CVPR 2023, arXiv:2211.13218): prompts as sums of components, weighted by the image.

A frozen transformer f takes an image twice: without prompts, for a query q, and with prefixes p in some of its blocks:

    p(q) = sum_m alpha_m P_m,   alpha_m = cos(q * A_m, K_m)      m over all components so far, no softmax
    attention with keys [K; first half of p] and values [V; second half of p]
    L = CE(W f(x; p), y over the classes of the task) + mu sum_blocks (O(K) + O(A) + O(P)),   O(R) = mean (R R^T - I)^2

Each task adds components, initialised orthogonal to all earlier components, and trains them and its rows of the head.
Earlier components are used but not trained. mu -> ortho_weight; q * A_m is the product entry by entry.
The paper has 100 components in total, 10 for each of 10 tasks; here a task adds ``components``, so the number of tasks
need not be known. The authors recommend mu = 0 since they initialise components orthogonally. Their first release had
0.1 in its script and a factor of 1e-6 in its penalty: 0.1 here is 10^6 times as much. The learning rate of the released
code follows ``QuarterCosineOverPhase`` one epoch late (``late=1``): its factors are 1, 1, 0.997, ..., 0.097.
Departs from the code, which subtracts the projections onto the old components one after the other: here new components
are orthogonal to the span of the old ones. Both are the same until components are trained. Components beyond the number
of dimensions are random.
"""

import functools
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from cl_lightning.checks import at_least
from cl_lightning.models import DecomposedPrompts
from cl_lightning.strategies.pretrained.prompted import PromptedStrategy
from cl_lightning.strategy import Batch, Output, Task


class CODAPrompt(PromptedStrategy):
    """Attention-weighted sums of prompt components as prefixes in a frozen transformer; each task adds components.

    Args:
        components: Number of components that a task adds, at least 1.
        length: Number of tokens of a prompt, even: the first half are keys, the second half values.
        blocks: Indices of the blocks with prefixes.
        ortho_weight: mu, at least 0.
        kwargs: Options of ``PromptedStrategy``.
    """

    traits = PromptedStrategy.traits.but(family="pretrained", paper="Smith et al., CVPR 2023, arXiv:2211.13218")

    def __init__(
        self,
        *,
        components: int = 10,
        length: int = 8,
        blocks: Sequence[int] = (0, 1, 2, 3, 4),
        ortho_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        at_least(self, 1, components=components)
        at_least(self, 0, ortho_weight=ortho_weight)
        super().__init__(prompts=functools.partial(DecomposedPrompts, length=length, blocks=list(blocks)), **kwargs)
        self.components, self.ortho_weight = components, ortho_weight

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self._prompts.grow(self.components)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        terms = {"ce": self.classification_loss(output, batch)}
        if self.ortho_weight:
            terms["ortho"] = self.ortho_weight * self._prompts.penalty()
        return terms

    @property
    def _prompts(self) -> DecomposedPrompts:
        return cast(DecomposedPrompts, self.prompted.prompts)
