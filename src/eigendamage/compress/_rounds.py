"""Several rounds, each trained at its end; resumable from a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from types import FunctionType
from typing import Any, Literal

import torch
from torch import nn

from eigendamage.batches import Batches, Data
from eigendamage.compress._once import Before, once
from eigendamage.compress._prepare import on_request
from eigendamage.compress._result import Compressed, Options
from eigendamage.curvature import Curvature, load_curvature, save_curvature
from eigendamage.distributed import decided
from eigendamage.documents import Document
from eigendamage.errors import FileFormatError, MismatchError, MissingFileError
from eigendamage.files import load_tensors, make_folder, save_tensors, written_beside
from eigendamage.layers import copy_model
from eigendamage.measure import evaluate
from eigendamage.plan import Plan
from eigendamage.report import Measured, Report, RoundReport, TrainingReport
from eigendamage.seeds import later_seed
from eigendamage.surgery import apply_plan
from eigendamage.training import FinetuneConfig, Training, batch_digest, digest, finetune, worsening


@dataclass(frozen=True, eq=False)
class RoundTraining:
    """What each round is trained on, and how."""

    data: Iterable[Any]
    config: FinetuneConfig


class Run(Document):
    """What a folder of rounds was begun with.

    Attributes:
        arguments: in words, by name.
    """

    version: Literal[1] = 1
    arguments: Mapping[str, str]


def in_rounds(
    model: nn.Module,
    data: Data,
    options: Options,
    *,
    rounds: int,
    training: RoundTraining | None,
    eval_data: Data | None,
    curvature: Curvature | None,
    directory: Path | None,
) -> Compressed:
    """Curvature, plan, surgery, repair and fine-tuning, several times over.

    Args:
        model: the original, that every round's training distils where the loss allows it.
        data: inputs for curvature and repair.
        options: of a round; the budget is that of the whole.
        rounds: how many.
        training: at the end of each; None for none.
        eval_data: what to measure on; the data itself if there is none.
        curvature: of the original, if it is known.
        directory: for the state of the rounds; None keeps none. Several processes have to see
            the same folder.

    Raises:
        MismatchError: if the folder holds rounds of another call.
    """
    if directory is not None:
        decided(partial(_claim, directory, model, data, options, rounds, training))
    current, plans = model, []
    ignore = options.ignore
    if curvature is not None:  # later rounds have one of their own
        ignore = (*ignore, *on_request(curvature))
    reports: list[RoundReport] = []
    notes: list[tuple[str, ...]] = []
    result: Compressed | None = None
    tuned: Measured | None = None
    seconds: dict[str, float] = {}
    left: dict[str, float] = {str(unit): 1.0 for unit in options.budget.limits}
    for index in range(rounds):
        folder = None if directory is None else directory / f"round-{index + 1}"
        step = replace(
            options,
            budget=options.budget.step((index + 1) / rounds, left),
            seed=later_seed(options.seed, index),
            ignore=ignore if index else options.ignore,
        )
        result = None if folder is None else _finished(current, folder)
        if result is None:
            result = once(
                current,
                data,
                step,
                eval_data=eval_data,
                curvature=curvature,
                before=Before(model, tuple(plans)),
            )
            if folder is not None:
                # What goes on is what a resumed run would find.
                decided(partial(_keep, result, folder))
                result = replace(_finished(current, folder) or result, repairs=result.repairs)
        curvature = None
        plans.append(result.plan)
        for unit in options.budget.limits:
            left[unit] *= result.plan.left(unit)
        if result.report.latency is not None:
            left["latency"] = left.get("latency", 1.0) * result.report.latency
        current, how = result.model, None
        truth = result.report.truth
        superseded = None if truth is None or index + 1 == rounds else truth.note
        notes.append(tuple(note for note in result.report.notes if note != superseded))
        if training is not None:
            start = perf_counter()
            current = copy_model(current)
            done = _trained(current, model, training, step, folder)
            how = TrainingReport.of(done)
            if worse := worsening(done, training.config):
                notes[-1] += (worse,)
            seconds["training"] = seconds.get("training", 0.0) + perf_counter() - start
            where = data if eval_data is None else eval_data
            tuned = Measured.of(
                evaluate(
                    current,
                    where,
                    loss=options.loss,
                    max_examples=options.max_examples if eval_data is None else None,
                    reference=model,
                    reduction=options.reduction,
                    progress=options.progress,
                )
            )
        reports.append(_round(result.report, tuned, how))
        for name, spent in result.report.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + spent
    assert result is not None
    return replace(
        result,
        model=current,
        earlier=tuple(plans[:-1]),
        report=result.report.model_copy(
            update={
                "budget": str(options.budget),
                "asked": options.budget.given,
                "finetuned": tuned,
                "rounds": tuple(reports),
                "seconds": seconds,
                "latency": left.get("latency"),
                "predicted": _sum([one.predicted for one in reports]),
                "notes": _told(notes),
                "environment": result.report.environment.model_copy(update={"seed": options.seed}),
            }
        ),
    )


def _trained(
    model: nn.Module,
    original: nn.Module,
    training: RoundTraining,
    step: Options,
    folder: Path | None,
) -> Training:
    predictive = isinstance(step.loss, str)
    return finetune(
        model,
        training.data,
        training.config,
        original=original if predictive else None,
        loss=step.loss,
        checkpoint=None if folder is None else folder / "training.pt",
        progress=step.progress,
    )


def _round(report: Report, tuned: Measured | None, training: TrainingReport | None) -> RoundReport:
    return RoundReport(
        method=report.method,
        budget=report.budget,
        macs=report.macs[1],
        parameters=report.parameters[1],
        predicted=report.predicted,
        untrained=report.final,
        finetuned=tuned,
        training=training,
    )


def _told(notes: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The last round's as they are, and what earlier rounds have beside, with their numbers."""
    earlier: dict[str, list[str]] = {}
    for number, of_round in enumerate(notes[:-1], 1):
        for note in of_round:
            if note not in notes[-1]:
                earlier.setdefault(note, []).append(str(number))
    return (*notes[-1], *(f"round {', '.join(n)}: {note}" for note, n in earlier.items()))


