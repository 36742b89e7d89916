"""From curvature to decisions: prices, budgets, and the plan itself."""

from eigendamage.plan._budget import Budget
from eigendamage.plan._make import METHODS, check_options, make_plan
from eigendamage.plan._plan import Action, EigenBlock, Keep, LayerPlan, Plan
from eigendamage.plan._threshold import FormChoice

__all__ = [
    "METHODS",
    "Action",
    "Budget",
    "EigenBlock",
    "FormChoice",
    "Keep",
    "LayerPlan",
    "Plan",
    "check_options",
    "make_plan",
]
