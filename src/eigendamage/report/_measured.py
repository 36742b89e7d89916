"""One model, measured."""

from __future__ import annotations

from eigendamage.files import Frozen
from eigendamage.measure import Evaluation


class Measured(Frozen):
    """One model, measured; None is what could not be (no labels, a loss without predictions).

    Attributes:
        loss: mean loss per example.
        accuracy: fraction of right predictions.
        divergence: mean over examples of KL(original ‖ this) in nats, or what takes its place for
            the loss at hand.
    """

    loss: float | None = None
    accuracy: float | None = None
    divergence: float | None = None

    @classmethod
    def of(cls, evaluation: Evaluation) -> Measured:
        """The same without the number of examples."""
        return cls(
            loss=evaluation.loss,
            accuracy=evaluation.accuracy,
            divergence=evaluation.divergence,
        )
