"""Predictions held against what was measured on inputs that had no part in them."""

from __future__ import annotations

from collections.abc import Mapping

from eigendamage.documents import Frozen

TRUST = 2.0
"""A prediction is trusted while what is measured is at most this many times as much."""


class LayerTruth(Frozen):
    """One layer, or one group of channels with its readers, changed alone.

    Attributes:
        price: expected rise of the loss.
        calibrated: the price, corrected by measurements.
        measured: divergence of the otherwise original model; None if it was not measured at this
            price.
    """

    price: float
    calibrated: float | None
    measured: float | None


class Truth(Frozen):
    """What was predicted of the whole, and what was measured, label-free, on held-out inputs.

    Attributes:
        examples: held-out examples.
        priced: sum of the prices.
        calibrated: sum of the calibrated prices; None if they were not calibrated.
        quadratic: the exact Gauss–Newton quadratic of all changes together, as surgery left them;
            None if the model has an operation without a forward derivative.
        before_repair: divergence from the original right after surgery.
        after_repair: of the repaired model; None if there was no repair.
        layers: each change alone.
    """

    examples: int
    priced: float
    calibrated: float | None
    quadratic: float | None
    before_repair: float
    after_repair: float | None
    layers: Mapping[str, LayerTruth]

    @property
    def predicted(self) -> float:
        """The best prediction that was made before the whole was measured."""
        return self.priced if self.calibrated is None else self.calibrated

    @property
    def measured(self) -> float:
        """The divergence of the result."""
        return self.before_repair if self.after_repair is None else self.after_repair

    @property
    def predictions(self) -> tuple[tuple[str, float, float], ...]:
        """Each prediction that was made, in words, with what was measured of the same model."""
        all_of_them = (
            ("priced", self.priced, self.measured),
            ("calibrated", self.calibrated, self.measured),
            ("joint quadratic, before repair", self.quadratic, self.before_repair),
        )
        return tuple((what, p, measured) for what, p, measured in all_of_them if p is not None)

    @property
    def factor(self) -> float | None:
        """How many times the prediction was measured; None for a prediction of nothing."""
        return self.measured / self.predicted if self.predicted > 0 else None

    @property
    def trusted(self) -> bool:
        """Whether what was measured is at most `TRUST` times the prediction."""
        return self.factor is None or self.factor <= TRUST

    @property
    def note(self) -> str | None:
        """Where trust ends, in words; None where it does not."""
        if self.trusted or self.factor is None:
            return None
        return (
            f"the measured divergence is {self.factor:.1f} times the predicted one, above the "
            f"{TRUST:g} up to which predictions are trusted: at this budget layers disturb one "
            f"another in ways that prices do not see. A milder budget is safer, or more rounds "
            f"(rounds=)"
        )
