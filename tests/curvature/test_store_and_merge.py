"""A curvature on disk, and two of them together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eigendamage import (
    Curvature,
    FileFormatError,
    MismatchError,
    calibration_table,
    estimate_curvature,
    load_curvature,
    save_curvature,
)
from tests.cases import CASES, Case
from tests.reference import fisher_trace


def _curvature(name: str = "mixed", **options: object) -> Curvature:
    case = CASES[name]
    x, y = case.data(12)
    return estimate_curvature(case.model(), [(x, y)], progress=False, **options)


def test_round_trip_is_exact(case: Case, tmp_path: Path) -> None:
    x, y = case.data(6)
    before = estimate_curvature(case.model(), [(x, y)], progress=False)
    save_curvature(before, tmp_path / "c.safetensors")
    after = load_curvature(tmp_path / "c.safetensors")
    assert list(after) == list(before)
    assert after.left_alone == before.left_alone
    assert (after.macs, after.classifier, after.kind) == (
        before.macs,
        before.classifier,
        before.kind,
    )
    for name in before:
        for what in ("S", "A", "mean", "Q_S", "Q_A", "eigenvalues"):
            assert torch.equal(getattr(before[name], what), getattr(after[name], what))
        assert before[name].shape == after[name].shape
        assert before[name].examples == after[name].examples
    assert list(tmp_path.iterdir()) == [tmp_path / "c.safetensors"]


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_curvature(_curvature(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileFormatError, match="not a whole safetensors file"):
        load_curvature(path)


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(FileFormatError, match="not a saved curvature"):
        load_curvature(path)
    save_file({"weight": torch.zeros(2)}, path, metadata={"curvature": '{"version": 99}'})
    with pytest.raises(FileFormatError, match="version 99"):
        load_curvature(path)
    save_file({"weight": torch.zeros(2)}, path, metadata={"curvature": '{"version": 1}'})
    with pytest.raises(FileFormatError, match="broken curvature header"):
        load_curvature(path)


@pytest.mark.parametrize("broken", ["S", "Q_S", "eigenvalues"])
def test_a_curvature_with_impossible_numbers_is_refused(tmp_path: Path, broken: str) -> None:
    good = _curvature("fc")
    change = {
        "S": torch.full_like(good["0"].S, float("nan")),
        "Q_S": 2 * good["0"].Q_S,
        "eigenvalues": -good["0"].eigenvalues,
    }
    bad = replace(good, layers={**good.layers, "0": replace(good["0"], **{broken: change[broken]})})
    save_curvature(bad, tmp_path / "c.safetensors")
    with pytest.raises(FileFormatError, match=f"'{broken}' of layer '0'"):
        load_curvature(tmp_path / "c.safetensors")


def test_a_missing_folder_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        save_curvature(_curvature(), tmp_path / "none" / "c.safetensors")
    assert list(tmp_path.iterdir()) == []


def _shards(name: str) -> tuple[Case, list[tuple[torch.Tensor, torch.Tensor]]]:
    case = CASES[name]
    x, y = case.data(12)
    return case, [(x[:5], y[:5]), (x[5:], y[5:])]


@pytest.mark.parametrize("name", ["fc", "tokens", "mixed", "shared"])
def test_shards_in_one_basis_merge_exactly(name: str) -> None:
    case, shards = _shards(name)
    model = case.model()

    def run(data: object, **options: object) -> Curvature:
        return estimate_curvature(model, data, fisher="empirical", progress=False, **options)

    whole = run(shards)
    factors = run([shards[0]], eigenvalues="kfac").merge(run([shards[1]], eigenvalues="kfac"))
    parts = [run([shard], basis=factors) for shard in shards]
    merged = parts[0].merge(parts[1])
    assert merged.examples == 12
    for n in whole:
        torch.testing.assert_close(factors[n].S, whole[n].S)
        torch.testing.assert_close(factors[n].A, whole[n].A)
        torch.testing.assert_close(merged[n].eigenvalues.sum(), whole[n].eigenvalues.sum())
        # In one basis λ is a mean over examples, entry by entry.
        alone = run(shards, basis=factors)
        torch.testing.assert_close(merged[n].eigenvalues, alone[n].eigenvalues)


def test_shards_in_their_own_bases_keep_factors_and_trace() -> None:
    case, shards = _shards("mixed")
    parts = [
        estimate_curvature(case.model(), [s], fisher="empirical", progress=False) for s in shards
    ]
    whole = estimate_curvature(case.model(), shards, fisher="empirical", progress=False)
    merged = parts[0].merge(parts[1])
    for n in whole:
        torch.testing.assert_close(merged[n].S, whole[n].S)
        torch.testing.assert_close(merged[n].A, whole[n].A)
        torch.testing.assert_close(merged[n].eigenvalues.sum(), whole[n].eigenvalues.sum())
        assert merged[n].positions == whole[n].positions


def test_curvatures_that_do_not_belong_together_do_not_merge() -> None:
    with pytest.raises(MismatchError, match="different models"):
        _curvature("mixed").merge(_curvature("fc"))
    with pytest.raises(MismatchError, match="fisher"):
        _curvature().merge(_curvature(fisher="empirical"))
    with pytest.raises(MismatchError, match="kind"):
        _curvature().merge(_curvature(eigenvalues="kfac"))


def test_calibration_table(case: Case) -> None:
    model, (x, y) = case.model(), case.data(8)
    curvature = estimate_curvature(model, [(x, y)], fisher="exact", progress=False)
    rows = calibration_table(model, [(x, y)], curvature, examples=8)
    assert [r.layer for r in rows] == list(curvature)
    for row in rows:
        weight = model.get_submodule(row.layer).weight
        assert row.exact == pytest.approx(fisher_trace(model, weight, x), rel=1e-9)
        assert row.ekfac == pytest.approx(row.exact, rel=1e-9)
        c = curvature[row.layer]
        kfac = float(c.S.trace() * c.A.trace() * c.shape.offsets)
        assert row.kfac == pytest.approx(kfac, rel=1e-9)
