"""CMF, continual momentum filtering on the parameter space (Lee and Chang, ICLR 2024).

``ROID`` with a Kalman filter instead of the average with the source: after each step the parameters theta are moved
towards a hidden state h, which follows both the source theta_0 and theta. With n trained numbers, q = noise n / 38,400
and r = 1 - q,

    h <- a h + (1 - a) theta_0,   v <- a^2 v + q,   b = r / (v + r),   v <- b v
    h <- b h + (1 - b) theta,     theta <- g theta + (1 - g) h

from h = theta_0, v = 0, b at least 0.89 and 1 from 0.9999 on. a -> decay, g -> momentum of the filter. With noise 0,
h stays theta_0 and the method is ROID with momentum g. Departs from the authors' code, which does not reset v together
with the network.
"""

from typing import Any, Literal

from cl_lightning.strategies.test_time.base import TestTimeAdaptation
from cl_lightning.strategies.test_time.parts.restoration import MomentumFilter, RestorationRule
from cl_lightning.strategies.test_time.roid import WeightedConsistency


class CMF(WeightedConsistency):
    """ROID whose parameters are moved towards the state of a Kalman filter.

    Args:
        decay: a, in [0, 1].
        filter_momentum: g, in [0, 1].
        noise: q for the 38,400 trained numbers of a ViT-B/16, in [0, 1).
        ensemble: State that the parameters are moved to: the ``updated`` h, or the ``predicted`` one before the update.
        temperature: T of the weights, above 0, see ``ROID``.
        consistency_weight: Weight of the symmetric cross-entropy with the view, at least 0; 0 leaves the view out.
        prior_correction: Whether the smoothed prior weights ``probabilities``, ``logits``, or nothing (``off``).
        restoration: Further rules, see ``TestTimeAdaptation``.
        kwargs: Options of ``Tent``.
    """

    traits = TestTimeAdaptation.traits.but(family="test-time", paper="Lee and Chang, ICLR 2024", transductive=True)

    def __init__(
        self,
        *,
        decay: float = 0.99,
        filter_momentum: float = 0.99,
        noise: float = 0.005,
        ensemble: Literal["updated", "predicted"] = "updated",
        temperature: float = 1 / 3,
        consistency_weight: float = 1.0,
        prior_correction: Literal["probabilities", "logits", "off"] = "probabilities",
        restoration: list[RestorationRule] | None = None,
        **kwargs: Any,
    ) -> None:
        rule = MomentumFilter(decay, filter_momentum, noise, ensemble=ensemble)
        super().__init__(
            temperature=temperature,
            consistency_weight=consistency_weight,
            prior_correction=prior_correction,
            restoration=[rule, *(restoration or ())],
            **kwargs,
        )
