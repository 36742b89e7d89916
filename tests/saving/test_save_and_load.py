"""What a saved folder has in it, what survives in it, and what is refused."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import eigendamage as ed
from eigendamage.files import written_together


def network(width: int = 6, *, bias: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=bias),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()


def images(n: int = 8) -> Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@functools.cache
def _curvature() -> ed.Curvature:
    also = ("patches", "channels", "gradients")
    return ed.estimate_curvature(network(), [images()], also=also, progress=False)


def smaller(method: str = "eigendamage", model: nn.Module | None = None) -> nn.Module:
    budget = ed.Budget(ratio=0.5) if method == "obd" else ed.Budget(params=0.6)
    plan = ed.make_plan(network(), _curvature(), budget, method=method)
    return ed.apply_plan(model or network(), plan, _curvature())


def assert_equal(found: nn.Module, expected: nn.Module) -> None:
    state = expected.state_dict()
    assert list(found.state_dict()) == list(state)
    for name, value in found.state_dict().items():
        assert value.dtype == state[name].dtype, name
        assert torch.equal(value, state[name]), name


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@functools.cache
def _compressed() -> ed.Compressed:
    data, budget = [*images(12).split(4)], ed.Budget(params=0.6)
    return ed.compress(network(), data, budget=budget, method="kron-obs", progress=False)


def test_a_result_is_saved_with_its_plan_and_report(tmp_path: Path) -> None:
    result = _compressed()
    ed.save(result, tmp_path / "deep" / "small")
    folder = tmp_path / "deep" / "small"
    told = ["plan.json", "report.html", "report.json"]
    assert files(folder) == ["model.safetensors", *told, "structure.json"]
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1  # whoever may read the report may read the weights
    assert ed.Plan.load(folder / "plan.json") == result.plan
    assert ed.Report.load(folder / "report.json") == result.report
    found = ed.load(network(), folder)
    assert_equal(found, result.model)
    # The model alone knows both, and so does a loaded one.
    for name, model in (("model", result.model), ("again", found)):
        ed.save(model, tmp_path / name)
        for file in files(folder):
            assert (tmp_path / name / file).read_bytes() == (folder / file).read_bytes()


def test_notes_survive_training_copies_and_use_of_a_part(tmp_path: Path) -> None:
    model = copy.deepcopy(_compressed().model)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    model(images()).square().sum().backward()
    optimizer.step()
    assert not any("origin" in key or "made" in key for key in model.state_dict())
    ed.save(copy.deepcopy(model), tmp_path / "all")
    assert_equal(ed.load(network(), tmp_path / "all"), model)
    assert (tmp_path / "all" / "report.json").exists()
    ed.save(model[:4], tmp_path / "part")
    assert_equal(ed.load(network()[:4], tmp_path / "part"), model[:4])
    ed.save(nn.ModuleDict({"inner": model}), tmp_path / "whole")
    whole = ed.load(nn.ModuleDict({"inner": network()}), tmp_path / "whole")
    assert_equal(whole["inner"], model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on compiling
def test_a_compiled_model_is_saved_as_the_one_that_it_is_of(tmp_path: Path) -> None:
    model = smaller()
    ed.save(torch.compile(model), tmp_path / "compiled")
    ed.save(model, tmp_path / "plain")
    for file in files(tmp_path / "plain"):
        assert (tmp_path / "compiled" / file).read_bytes() == (
            tmp_path / "plain" / file
        ).read_bytes()


def test_a_model_without_its_factored_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ed.LayerError, match=r"not what ed\.plain made of it"):
        ed.save(ed.plain(smaller()), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_result_is_one_line(tmp_path: Path) -> None:
    assert len(repr(_compressed())) < 150
    assert "kron-obs" in repr(_compressed())


def test_a_model_that_was_not_compressed_is_saved_as_well(tmp_path: Path) -> None:
    ed.save(network(), tmp_path)
    assert files(tmp_path) == ["model.safetensors", "structure.json"]
    other = network()
    with torch.no_grad():
        other[0].weight.zero_()
    assert_equal(ed.load(other, tmp_path), network())


def test_the_structure_says_forms_ranks_and_dropped_channels(tmp_path: Path) -> None:
    small = smaller("kron-obs")
    ed.save(small, tmp_path)
    found = ed.Structure.load(tmp_path / "structure.json").modules
    conv, norm, after = found["0"], found["1"], found["3"]
    assert len(conv.dropped_outputs) == 6 - small[0].out_channels > 0
    assert conv.dropped_outputs == norm.dropped_outputs == after.dropped_inputs
    ed.save(smaller(), tmp_path)
    found = ed.Structure.load(tmp_path / "structure.json").modules
    stages = found["3"].stages
    assert stages is not None
    factored = smaller()[3]
    assert (stages.form, *stages.ranks) == factored.layout
    assert [s.kernel for s in stages.layers] == [c.kernel_size for c in factored]
    assert [s.stride for s in stages.layers] == [c.stride for c in factored]


def test_dtype_layout_and_frozen_parameters(tmp_path: Path) -> None:
    original = network().bfloat16().to(memory_format=torch.channels_last)
    original[3].weight.requires_grad_(False)
    for method in ("eigendamage", "kron-obs", "obd"):
        small = smaller(method, original)
        ed.save(small, tmp_path)
        fresh = network()
        fresh[3].weight.requires_grad_(False)
        found = ed.load(fresh, tmp_path)
        assert_equal(found, small)
        for (name, value), expected in zip(
            found.named_parameters(), small.parameters(), strict=True
        ):
            assert value.stride() == expected.stride(), name
            assert value.requires_grad == expected.requires_grad, name


def test_masks_stay_masks(tmp_path: Path) -> None:
    small = smaller("obd")
    ed.save(small, tmp_path)
    found = ed.load(network(), tmp_path)
    assert torch.equal(found[3].weight, small[3].weight)  # before it has run
    assert bool((found[3].weight_mask == 0).any())
    torch.nn.utils.prune.remove(small[3], "weight")  # which puts the weight after the bias
    ed.save(small, tmp_path)
    found, state = ed.load(network(), tmp_path).state_dict(), small.state_dict()
    assert found.keys() == state.keys() >= {"3.weight", "0.weight_mask"}
    assert all(torch.equal(value, state[name]) for name, value in found.items())


class Tied(nn.Module):
    """Two names for one weight, a buffer that is saved and one that is not."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.inner = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5))
        self.head = nn.Linear(5, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((), 2.0))
        self.register_buffer("shift", torch.full((), 3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(x)) * self.scale + self.shift)


