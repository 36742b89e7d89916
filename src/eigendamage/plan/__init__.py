"""From curvature to decisions: prices, budgets, and the plan itself."""

from eigendamage.plan._blocks import FormChoice
from eigendamage.plan._budget import Budget, Unit
from eigendamage.plan._calibrate import OF_CHANNELS, Calibration, Point
from eigendamage.plan._calibrated import calibrated_plan, calibrated_price
from eigendamage.plan._channels import RankBy
from eigendamage.plan._checks import (
    check_max_ratio,
    check_options,
    check_refine,
    refuse_options_of_auto,
)
from eigendamage.plan._latency import LatencyTable
from eigendamage.plan._make import make_plan
from eigendamage.plan._menu import metric_of
from eigendamage.plan._menus import ACTIONS, ActionKind, Menus, make_menus, wanted_actions
from eigendamage.plan._methods import (
    METHODS,
    AutoMethod,
    WeightMethod,
    method_named,
    needs,
    variant_of,
)
from eigendamage.plan._plan import (
    Action,
    CarrierPlan,
    Channels,
    CounterPlan,
    DepthwiseBlock,
    EigenBlock,
    Keep,
    LayerPlan,
    LowRank,
    Mask,
    Plan,
    Repair,
)
from eigendamage.plan._repair import repaired
from eigendamage.plan._views import LayerView

__all__ = [
    "ACTIONS",
    "METHODS",
    "OF_CHANNELS",
    "Action",
    "ActionKind",
    "AutoMethod",
    "Budget",
    "Calibration",
    "CarrierPlan",
    "Channels",
    "CounterPlan",
    "DepthwiseBlock",
    "EigenBlock",
    "FormChoice",
    "Keep",
    "LatencyTable",
    "LayerPlan",
    "LayerView",
    "LowRank",
    "Mask",
    "Menus",
    "Plan",
    "Point",
    "RankBy",
    "Repair",
    "Unit",
    "WeightMethod",
    "calibrated_plan",
    "calibrated_price",
    "check_max_ratio",
    "check_options",
    "check_refine",
    "make_menus",
    "make_plan",
    "method_named",
    "metric_of",
    "needs",
    "refuse_options_of_auto",
    "repaired",
    "variant_of",
    "wanted_actions",
]
