"""One round of `compress`: curvature, plan, surgery, repair, polish, report."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from torch import nn

from eigendamage.batches import Data, kept
from eigendamage.compress._prepare import Preparation, prepared, require_loss, require_measurable
from eigendamage.compress._report import Versions, report_of
from eigendamage.compress._result import Compressed, Options
from eigendamage.compress._search import in_shots
from eigendamage.compress._steps import Built, Source, built, repairable
from eigendamage.curvature import Curvature
from eigendamage.distributed import with_first_state
from eigendamage.errors import EigenDamageError
from eigendamage.layers import copy_model
from eigendamage.plan import Plan, check_options, make_plan
from eigendamage.report import TrainingReport
from eigendamage.seeds import check_seed
from eigendamage.surgery import recalibrate_batchnorm
from eigendamage.training import PolishConfig, polish

# The held-out inputs have judged the repair already, so it looks better on them than elsewhere;
# what is only a little above it there is mostly below it elsewhere.
_TOLERATED = 1.25


@dataclass(frozen=True, eq=False)
class Before:
    """What a round comes after.

    Attributes:
        original: the model of the first round, that results are measured against.
        plans: of the rounds before.
    """

    original: nn.Module
    plans: tuple[Plan, ...] = field(default=())


def once(
    model: nn.Module,
    data: Data,
    options: Options,
    *,
    eval_data: Data | None,
    curvature: Curvature | None,
    before: Before | None = None,
) -> Compressed:
    """One round; ``before`` is what it comes after, None for the first."""
    auto = options.auto
    eval_data = kept(eval_data)
    ready = prepared(model, data, options)
    settings = ready.settings
    if eval_data is not None and (before is None or not before.plans):
        require_measurable(model, eval_data, options)
    ignored = options.ignore
    if curvature is None:
        curvature, ignored = ready.curvature(model, ignored), ()
    require_loss(curvature, options.loss)
    if auto:
        chain = in_shots(
            model,
            ready.source(model, curvature, ignored),
            options.budget,
            settings,
            ready.timing,
            partial(ready.source_like, curvature, ignored),
            shots=options.shots,
            go_back=options.back,
        )
    else:
        with settings.clock.stage("plan"):
            plan = plan_of(model, curvature, ignored, options)
        chain = [built(model, Source(model, curvature, None), plan, settings)]
    last = chain[-1]
    again = not settings.repair if options.recalibrate is None else options.recalibrate
    anew = with_statistics_anew(last, ready) if again else None
    final = anew or last.model
    polished: nn.Module | None = None
    trained: TrainingReport | None = None
    if options.polish is not None and last.plan.changed:
        polished, trained = _polished(final, model, last, ready, options.polish)
        final = polished or final
    default_traces = 0 if auto else 64
    traces = options.calibration_examples
    return Compressed(
        model=final,
        plan=last.plan,
        curvature=curvature,
        report=report_of(
            model,
            chain,
            Versions(
                (before or Before(model)).original,
                (before.plans if before else ()),
                anew,
                polished,
                trained,
            ),
            eval_data,
            curvature,
            ready,
            traces=default_traces if traces is None else traces,
            budget=options.budget,
        ),
        earlier=tuple(shot.plan for shot in chain[:-1]),
        repairs=last.repairs,
    )


def check(options: Options) -> None:
    """Refuse options of `make_plan` that do not go together, and a seed that is none."""
    check_seed(options.seed)
    if (examples := options.calibration_examples) is not None and examples < 0:
        raise EigenDamageError(f"calibration_examples is {examples}; give 0 for no table")
    check_options(
        options.budget,
        method=options.method,
        variant=options.variant,
        max_ratio=options.max_ratio,
        form=options.form,
        damping=options.damping,
        rank_by=options.rank_by,
        multiple=options.multiple,
    )


def with_statistics_anew(built: Built, ready: Preparation) -> nn.Module | None:
    """What was built with its batch norms' statistics measured again; None if nothing changes."""
    if not built.plan.changed:
        return None
    with ready.settings.clock.stage("batch norm"):
        again = copy_model(built.model)
        norms = recalibrate_batchnorm(
            again,
            ready.data,
            max_examples=ready.options.max_examples,
            progress=ready.settings.progress,
        )
    return again if norms else None


def _polished(
    model: nn.Module, original: nn.Module, last: Built, ready: Preparation, config: PolishConfig
) -> tuple[nn.Module | None, TrainingReport]:
    """A copy that has learned from the original, on what the curvature saw; and how that went.

    None in its place where it is clearly worse on the held-out inputs.
    """
    settings = ready.settings
    assert settings.parts is not None
    with settings.clock.stage("polish"):
        learned = copy_model(model)
        done = polish(
            learned,
            original,
            settings.parts.fit,
            held_out=settings.parts.held_out,
            features=[name for name in repairable(last.plan) if name not in last.outputs],
            config=config,
            loss=settings.loss,
            seed=settings.seed,
            progress=settings.progress,
        )
    with_first_state(learned)
    before, after = done.scores[0], done.scores[done.best]
    if after > _TOLERATED * before:
        ready.notes.append(
            f"the polish was left out: on held-out inputs it raised the divergence from "
            f"{before:.3g} by {after - before:.2g}; lower its learning rate, or give more data"
        )
        return None, TrainingReport.of(done)
    return learned, TrainingReport.of(done)


def plan_of(
    model: nn.Module, curvature: Curvature, ignored: tuple[str, ...], options: Options
) -> Plan:
    """The plan of a round by another method than ``auto``."""
    return make_plan(
        model,
        curvature,
        options.budget,
        method=options.method,
        variant=options.variant,
        max_ratio=options.max_ratio,
        form=options.form,
        eigenvalues=options.eigenvalues if curvature.kind == "ekfac" else None,
        damping=options.damping,
        rank_by=options.rank_by,
        ignore=ignored,
        seed=options.seed,
    )