def test_ties_and_buffers(tmp_path: Path) -> None:
    model, x = Tied().eval(), torch.randint(0, 7, (6, 3))
    model.scale.fill_(5)
    result = ed.compress(
        model, [x], budget=ed.Budget(params=0.9), method="eigendamage", progress=False
    )
    ed.save(result, tmp_path)
    found = ed.load(Tied().eval(), tmp_path)
    assert found.head.weight is found.embed.weight
    assert "head.weight" not in load_file(tmp_path / "model.safetensors")
    assert_equal(found, result.model)
    assert torch.equal(found(x), result.model(x))
    # An original that is not tied gets the weight twice; one that is tied cannot have two.
    assert_equal(ed.load(Tied(tied=False), tmp_path), result.model)
    ed.save(Tied(tied=False), tmp_path)
    with pytest.raises(ed.FileFormatError, match=r"'head.weight' and 'embed.weight' are one"):
        ed.load(Tied(), tmp_path)


def test_the_original_may_be_on_no_device(tmp_path: Path) -> None:
    small = smaller()
    ed.save(small, tmp_path)
    with torch.device("meta"):
        original, tied = network(), Tied()
    assert_equal(ed.load(original, tmp_path), small)
    assert_equal(ed.load(original, tmp_path, device="cpu"), small)
    ed.save(Tied(), tmp_path)
    with pytest.raises(ed.MismatchError, match=r"buffer 'shift'.*build the model on the CPU"):
        ed.load(tied, tmp_path)


