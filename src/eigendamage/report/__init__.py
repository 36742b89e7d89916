"""What was expected and what was measured, as data and for a terminal."""

from eigendamage.report._report import (
    Calibration,
    Environment,
    LayerReport,
    Measured,
    Report,
    calibration_by_layer,
    layer_reports,
)
from eigendamage.report._terminal import count_of, number, percent, print_report, render

__all__ = [
    "Calibration",
    "Environment",
    "LayerReport",
    "Measured",
    "Report",
    "calibration_by_layer",
    "count_of",
    "layer_reports",
    "number",
    "percent",
    "print_report",
    "render",
]