def _sum(values: list[float | None]) -> float | None:
    return None if None in values else sum(v for v in values if v is not None)


def _claim(
    directory: Path,
    model: nn.Module,
    data: Data,
    options: Options,
    rounds: int,
    training: RoundTraining | None,
) -> None:
    """Note what the folder is for, or see that it is for the same, once a round is in it.

    Raises:
        MismatchError: naming the first argument that differs.
    """
    asked = {field.name: _in_words(getattr(options, field.name)) for field in fields(options)}
    del asked["progress"]
    asked["rounds"] = str(rounds)
    asked["finetuning"] = "none" if training is None else _in_words(training.config)
    asked["the model's weights"] = digest(model)
    batches = Batches(data, torch.device("cpu"), options.max_examples)
    asked["the data"] = hashlib.sha256(
        "".join(batch_digest(batch) for batch in batches).encode()
    ).hexdigest()
    make_folder(directory)
    path = directory / "run.json"
    if not any(directory.glob("round-*/report.json")):
        Run(arguments=asked).save(path)
        return
    before = Run.load(path).arguments
    for name, value in asked.items():
        if before.get(name) != value:
            raise MismatchError(
                f"{directory} holds rounds of another call, or of another version: {name} was "
                f"{before.get(name, 'not noted')} and is now {value}; give the same again (data "
                f"that is the same in each run), or another folder"
            )


def _in_words(value: object) -> str:
    """The same in every process: functions by where they are defined, not by where they lie."""
    if is_dataclass(value) and not isinstance(value, type):
        named = (f"{f.name}={_in_words(getattr(value, f.name))}" for f in fields(value))
        return f"{type(value).__name__}({', '.join(named)})"
    if isinstance(value, FunctionType | type):
        return f"{value.__module__}.{value.__qualname__}"
    if callable(value):
        return f"{type(value).__module__}.{type(value).__qualname__}"
    return str(value)


def _keep(result: Compressed, folder: Path) -> None:
    """Write what a round made; the report comes last and says that it is whole."""
    make_folder(folder)
    tensors = {k: v.detach().cpu().contiguous() for k, v in result.model.state_dict().items()}
    with written_beside(folder / "untrained.safetensors") as beside:
        save_tensors({k: v.clone() for k, v in tensors.items()}, beside)
    save_curvature(result.curvature, folder / "curvature.safetensors")
    result.plan.save(folder / "plan.json")
    result.report.save(folder / "report.json")


def _finished(model: nn.Module, folder: Path) -> Compressed | None:
    """What a round made of a model in an earlier run; None if it did not get that far."""
    if not decided((folder / "report.json").exists):
        return None
    try:
        return _read_round(model, folder)
    except (FileFormatError, MissingFileError, MismatchError) as error:
        raise FileFormatError(
            f"the round in {folder} cannot be taken up: {error}. Remove that folder, and those of "
            f"later rounds, to make them again"
        ) from error


def _read_round(model: nn.Module, folder: Path) -> Compressed:
    curvature = load_curvature(folder / "curvature.safetensors")
    plan = Plan.load(folder / "plan.json")
    smaller = apply_plan(model, plan, curvature)
    path = folder / "untrained.safetensors"
    try:
        smaller.load_state_dict(load_tensors(path, "file of weights"))
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise FileFormatError(f"{path} is not of the plan beside it: {said}") from error
    return Compressed(
        model=smaller,
        plan=plan,
        curvature=curvature,
        report=Report.load(folder / "report.json"),
    )