def test_another_model_is_refused_by_the_first_name_that_does_not_fit(tmp_path: Path) -> None:
    ed.save(smaller(), tmp_path)
    for model, message in (
        (network(7), r"'0.weight' .* shape \(7, 3, 3, 3\), .* had \(6, 3, 3, 3\)"),
        (network(bias=True), r"the model has '0.bias' of shape \(6,\)"),
        (network()[:-1], r"no '7.weight', .* of shape \(4, 8\)"),
        (smaller(), r"the model has '3.0.weight'.*before it was compressed"),
        (nn.LazyLinear(3), "'weight' of the model has no shape yet"),
    ):
        with pytest.raises(ed.MismatchError, match=message):
            ed.load(model, tmp_path)
    strided = network()
    strided[3].stride = (1, 1)
    with pytest.raises(ed.MismatchError, match=r"'3' of the model reads by .*stride=\(1, 1\)"):
        ed.load(strided, tmp_path)


Edit = Callable[[dict[str, Any]], object]
EDITS: dict[str, tuple[Edit, str]] = {
    "version": (lambda s: s.update(version=2), "version"),
    "no version": (lambda s: s.pop("version"), "says no version"),
    "unknown field": (lambda s: s.update(code="import os"), "code"),
    "a number as text": (lambda s: s["original"].update({"0.weight": ["6", 3, 3, 3]}), "original"),
    "a shape below zero": (lambda s: s["original"].update({"0.weight": [-6, 3]}), "original"),
    "no such module": (lambda s: s["modules"].update({"9.no": {}}), "'9.no' is no module"),
    "rank below zero": (lambda s: _stage(s)["layers"][0].update(outputs=-2), "outputs"),
    "rank too large": (lambda s: _stage(s)["layers"][0].update(outputs=10**30), "outputs"),
    "a huge rank": (lambda s: _widen(s, 2**31 - 1), r"'3\.0\.weight' in .* has shape"),
    "another rank": (lambda s: _widen(s, 1), r"'3\.0\.weight' in .* has shape"),
    "stages that do not meet": (
        lambda s: _stage(s)["layers"][0].update(outputs=1),
        "the stages of '3' do not fit",
    ),
    "ranks that are not theirs": (lambda s: _stage(s).update(ranks=[1, 1]), "is said to be"),
    "stages of another kind": (
        lambda s: s["modules"].update({"7": {"stages": _stage(s)}}),
        "'7' is a Linear",
    ),
    "a channel that is not there": (
        lambda s: s["modules"]["3"].update(dropped_outputs=[99]),
        "'3' drops are not distinct ones below 8",
    ),
    "a channel too few": (
        lambda s: s["modules"]["3"].update(dropped_outputs=[1]),
        r"'3' cannot have the form.*stages have \(8, 6\)",
    ),
    "no channel left": (
        lambda s: s["modules"].update({"1": {"dropped_outputs": list(range(6))}}),
        "'1' cannot have the form that is saved.*no output channel would be left",
    ),
    "channels of what has none": (
        lambda s: s["modules"].update({"2": {"dropped_outputs": [0]}}),
        "'2' cannot have the form that is saved.*ReLU",
    ),
    "a bias twice": (
        lambda s: s["modules"].update({"7": {"added_bias": True}}),
        "'7' cannot be given a bias",
    ),
    "a mask of nothing": (
        lambda s: s["modules"].update({"2": {"masked": True}}),
        "'2' cannot have the form that is saved",
    ),
    "a mask of a layer of several stages": (
        lambda s: s["modules"]["3"].update(masked=True),
        "'3' is a FactoredConv2d without a weight of its own",
    ),
    "an attribute that is no count": (
        lambda s: s["modules"].update({"7": {"counts": {"out_features": [4, 3]}}}),
        "'out_features' of '7' is said to follow what goes, which is known of num_heads, ",
    ),
    "a count that is not there": (
        lambda s: s["modules"].update({"2": {"counts": {"num_heads": [0, 1]}}}),
        "'num_heads' of '2' is None",
    ),
    "a tie of no tensor": (
        lambda s: s["ties"].update({"8.bias": "7.bias"}),
        "ties of the structure name '8.bias'",
    ),
    "a tie with no tensor": (
        lambda s: s["ties"].update({"7.bias": "8.bias"}),
        "ties of the structure name '8.bias'",
    ),
    "a layout of no tensor": (
        lambda s: s["layouts"].update({"8.weight": [1, 4]}),
        "layouts of the structure name '8.weight'",
    ),
    "strides that overlap": (
        lambda s: s["layouts"].update({"7.weight": [1, 1]}),
        "the layout of '7.weight'",
    ),
    "a tie that is none": (
        lambda s: s["ties"].update({"7.bias": "1.bias"}),
        r"'1\.bias' in .* has shape \(6,\)",
    ),
}


