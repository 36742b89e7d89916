"""Predicted and measured, side by side, for the report."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from eigendamage.compress._steps import CALIBRATED_ON, Built, Settings
from eigendamage.measure import calibrate, evaluate_together, joint_quadratic, planned_changes
from eigendamage.plan import OF_CHANNELS, Calibration, Channels, LayerPlan
from eigendamage.report import LayerTruth, Truth

_SAME = 0.1  # relative: a point this near to a price speaks for it


def truth_of(original: nn.Module, chain: Sequence[Built], settings: Settings) -> Truth | None:
    """What the shots that led to a result predicted and what it was measured to cost.

    None where there is no held-out data, no divergence for the loss, or no price.
    """
    last = chain[-1]
    prices = [built.plan.price for built in chain]
    if settings.parts is None or None in prices or not last.plan.changed:
        return None
    with settings.clock.stage("truth"):
        models = [original, last.cut, last.model]
        cut, repaired = evaluate_together(
            models,
            settings.parts.held_out,
            loss=settings.loss,
            reduction=settings.reduction,
            progress=settings.progress,
        )[1:]
        if cut.divergence is None:
            return None
        quadratic = None
        if len(chain) == 1:
            quadratic = joint_quadratic(
                original,
                planned_changes(original, last.cut, last.plan),
                settings.parts.held_out,
                loss=settings.loss,
                max_examples=CALIBRATED_ON,
                progress=settings.progress,
            )
        alone = calibrate(
            last.source.model,
            last.source.curvature,
            [last.plan],
            settings.parts.held_out,
            known=last.source.calibration,
            loss=settings.loss,
            max_examples=CALIBRATED_ON,
            progress=settings.progress,
        )
    corrected = [built.plan.calibrated for built in chain]
    return Truth(
        examples=cut.examples,
        priced=sum(price for price in prices if price is not None),
        calibrated=None if None in corrected else sum(c for c in corrected if c is not None),
        quadratic=quadratic,
        before_repair=cut.divergence,
        after_repair=None if last.repairs is None else repaired.divergence,
        layers={
            name: _alone(name, layer, alone)
            for name, layer in last.plan.layers.items()
            if layer.changes and layer.price
        },
    )


def _alone(name: str, layer: LayerPlan, calibration: Calibration) -> LayerTruth:
    price = layer.price or 0.0
    key = OF_CHANNELS + name if isinstance(layer.action, Channels) else name
    points = calibration.points.get(key, ())
    nearest = min(points, key=lambda p: abs(p.price - price), default=None)
    same = nearest is not None and abs(nearest.price - price) <= _SAME * price
    return LayerTruth(
        price=price,
        calibrated=layer.calibrated,
        measured=nearest.measured if nearest is not None and same else None,
    )
