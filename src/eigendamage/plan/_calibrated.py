"""What a plan costs by calibrated prices."""

from __future__ import annotations

import numpy as np

from eigendamage.plan._calibrate import OF_CHANNELS, Calibration
from eigendamage.plan._plan import Channels, LayerPlan, Plan


def calibrated_price(calibration: Calibration, name: str, layer: LayerPlan) -> float:
    """The price of one layer of a plan, corrected; that of channels is under their group."""
    key = OF_CHANNELS + name if isinstance(layer.action, Channels) else name
    return float(calibration.corrected(key, np.array([layer.price or 0.0]))[0])


def calibrated_plan(plan: Plan, calibration: Calibration) -> Plan:
    """The same plan with the prices of its layers corrected."""
    layers = {
        name: layer.model_copy(update={"calibrated": calibrated_price(calibration, name, layer)})
        if layer.price
        else layer
        for name, layer in plan.layers.items()
    }
    return plan.model_copy(update={"layers": layers})