def _stage(structure: dict[str, Any]) -> dict[str, Any]:
    return structure["modules"]["3"]["stages"]


def _widen(structure: dict[str, Any], rank: int) -> None:
    stages = _stage(structure)
    first, second, *_ = stages["layers"]
    first["outputs"] = second["inputs"] = rank
    stages["ranks"][0 if stages["form"] == "merge_in" else 1] = rank


@pytest.mark.parametrize("what", list(EDITS))
def test_a_structure_that_was_tampered_with_is_refused(what: str, tmp_path: Path) -> None:
    edit, message = EDITS[what]
    ed.save(smaller(), tmp_path)
    path = tmp_path / "structure.json"
    structure = json.loads(path.read_text())
    edit(structure)
    path.write_text(json.dumps(structure))
    model = network()
    before, text = copy.deepcopy(model.state_dict()), repr(model)
    with pytest.raises((ed.FileFormatError, ed.MismatchError), match=message):
        ed.load(model, tmp_path)
    assert repr(model) == text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_that_were_tampered_with_are_refused(tmp_path: Path) -> None:
    ed.save(smaller(), tmp_path)
    path = tmp_path / "model.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ed.FileFormatError, match="is not a whole safetensors file"):
            ed.load(network(), tmp_path)
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != "7.bias"}, "has no '7.bias'"),
        ({**tensors, "8.weight": torch.ones(2)}, "has '8.weight', which the model has not"),
        ({**tensors, "7.bias": torch.ones(5)}, r"'7.bias' in .* shape \(5,\), .* \(4,\)"),
        ({**tensors, "7.bias": torch.ones(4, dtype=torch.int64)}, "'7.bias' in .* is torch.int64"),
    ):
        save_file(changed, path)
        with pytest.raises(ed.FileFormatError, match=message):
            ed.load(network(), tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        ed.load(network(), tmp_path)
    for text in ("", "{", "[]", "[" * 100_000):
        (tmp_path / "structure.json").write_text(text)
        with pytest.raises(ed.FileFormatError, match="structure"):
            ed.load(network(), tmp_path)


NO_DOCUMENT = ["", "{", "[]", "7", '{"version": 1, "layers": 7}', "\xff"]


@pytest.mark.parametrize("text", NO_DOCUMENT)
def test_a_damaged_report_or_plan_is_warned_of_and_left_out(text: str, tmp_path: Path) -> None:
    result = _compressed()
    for name, plan in (("report.json", result.plan), ("plan.json", None)):
        ed.save(result, tmp_path)
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        with pytest.warns(UserWarning, match=f"{name} is not a .*The model is whole"):
            found = ed.load(network(), tmp_path)
        assert_equal(found, result.model)
        ed.save(found, tmp_path / "again")
        kept = tmp_path / "again" / "plan.json"
        assert (ed.Plan.load(kept) if kept.exists() else None) == plan
        assert not (tmp_path / "again" / "report.json").exists()


_OTHER_PLANS = [
    ("eigendamage", "kron-obs", r"leaves \d+ outputs and \d+ inputs of layer '\d', the model has"),
    ("kron-obs", "eigendamage", r"leaves \d+ outputs and \d+ inputs of layer '\d', the model has"),
    ("eigendamage", "obd", r"layer '\d' is factored in the model, the plan has it as mask"),
    ("obd", "eigendamage", r"layer '\d' is masked in the model, the plan has it as eigenblock"),
    ("eigendamage", "eigendamage-dw", r"factored by ranks .* as depthwise of ranks (\d+), \1"),
    ("auto", "eigendamage", r"layer '\d', the model has"),
]


@pytest.mark.parametrize(("method", "other", "words"), _OTHER_PLANS)
def test_a_plan_of_another_method_is_warned_of_and_left_out(
    method: str, other: str, words: str, tmp_path: Path
) -> None:
    model = smaller(method)
    ed.save(model, tmp_path / "one")
    ed.save(smaller(other), tmp_path / "other")
    plan = (tmp_path / "other" / "plan.json").read_bytes()
    (tmp_path / "one" / "plan.json").write_bytes(plan)
    with pytest.warns(UserWarning, match=rf"plan\.json, of method '{other}', .*{words}.* whole"):
        found = ed.load(network(), tmp_path / "one")
    assert_equal(found, model)
    ed.save(found, tmp_path / "again")
    assert files(tmp_path / "again") == ["model.safetensors", "structure.json"]


def test_a_plan_of_layers_that_the_model_has_not_is_warned_of(tmp_path: Path) -> None:
    model = smaller()
    ed.save(model, tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["layers"] = {f"body.{name}": layer for name, layer in plan["layers"].items()}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.warns(UserWarning, match=r"layer 'body\.0' of the plan is not in Sequential"):
        assert_equal(ed.load(network(), tmp_path), model)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: smaller("kron-obs"), r"leaves \d+ outputs and \d+ inputs of layer '\d' of shape"),
        (lambda: _of_width(10), r"layer '0' of shape \(10, 3, 9\), .* unchanged, of .*\(6, 3, 9\)"),
    ],
)
def test_a_plan_of_other_sizes_is_warned_of_where_all_layers_are_plain_again(
    other: Callable[[], nn.Module], words: str, tmp_path: Path
) -> None:
    plain = ed.densify(smaller())
    ed.save(plain, tmp_path / "one")
    ed.save(other(), tmp_path / "other")
    (tmp_path / "one" / "plan.json").write_bytes((tmp_path / "other" / "plan.json").read_bytes())
    with pytest.warns(UserWarning, match=rf"is of another model: .*{words}"):
        assert_equal(ed.load(network(), tmp_path / "one"), plain)


