"""Compressed models of transformers, written and read in transformers' own format."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import eigendamage as ed
from eigendamage.errors import MissingFileError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from eigendamage.integrations.huggingface import (  # noqa: E402
    from_pretrained,
    plain_linears,
    save_pretrained,
)
from tests.integrations.test_huggingface import (  # noqa: E402
    bert,
    gpt2,
    image_data,
    llama,
    token_data,
    vit,
)

MODELS: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "llama": (lambda: llama(tie_word_embeddings=True), token_data(), "causal_lm"),
    "gpt2": (lambda: plain_linears(gpt2()), token_data(), "causal_lm"),
    "bert": (bert, token_data(), "cross_entropy"),
    "vit": (vit, [{"pixel_values": x} for x in image_data()], "cross_entropy"),
}


def _smaller(name: str, method: str) -> nn.Module:
    make, data, loss = MODELS[name]
    model = make()
    also = ("patches", "channels")
    curvature = ed.estimate_curvature(model, data, loss=loss, also=also, progress=False)
    plan = ed.make_plan(
        model,
        curvature,
        ed.Budget(params=0.75),
        method=method,
        **({"refine": 0} if method == "auto" else {}),
    )
    assert plan.changed
    return ed.apply_plan(model, plan, curvature)


@pytest.mark.parametrize("method", ["auto", "eigendamage", "kron-obs"])
@pytest.mark.parametrize("name", list(MODELS))
def test_what_is_read_is_what_was_written(name: str, method: str, tmp_path: Path) -> None:
    small = _smaller(name, method)
    save_pretrained(small, tmp_path / "small")
    assert not hasattr(small.config, "eigendamage")
    found = from_pretrained(tmp_path / "small")
    assert type(found) is type(small)
    state = small.state_dict()
    assert list(found.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in found.state_dict().items())
    first = MODELS[name][1][0]
    assert torch.equal(found(**first).logits, small(**first).logits)
    assert not hasattr(found.config, "eigendamage")
    if name == "llama":
        assert found.lm_head.weight is found.model.embed_tokens.weight
    # What was read can be written again, by either way.
    ed.save(found, tmp_path / "again")
    again = ed.load(MODELS[name][0](), tmp_path / "again")
    assert torch.equal(again(**first).logits, small(**first).logits)


def test_heads_that_went_are_counted(tmp_path: Path) -> None:
    make, data, loss = MODELS["gpt2"]
    model = make()
    curvature = ed.estimate_curvature(
        model, data, loss=loss, also=("patches", "channels"), ignore=["*mlp*"], progress=False
    )
    plan = ed.make_plan(model, curvature, ed.Budget(params=0.9), method="kron-obs")
    assert plan.counters
    small = ed.apply_plan(model, plan, curvature)
    save_pretrained(small, tmp_path)
    found = from_pretrained(tmp_path)
    for counter in plan.counters:
        assert getattr(found.get_submodule(counter.module), counter.attribute) == counter.after
    structure = json.loads((tmp_path / "config.json").read_text())["eigendamage"]
    assert any(form["counts"] for form in structure["modules"].values())


def test_dense_again_transformers_itself_reads_it(tmp_path: Path) -> None:
    small = _smaller("bert", "eigendamage")
    assert any(isinstance(m, ed.FactoredLinear) for m in small.modules())
    ed.densify(small).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    first = token_data()[0]
    torch.testing.assert_close(theirs(**first).logits, small(**first).logits)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    small = _smaller("bert", "kron-obs")
    bert().save_pretrained(tmp_path / "plain")
    with pytest.raises(ed.FileFormatError, match="says nothing of 'eigendamage'"):
        from_pretrained(tmp_path / "plain")
    save_pretrained(small, tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    wider = copy.deepcopy(config) | {"intermediate_size": 30}
    (tmp_path / "small" / "config.json").write_text(json.dumps(wider))
    with pytest.raises(ed.MismatchError, match=r"dense.weight.*\(30, 16\).*\(24, 16\)"):
        from_pretrained(tmp_path / "small")
    broken = copy.deepcopy(config)
    broken["eigendamage"]["modules"] = {"nowhere": {"masked": "yes"}}
    (tmp_path / "small" / "config.json").write_text(json.dumps(broken))
    with pytest.raises(ed.FileFormatError, match=r"eigendamage\.modules\.nowhere\.masked"):
        from_pretrained(tmp_path / "small")
    (tmp_path / "small" / "config.json").write_text(
        json.dumps(config | {"architectures": ["pipeline"]})
    )
    with pytest.raises(ed.FileFormatError, match=r"names 'pipeline', .* no model .*; give cls="):
        from_pretrained(tmp_path / "small")
    with pytest.raises(ed.EigenDamageError, match="no model of transformers"):
        save_pretrained(nn.Linear(2, 2), tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "part-2.safetensors"])
def test_a_file_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    save_pretrained(_smaller("bert", "kron-obs"), tmp_path)
    if name.startswith("part"):
        weights = {"classifier.weight": "model.safetensors", "classifier.bias": name}
        index = json.dumps({"weight_map": weights})
        (tmp_path / "model.safetensors.index.json").write_text(index)
    (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(MissingFileError, match=f"no {name} in .*; give the folder"):
        from_pretrained(tmp_path)
