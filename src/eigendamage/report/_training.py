"""How trainings went, and the rounds that they ended."""

from __future__ import annotations

from eigendamage.documents import Frozen
from eigendamage.report._measured import Measured
from eigendamage.training import Training


class TrainingReport(Frozen):
    """How a training went, by epoch or pass.

    Attributes:
        losses: the mean training loss of each.
        scores: on held-out data, before the first and after each; empty if nothing was held out.
            The loss where there are labels, the divergence from the original otherwise.
        best: after how many the weights were kept.
    """

    losses: tuple[float, ...]
    scores: tuple[float, ...]
    best: int

    @classmethod
    def of(cls, training: Training) -> TrainingReport:
        """The same as part of a report."""
        return cls(losses=training.losses, scores=training.scores, best=training.best)


class RoundReport(Frozen):
    """One of several rounds; everything is relative to the original of the first.

    Attributes:
        method: name of the method.
        budget: of this round, relative to the model that it began with, in words.
        macs: of one example, afterwards.
        parameters: afterwards.
        predicted: expected rise of the mean loss in this round; see `Report`.
        untrained: before the fine-tuning.
        finetuned: after it; None if there was none.
        training: how that went.
    """

    method: str
    budget: str
    macs: float
    parameters: int
    predicted: float | None
    untrained: Measured
    finetuned: Measured | None
    training: TrainingReport | None
