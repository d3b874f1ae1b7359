"""CODA-Prompt (Smith et al., CVPR 2023, arXiv:2211.13218): prompts that are sums of components, weighed by the image.

A frozen transformer f sees an image as it is, for a query q, and again with prefixes in some of its blocks:

    p(q) = sum_m alpha_m P_m,   alpha_m = cos(q * A_m, K_m)      m over all components so far, no softmax
    attention with keys [K; first half of p] and values [V; second half of p]
    L = CE(W f(x; p), y over the classes of the task) + mu sum_blocks (O(K) + O(A) + O(P)),   O(R) = mean (R R^T - I)^2

Each task adds components, orthogonal to all earlier ones at the beginning, and trains them and its rows of the head;
earlier components take part as they are. mu -> ortho_weight; q is multiplied by A_m entry by entry.
The paper has 100 components in all, 10 for each of 10 tasks; here a task adds ``components``, so that the number of
tasks need not be known. mu = 0 is what the authors recommend since components begin orthogonal. Their first release had
0.1 in its script and a factor of 1e-6 in its penalty: 0.1 here is a million times that.
New components are orthogonal to all that old ones span, where the code takes off their projections on one old one
after the other, which is the same until these are trained; beyond the number of dimensions they are random.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from cl_lightning.batch import Batch
from cl_lightning.network import Output
from cl_lightning.prompts import DecomposedPrompts
from cl_lightning.strategies.pretrained.prompted import PromptedStrategy, tiny_transformer
from cl_lightning.stream import Task


class CODAPrompt(PromptedStrategy):
    """Prefixes made of components that each task adds to, in a frozen transformer.

    Args:
        components: Of each task, at least 1.
        length: Of a prompt, even: half of it keys, half of it values.
        blocks: Indices of the blocks that get prefixes.
        ortho_weight: mu, at least 0.
        kwargs: Of ``PromptedStrategy``.
    """

    family: ClassVar[str] = "pretrained"
    paper: ClassVar[str] = "Smith et al., CVPR 2023, arXiv:2211.13218"

    def __init__(
        self,
        *,
        components: int = 10,
        length: int = 8,
        blocks: Sequence[int] = (0, 1, 2, 3, 4),
        ortho_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if components < 1 or ortho_weight < 0:
            raise ValueError(
                f"CODAPrompt: components={components}, ortho_weight={ortho_weight}; at least 1, at least 0"
            )
        super().__init__(prompts=functools.partial(DecomposedPrompts, length=length, blocks=list(blocks)), **kwargs)
        self.components, self.ortho_weight = components, ortho_weight

    @classmethod
    def conformance_options(cls) -> dict[str, Any]:
        return {
            "backbone": tiny_transformer(),
            "components": 2,
            "length": 4,
            "blocks": (0, 1),
            "ortho_weight": 0.1,
        }

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self._prompts.grow(self.components)

    def trainable(self) -> Iterable[nn.Parameter]:
        newest = {id(parameter) for parameter in self._prompts.newest()}
        old = {id(parameter) for parameter in self._prompts.parameters()} - newest
        return (parameter for parameter in super().trainable() if id(parameter) not in old)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        terms = {"ce": self.classification_loss(output, batch)}
        if self.ortho_weight:
            terms["ortho"] = self.ortho_weight * self._prompts.penalty()
        return terms

    @property
    def _prompts(self) -> DecomposedPrompts:
        return cast(DecomposedPrompts, self.prompted.prompts)
