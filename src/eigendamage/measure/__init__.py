"""What can be measured of a model: its cost, its loss, its distance from another, its latency."""

from eigendamage.measure._alone import divergences_alone
from eigendamage.measure._calibration import calibrate
from eigendamage.measure._change import Change, planned_changes
from eigendamage.measure._count import Count, count
from eigendamage.measure._evaluate import Evaluation, evaluate, evaluate_together
from eigendamage.measure._latency import measure_latency_table
from eigendamage.measure._quadratic import joint_quadratic
from eigendamage.measure._timing import Latency, latency, time_together

__all__ = [
    "Change",
    "Count",
    "Evaluation",
    "Latency",
    "calibrate",
    "count",
    "divergences_alone",
    "evaluate",
    "evaluate_together",
    "joint_quadratic",
    "latency",
    "measure_latency_table",
    "planned_changes",
    "time_together",
]