def test_a_new_classifier_leaves_the_plan_as_it_was(tmp_path: Path) -> None:
    def with_classifier(model: nn.Module) -> nn.Module:
        model[7] = nn.Linear(8, 9)
        return model

    for number, model in enumerate((smaller(), ed.densify(smaller()))):
        ed.save(with_classifier(model), tmp_path / f"{number}")
        ed.save(
            ed.load(with_classifier(network()), tmp_path / f"{number}"),
            tmp_path / f"{number}-again",
        )
        assert "plan.json" in files(tmp_path / f"{number}-again")


def _of_width(width: int) -> nn.Module:
    model, budget = network(width, bias=True), ed.Budget(params=0.6)
    curvature = ed.estimate_curvature(model, [images()], progress=False)
    plan = ed.make_plan(model, curvature, budget, method="eigendamage")
    return ed.apply_plan(model, plan, curvature)


def _other_report(change: str) -> ed.Report:
    """That of another model, or that of a twin of which a layer has another price."""
    report = _compressed().report
    if change == "model":
        layers = {f"body.{name}": layer for name, layer in report.layers.items()}
    else:
        priced = {"price": {"price": 7.0}, "parameters": {"parameters": (99, 98)}}[change]
        layers = {**report.layers, "3": report.layers["3"].model_copy(update=priced)}
    return report.model_copy(update={"layers": layers})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model", r"layer '0' of the plan is not in the report"),
        ("price", r"of layer '3' the report says a price of 7\.0, the plan"),
        ("parameters", r"of layer '3' the report says parameters left of 98, the plan"),
    ],
)
def test_a_report_of_another_model_is_warned_of_and_left_out(
    change: str, words: str, tmp_path: Path
) -> None:
    result = _compressed()
    ed.save(result, tmp_path / "one")
    _other_report(change).save(tmp_path / "one" / "report.json")
    with pytest.warns(UserWarning, match=rf"not of the plan beside it: {words}.*knows its plan"):
        found = ed.load(network(), tmp_path / "one")
    assert_equal(found, result.model)
    ed.save(found, tmp_path / "again")
    assert files(tmp_path / "again") == ["model.safetensors", "plan.json", "structure.json"]


