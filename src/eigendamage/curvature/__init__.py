"""The Fisher of every layer, in Kronecker factors and in their eigenbasis."""

from eigendamage.curvature._calibration import CalibrationRow, calibration_table
from eigendamage.curvature._capture import preserved_random_state
from eigendamage.curvature._cross_entropy import IGNORED_LABEL, CrossEntropy
from eigendamage.curvature._curvature import Curvature, Extra
from eigendamage.curvature._ekfac import eigenvalue_sum
from eigendamage.curvature._estimate import estimate_curvature
from eigendamage.curvature._factors import eigenbasis, gram, homogeneous, input_moments
from eigendamage.curvature._head import Fisher, Head, PredictiveHead
from eigendamage.curvature._layer import EigenvalueKind, LayerCurvature
from eigendamage.curvature._losses import Loss, head_of, loss_name
from eigendamage.curvature._memory import bytes_of
from eigendamage.curvature._patches import PositionDraws, patches_at
from eigendamage.curvature._store import load_curvature, save_curvature

__all__ = [
    "IGNORED_LABEL",
    "CalibrationRow",
    "CrossEntropy",
    "Curvature",
    "EigenvalueKind",
    "Extra",
    "Fisher",
    "Head",
    "LayerCurvature",
    "Loss",
    "PositionDraws",
    "PredictiveHead",
    "bytes_of",
    "calibration_table",
    "eigenbasis",
    "eigenvalue_sum",
    "estimate_curvature",
    "gram",
    "head_of",
    "homogeneous",
    "input_moments",
    "load_curvature",
    "loss_name",
    "patches_at",
    "preserved_random_state",
    "save_curvature",
]
