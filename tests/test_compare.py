"""Comparisons: equal budgets, one curvature, resumable, drawn and printed."""

from __future__ import annotations

import importlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

import eigendamage as ed
from eigendamage.compare import ALL, Competitor
from eigendamage.layers import _dependencies
from eigendamage.plan import METHODS
from eigendamage.report import Comparison, Measured, Row, ranked
from tests.test_rounds import batches, network

FEW = ("kron-obs", "random", "obd", "eigendamage@2")


def run(out: Path | None = None, **options: object) -> Comparison:
    data = batches()
    chosen = {"methods": FEW, "budgets": (0.6,), "seed": 0, "progress": False, **options}
    return ed.compare(network(), data, eval_data=data, out=out, **chosen)


@pytest.fixture(scope="module")
def result() -> Comparison:
    """All of the few methods at two budgets."""
    torch.set_num_threads(1)
    return run(budgets=(0.7, 0.5))


def test_rows_meet_their_budgets_and_measure_what_compress_measures(result: Comparison) -> None:
    assert [(r.method, r.budget) for r in result.rows] == [(m, b) for b in (0.7, 0.5) for m in FEW]
    for row in result.rows:
        assert row.refused is None
        assert row.masks == (row.method == "obd")
        assert (row.macs or 0) <= (1 if row.masks else row.budget) + 1e-9
        assert (row.predicted is None) == (row.method in ("random", "eigendamage@2"))
    masked = result.find("obd", 0.5)
    assert masked is not None
    assert masked.macs == 1
    assert masked.parameters == pytest.approx(0.5, abs=0.05)
    data = batches()
    alone = ed.compress(
        network(), data, budget=ed.Budget(macs=0.5), method="kron-obs", progress=False
    )
    row = result.find("kron-obs", 0.5)
    assert row is not None
    assert row.surgery == alone.report.compressed
    assert row.predicted == pytest.approx(alone.report.predicted)


def test_auto_is_shown_repaired_where_others_are_right_after_surgery(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contest = importlib.import_module("eigendamage.compare._contest")
    cut, mended = Measured(loss=2.0), Measured(loss=1.0)

    def told(*args: object, **options: object) -> ed.Compressed:
        found = ed.compress(*args, **options)
        changed = {"compressed": cut}
        if found.report.repaired is not None:
            changed["repaired"] = mended
        return replace(found, report=found.report.model_copy(update=changed))

    monkeypatch.setattr(contest, "compress", told)
    auto, random = run(methods=("auto", "random")).rows
    assert auto.surgery == mended
    assert auto.recalibrated is None
    assert random.surgery == cut


def test_training_is_the_same_for_all_and_measured_apart() -> None:
    result = run(methods=("random", "eigendamage@2"), train_data=batches, epochs=2)
    again = run(methods=("random", "eigendamage@2"), train_data=batches, epochs=2)
    assert result.settings.train_batches == 4
    for row, same in zip(result.rows, again.rows, strict=True):
        assert row.tuned is not None
        assert row.tuned == same.tuned
        assert row.tuned != row.surgery


def test_a_second_run_does_only_what_is_missing(tmp_path: Path) -> None:
    done: list[Row] = []
    first = run(tmp_path, methods=FEW[:2], on_row=done.append)
    assert len(done) == 2
    second = run(tmp_path, methods=FEW[:3], on_row=done.append)
    assert [row.method for row in done] == list(FEW[:3])
    assert second.rows[:2] == first.rows
    assert Comparison.load(tmp_path / "comparison.json") == second
    assert [p.name for p in tmp_path.iterdir()] == ["comparison.json"]


def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path: Path) -> None:
    def interrupt(_row: Row) -> None:
        raise KeyboardInterrupt

    two = FEW[1:3]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, methods=two, on_row=interrupt)
    resumed, whole = run(tmp_path, methods=two), run(methods=two)
    strip = {"seconds": {}}
    assert [r.model_copy(update=strip) for r in resumed.rows] == [
        r.model_copy(update=strip) for r in whole.rows
    ]