@pytest.mark.parametrize("method", ["eigendamage", "kron-obs", "obd", "auto"])
def test_a_plan_stays_where_layers_were_made_plain_again(method: str, tmp_path: Path) -> None:
    plain = ed.densify(smaller(method))
    for module in plain.modules():
        if nn.utils.prune.is_pruned(module) and hasattr(module, "weight_mask"):
            nn.utils.prune.remove(module, "weight")
    ed.save(plain, tmp_path / "one")
    ed.save(ed.load(network(), tmp_path / "one"), tmp_path / "two")
    assert "plan.json" in files(tmp_path / "two")


def test_a_report_without_its_plan_is_left_out_and_one_alone_may_be_missing(tmp_path: Path) -> None:
    result = _compressed()
    ed.save(result, tmp_path)
    (tmp_path / "plan.json").unlink()
    with pytest.warns(UserWarning, match=r"report\.json belongs to a plan, .* no plan\.json"):
        assert_equal(ed.load(network(), tmp_path), result.model)
    (tmp_path / "report.json").unlink()
    assert_equal(ed.load(network(), tmp_path), result.model)
    (tmp_path / "plan.json").mkdir()
    with pytest.warns(UserWarning, match=r"plan\.json"):
        assert_equal(ed.load(network(), tmp_path), result.model)


def test_what_cannot_be_saved_is_refused_and_leaves_no_folder(tmp_path: Path) -> None:
    small = smaller()
    nn.utils.parametrizations.weight_norm(small[3][0])
    with pytest.raises(ed.LayerError, match=r"'3\.0'.*parametrizations"):
        ed.save(small, tmp_path / "small")

    class Stateful(nn.Linear):
        def get_extra_state(self) -> object:
            return {"calls": 1}

        def set_extra_state(self, state: object) -> None:
            raise AssertionError

    with pytest.raises(ed.EigenDamageError, match="_extra_state"):
        ed.save(Stateful(2, 2), tmp_path / "small")
    sparse = nn.Module()
    sparse.register_buffer("scale", torch.eye(2).to_sparse())
    with pytest.raises(ed.EigenDamageError, match=r"'scale' is .*sparse"):
        ed.save(sparse, tmp_path / "small")
    with pytest.raises(ed.EigenDamageError, match="'weight' is on the meta device"):
        ed.save(nn.Linear(2, 2, device="meta"), tmp_path / "small")
    assert files(tmp_path) == []


def test_a_folder_appears_whole_and_files_of_others_stay(tmp_path: Path) -> None:
    folder = tmp_path / "small"

    def stop() -> None:
        with written_together(folder, ["a"]) as beside:
            (beside / "a").write_text("half")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        stop()
    assert files(tmp_path) == []
    ed.save(_compressed(), folder)
    (folder / "notes.txt").write_text("mine")
    ed.save(network(), folder)  # which has neither plan nor report
    assert files(folder) == ["model.safetensors", "notes.txt", "structure.json"]
    assert files(tmp_path) == ["small"]
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        ed.save(network(), tmp_path / "file")


def test_products_of_narrow_numbers_are_rounded_once() -> None:
    small = smaller().half()
    dense = ed.densify(small)
    wide = copy.deepcopy(small[3]).double().weight
    assert dense[3].weight.dtype == torch.float16
    assert torch.equal(dense[3].weight, wide.half())
    assert any(isinstance(m, ed.FactoredConv2d) for m in small.modules())
