"""One model, measured."""

from __future__ import annotations

from eigendamage.documents import Frozen
from eigendamage.measure import Evaluation


class Measured(Frozen):
    """One model, measured; None is what could not be (no labels, a loss without predictions).

    Attributes:
        loss: mean loss per example.
        accuracy: fraction of right predictions, of all positions (tokens) with a label.
        accuracy_error: its standard error, by the spread from example to example; see `Evaluation`.
            None in a report that an older version wrote.
        divergence: mean over examples of KL(original ‖ this) in nats, or what takes its place for
            the loss at hand.
        perplexity: the exponential of the mean loss of a position (a token); None where an example
            has one.
    """

    loss: float | None = None
    accuracy: float | None = None
    divergence: float | None = None
    perplexity: float | None = None
    accuracy_error: float | None = None

    @classmethod
    def of(cls, evaluation: Evaluation) -> Measured:
        """The same without the numbers of examples and positions."""
        by_position = evaluation.positions != evaluation.examples
        return cls(
            loss=evaluation.loss,
            accuracy=evaluation.accuracy,
            divergence=evaluation.divergence,
            perplexity=evaluation.perplexity if by_position else None,
            accuracy_error=evaluation.accuracy_error,
        )