def test_a_second_run_in_a_folder_is_refused_while_the_first_is_at_work(tmp_path: Path) -> None:
    meanwhile: list[str] = []

    def again(_row: Row) -> None:
        with pytest.raises(ed.FileError) as refused:
            run(tmp_path, methods=("random",))
        meanwhile.append(str(refused.value))

    first = run(tmp_path, methods=("random",), on_row=again)
    assert meanwhile[0].startswith(f"another run is at work in {tmp_path};")
    assert Comparison.load(tmp_path / "comparison.json") == first


def test_another_setting_is_not_mixed_in(tmp_path: Path) -> None:
    run(tmp_path, methods=("random",))
    with pytest.raises(ed.MismatchError, match="with seed 0, now it is 1"):
        run(tmp_path, methods=("random",), seed=1)
    other = network()
    with torch.no_grad():
        other[0].weight.add_(1)
    with pytest.raises(ed.MismatchError, match="with weights"):
        ed.compare(
            other,
            batches(),
            eval_data=batches(),
            methods=("random",),
            budgets=(0.6,),
            out=tmp_path,
            progress=False,
        )


def test_a_method_that_cannot_is_a_row_that_says_so() -> None:
    result = run(methods=("slimming", "random"), budgets=(0.01, 0.6))
    refused = result.find("random", 0.01)
    assert refused is not None
    assert "cannot be met" in (refused.refused or "")
    assert result.find("random", 0.6).refused is None
    assert [r.method for r in ranked(result, 0.01)] == ["slimming", "random"]


