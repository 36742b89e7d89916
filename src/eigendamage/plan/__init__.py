"""From curvature to decisions: prices, budgets, and the plan itself."""

from eigendamage.plan._blocks import FormChoice
from eigendamage.plan._budget import Budget, Unit
from eigendamage.plan._channels import RankBy
from eigendamage.plan._make import check_options, make_plan
from eigendamage.plan._methods import METHODS, WeightMethod, needs, variant_of
from eigendamage.plan._plan import (
    Action,
    CarrierPlan,
    Channels,
    DepthwiseBlock,
    EigenBlock,
    Keep,
    LayerPlan,
    Mask,
    Plan,
    Repair,
)
from eigendamage.plan._repair import repaired
from eigendamage.plan._views import LayerView

__all__ = [
    "METHODS",
    "Action",
    "Budget",
    "CarrierPlan",
    "Channels",
    "DepthwiseBlock",
    "EigenBlock",
    "FormChoice",
    "Keep",
    "LayerPlan",
    "LayerView",
    "Mask",
    "Plan",
    "RankBy",
    "Repair",
    "Unit",
    "WeightMethod",
    "check_options",
    "make_plan",
    "needs",
    "repaired",
    "variant_of",
]
