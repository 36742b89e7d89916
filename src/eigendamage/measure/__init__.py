"""What can be measured of a model: its cost, its loss, its distance from another."""

from eigendamage.measure._count import Count, count
from eigendamage.measure._evaluate import Evaluation, evaluate, evaluate_together

__all__ = ["Count", "Evaluation", "count", "evaluate", "evaluate_together"]