def test_a_model_whose_channels_cannot_be_traced_is_compared_by_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def crash(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(_dependencies, "_build", crash)
    result = run(methods=("kron-obs", "eigendamage", "obd"))
    channels, blocks, masks = result.rows
    assert "cannot tell which channels of Sequential go together" in (channels.refused or "")
    assert blocks.refused is None
    assert masks.refused is None


def test_other_data_is_another_comparison(tmp_path: Path) -> None:
    run(tmp_path, methods=("random",))
    scaled = [(3 * x, y) for x, y in batches()]
    for name, options in {
        "data": {"data": scaled, "eval_data": batches()},
        "eval_data": {"data": batches(), "eval_data": scaled},
    }.items():
        with pytest.raises(ed.MismatchError, match=f"with {name} '"):
            ed.compare(
                network(),
                options["data"],
                eval_data=options["eval_data"],
                methods=("random",),
                budgets=(0.6,),
                out=tmp_path,
                progress=False,
            )


def test_rounds_are_ranked_by_the_distance_from_the_original() -> None:
    unlabelled = [x for x, _ in batches()]
    result = ed.compare(
        network(),
        unlabelled,
        eval_data=unlabelled,
        methods=("eigendamage@2",),
        budgets=(0.4,),
        progress=False,
    )
    rounds = ed.compress(
        network(),
        unlabelled,
        budget=ed.Budget(macs=0.4),
        method="eigendamage",
        rounds=2,
        progress=False,
    )
    true = ed.evaluate(rounds.model, unlabelled, reference=network(), progress=False)
    assert result.rows[0].final is not None
    assert result.rows[0].final.divergence == pytest.approx(true.divergence)


def test_a_row_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ed.LayerError("conv", "something is wrong with it")

    contest = importlib.import_module("eigendamage.compare._contest")
    compress = contest.compress
    monkeypatch.setattr(
        contest, "compress", lambda *a, **k: fail() if k.get("rounds") else compress(*a, **k)
    )
    failed, fine = run(methods=("eigendamage@2", "random")).rows
    assert failed.refused == "layer 'conv': something is wrong with it"
    assert fine.refused is None


def test_dropout_draws_the_same_for_every_row_and_nothing_of_the_callers() -> None:
    model = network()
    model.insert(7, torch.nn.Dropout(0.5))
    data = batches()

    def tuned(*methods: str) -> dict[str, object]:
        before = torch.get_rng_state()
        result = ed.compare(
            model,
            data,
            eval_data=data,
            methods=methods,
            budgets=(0.6,),
            train_data=batches,
            epochs=1,
            progress=False,
        )
        assert torch.equal(before, torch.get_rng_state())
        return {row.method: row.tuned for row in result.rows}

    assert tuned("magnitude", "random")["random"] == tuned("random")["random"]


def test_generators_serve_every_row_and_every_round() -> None:
    data = batches()
    methods = ("random", "magnitude", "eigendamage@2")
    from_lists = run(methods=methods)
    from_generators = ed.compare(
        network(),
        (batch for batch in data),
        eval_data=(batch for batch in data),
        methods=methods,
        budgets=(0.6,),
        progress=False,
    )
    for one, other in zip(from_lists.rows, from_generators.rows, strict=True):
        assert one.final == other.final


def test_a_mask_of_the_users_is_no_pruned_weight() -> None:
    model = network()
    model.register_buffer("causal_mask", torch.ones(20, 20).tril())
    data = batches()
    row = ed.compare(
        model, data, eval_data=data, methods=("random",), budgets=(0.6,), progress=False
    ).rows[0]
    small = ed.compress(
        model, data, budget=ed.Budget(macs=0.6), method="random", progress=False
    ).model
    left = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    assert row.parameters == pytest.approx(left)


def test_what_is_named_twice_is_done_once() -> None:
    assert len(run(methods=("random", "random"), budgets=(0.6, 0.6)).rows) == 1


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    result = run(methods=("random",), budgets=(0.001,))
    with pytest.raises(ed.NothingToCompressError, match="nothing to draw"):
        ed.plot_comparison(result, tmp_path / "p.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"methods": ("magic",)}, "method 'magic' is unknown; known are auto, eigendamage"),
        ({"methods": ("kron-obs:magic",)}, "its variants are readers"),
        ({"methods": ("a b",)}, "the form is METHOD"),
        ({"methods": ("random@0",)}, "asks for 0 rounds"),
        ({"methods": ("obd@2",)}, "masks are set once"),
        ({"methods": ()}, "at least one method"),
        ({"budgets": (1.5,)}, "macs is 1.5"),
        ({"epochs": -1}, "epochs is -1"),
        ({"epochs": 1}, "there is no train_data"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    options: dict[str, object], said: str
) -> None:
    with pytest.raises(ed.EigenDamageError, match=said):
        run(**options)


def test_every_method_can_be_named() -> None:
    assert set(METHODS) <= set(ALL)
    for name in ALL:
        one = Competitor.of(name)
        assert one.method in METHODS
    assert Competitor.of("kron-obs:paper@3") == Competitor(
        "kron-obs:paper@3", "kron-obs", "paper", 3
    )


def test_the_table_and_the_plot(result: Comparison, tmp_path: Path) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    ed.print_comparison(result, console)
    said = console.export_text()
    assert said.count("kron-obs") == 2
    assert "70% of the MACs" in said
    best = min(
        (r for r in result.rows if r.budget == 0.5 and not r.masks), key=lambda r: r.final.loss
    )
    assert ranked(result, 0.5)[0] == best
    assert ranked(result, 0.5)[-1].method == "obd"
    ed.plot_comparison(result, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.size[0] > 600
        colors = {color for _, color in picture.convert("RGB").getcolors(2**24)}
        assert len([c for c in colors if max(c) - min(c) > 100]) > 2, "a line a method, coloured"
    ed.plot_comparison(result, tmp_path / "p.svg")
    assert "<svg" in (tmp_path / "p.svg").read_text(encoding="utf-8")


def test_the_document_round_trips_and_refuses_nonsense(tmp_path: Path) -> None:
    result = run(tmp_path, methods=("random",))
    raw = json.loads((tmp_path / "comparison.json").read_text())
    raw["rows"][0]["macs"] = "much"
    (tmp_path / "comparison.json").write_text(json.dumps(raw))
    with pytest.raises(ed.FileFormatError, match=r"rows\.0\.macs"):
        Comparison.load(tmp_path / "comparison.json")
    assert result.settings.model == "Sequential"
