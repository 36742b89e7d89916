"""The report as data: what was expected, what was measured, what was left alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from eigendamage.curvature import CalibrationRow
from eigendamage.documents import Document, Frozen
from eigendamage.layers import DenseForm
from eigendamage.plan import (
    Action,
    Channels,
    DepthwiseBlock,
    EigenBlock,
    Keep,
    LayerPlan,
    LowRank,
    Mask,
    Plan,
    Repair,
)
from eigendamage.report._environment import Environment
from eigendamage.report._measured import Measured
from eigendamage.report._spectra import Spectra
from eigendamage.report._training import RoundReport, TrainingReport
from eigendamage.report._truth import Truth

REPORT_VERSION = 1


class LayerReport(Frozen):
    """One layer: what was done, for what price.

    Attributes:
        action: in words.
        ranks: kept rows and columns, where the layer was factored.
        price: expected rise of the loss; None where the method's measure is none.
        calibrated: the price, corrected by measurements; None if it was not.
        macs: of one example, before and after.
        parameters: before and after.
    """

    action: str
    ranks: tuple[int, int] | None
    price: float | None
    calibrated: float | None = None
    macs: tuple[float, float]
    parameters: tuple[int, int]


class Calibration(Frozen):
    """The trace of a layer's Fisher block: exact on a few examples, by K-FAC, by Σ λ."""

    exact: float
    kfac: float
    ekfac: float


_FORM_WORDS: dict[DenseForm, str] = {
    "three": "1×1, K, 1×1",
    "merge_in": "K, 1×1",
    "merge_out": "1×1, K",
}
_REPAIR_WORDS: dict[Repair, str] = {
    "none": "",
    "rows": ", filters repaired",
    "columns": ", readers repaired",
    "both": ", filters and readers repaired",
    "rows one at a time": ", filters repaired one at a time",
    "c-obs": ", weights repaired one at a time",
}


class Report(Document):
    """What compressing a model was expected to cost and what was measured.

    Attributes:
        model: class name of the model.
        method: name of the method.
        budget: what was asked for, in words.
        asked: the same by name: fractions to leave, a divergence, or a ratio; see `Budget`.
        command: what made it, as it was typed; None where that is not known.
        made: when, in ISO 8601; None where that is not known.
        ratio: the fraction of units whose price the threshold reaches; see `Plan`.
        macs: of one example in the whole model, before and after, both as counted on a run.
        parameters: before and after, counted.
        examples: examples that the curvature is of.
        predicted: expected rise of the mean loss per example right after surgery, the sum of the
            prices; None where the method's measure is no rise of the loss.
        measured_on: ``eval_data``, or ``data`` if the only data was that of the curvature.
        measured_examples: how many examples were measured on.
        original: the model as it was.
        compressed: right after surgery.
        repaired: after changed layers were refitted; None if they were not.
        recalibrated: after batch norm's statistics were measured again; None if there is none.
        polished: after the polish; None if there was none.
        finetuned: after the last round's fine-tuning; None if there was none.
        polish: how the polish went.
        rounds: each round, where there were several or training.
        layers: each layer of the plan.
        left_alone: every other module with parameters, with the reason.
        calibration: trace of each layer's Fisher block, three ways.
        spectra: how each layer's curvature falls off.
        truth: predictions held against measurements on inputs held out of ``data``; None where
            nothing was held out.
        latency: the fraction of the original's latency that is left, where it was measured.
        gap: the most that a better allocation could save of the price; see `Plan`.
        seconds: wall time of each stage.
        environment: versions, device, seed.
        notes: what a user should know.
    """

    version: Literal[1] = REPORT_VERSION
    model: str
    method: str
    budget: str
    asked: Mapping[str, float] = {}
    command: str | None = None
    made: str | None = None
    ratio: float | None
    macs: tuple[float, float]
    parameters: tuple[int, int]
    examples: int
    predicted: float | None
    measured_on: Literal["eval_data", "data"]
    measured_examples: int
    original: Measured
    compressed: Measured
    repaired: Measured | None = None
    recalibrated: Measured | None
    polished: Measured | None = None
    finetuned: Measured | None = None
    polish: TrainingReport | None = None
    rounds: tuple[RoundReport, ...] = ()
    layers: Mapping[str, LayerReport]
    left_alone: Mapping[str, str]
    calibration: Mapping[str, Calibration]
    spectra: Mapping[str, Spectra] = {}
    truth: Truth | None = None
    latency: float | None = None
    gap: float | None = None
    seconds: Mapping[str, float]
    environment: Environment
    notes: tuple[str, ...] = ()

    @property
    def final(self) -> Measured:
        """The model that is handed back: the last of its versions."""
        return (
            self.finetuned or self.polished or self.recalibrated or self.repaired or self.compressed
        )

    @property
    def versions(self) -> tuple[tuple[str, Measured], ...]:
        """Each version that was measured, in words, from the original to the one handed back."""
        all_of_them = (
            ("original", self.original),
            ("right after surgery", self.compressed),
            ("repaired", self.repaired),
            ("batch norm recalibrated", self.recalibrated),
            ("polished", self.polished),
            ("fine-tuned", self.finetuned),
        )
        return tuple((what, measured) for what, measured in all_of_them if measured is not None)

    def rise(self, measured: Measured) -> float | None:
        """Rise of a version's mean loss over the original's, where there are labels."""
        if measured.loss is None or self.original.loss is None:
            return None
        return measured.loss - self.original.loss

    @property
    def measured_rise(self) -> float | None:
        """Rise of the mean loss of the model that is handed back, where there are labels."""
        return self.rise(self.final)


