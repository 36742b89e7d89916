"""What was expected and what was measured, as data and for a terminal."""

from eigendamage.report._comparison import Comparison, Row, Settings
from eigendamage.report._comparison_views import plot_comparison, print_comparison, ranked
from eigendamage.report._environment import Environment
from eigendamage.report._measured import Measured
from eigendamage.report._page import report_page, write_page
from eigendamage.report._plan import PlanReport, print_plan
from eigendamage.report._report import (
    Calibration,
    LayerReport,
    Report,
    calibration_by_layer,
    layer_reports,
)
from eigendamage.report._spectra import Spectra, Spectrum, spectra_by_layer
from eigendamage.report._sweep import Sweep, SweepRow
from eigendamage.report._sweep_views import plot_sweep, print_sweep
from eigendamage.report._terminal import count_of, number, percent, print_report, render
from eigendamage.report._training import RoundReport, TrainingReport
from eigendamage.report._truth import TRUST, LayerTruth, Truth

__all__ = [
    "TRUST",
    "Calibration",
    "Comparison",
    "Environment",
    "LayerReport",
    "LayerTruth",
    "Measured",
    "PlanReport",
    "Report",
    "RoundReport",
    "Row",
    "Settings",
    "Spectra",
    "Spectrum",
    "Sweep",
    "SweepRow",
    "TrainingReport",
    "Truth",
    "calibration_by_layer",
    "count_of",
    "layer_reports",
    "number",
    "percent",
    "plot_comparison",
    "plot_sweep",
    "print_comparison",
    "print_plan",
    "print_report",
    "print_sweep",
    "ranked",
    "render",
    "report_page",
    "spectra_by_layer",
    "write_page",
]