def layer_reports(plan: Plan, first: Plan | None = None) -> dict[str, LayerReport]:
    """The plan's layers, in words; sizes before are those of the ``first`` plan of several."""
    before = plan if first is None else first
    return {
        name: LayerReport(
            action=_words(layer.action, layer.shape),
            ranks=_ranks(layer.action, layer.shape),
            price=layer.price,
            calibrated=layer.calibrated,
            macs=(_first(before, name, layer).macs[0], layer.macs[1]),
            parameters=(_first(before, name, layer).parameters[0], layer.parameters[1]),
        )
        for name, layer in plan.layers.items()
    }


def _first(plan: Plan, name: str, layer: LayerPlan) -> LayerPlan:
    return plan.layers.get(name, layer)


def _words(action: Action, shape: tuple[int, int, int]) -> str:
    match action:
        case Keep():
            return f"kept: {action.reason}"
        case EigenBlock():
            return f"factored: {_FORM_WORDS[action.form]}"
        case DepthwiseBlock():
            return "factored: 1×1, K depthwise, 1×1"
        case LowRank():
            return f"low rank: {_FORM_WORDS[action.form]}"
        case Channels():
            sides = [
                f"{len(kept)} of {size} {what}"
                for kept, size, what in (
                    (action.outputs, shape[0], "outputs"),
                    (action.inputs, shape[1], "inputs"),
                )
                if len(kept) < size
            ]
            return f"channels: {', '.join(sides)}{_REPAIR_WORDS[action.repair]}"
        case Mask():
            zero = 1 - float(action.keep(shape).double().mean())
            repaired = "" if action.repair == "none" else ", the others repaired"
            return f"masked: {zero:.0%} of the weights are zero{repaired}"


def _ranks(action: Action, shape: tuple[int, int, int]) -> tuple[int, int] | None:
    match action:
        case EigenBlock():
            return len(action.rows), len(action.columns)
        case DepthwiseBlock():
            return action.rank, action.rank
        case LowRank():
            basis = action.directions(shape[1])
            return action.rank, shape[1] if basis is None else basis.shape[1]
        case _:
            return None


def calibration_by_layer(rows: list[CalibrationRow]) -> dict[str, Calibration]:
    """The calibration table, by layer."""
    return {r.layer: Calibration(exact=r.exact, kfac=r.kfac, ekfac=r.ekfac) for r in rows}
