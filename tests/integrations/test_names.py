"""Models by name."""

from __future__ import annotations

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import eigendamage as ed
from eigendamage.cli._sources import load_model
from eigendamage.errors import MissingFileError
from eigendamage.integrations import huggingface
from eigendamage.integrations.names import has_random_weights

_LIBRARIES = {"timm": "timm", "torchvision": "torchvision", "hf": "transformers"}
_KINDS = [
    pytest.param(
        kind, marks=pytest.mark.skipif(find_spec(kind) is None, reason=f"{kind} is not installed")
    )
    for kind in ("timm", "torchvision")
]


@pytest.mark.parametrize("kind", _KINDS)
def test_models_of_other_libraries_go_by_name(kind: str) -> None:
    torch.manual_seed(0)
    model = ed.get_model(f"{kind}:resnet18")
    assert not model.training
    assert type(model).__module__.startswith(kind)
    assert has_random_weights(f"{kind}:resnet18")
    assert len(ed.find_layers(model).compressible) == 21
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)
    with pytest.raises(ed.EigenDamageError, match="no model 'resnet1_8'"):
        ed.get_model(f"{kind}:resnet1_8")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_come_from_a_file(suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    trained = ed.zoo.resnet20().state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(trained, path)
    else:
        save_file(trained, path)
    model = ed.get_model("zoo:resnet20", weights=path)
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    assert not has_random_weights("zoo:resnet20", weights=path)
    assert has_random_weights("zoo:resnet20")
    assert not has_random_weights("zoo:demo_network")
    assert not has_random_weights("mine:net")
    assert not has_random_weights("timm:resnet18", pretrained=True)


def test_code_in_a_file_of_weights_is_not_run(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(ed.FileFormatError, match="weights alone"):
        ed.get_model("zoo:resnet20", weights=tmp_path / "model.pt")


def test_a_folder_of_transformers_is_read_as_its_configuration_says(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    torch.manual_seed(0)
    saved = transformers.GPT2LMHeadModel(config).eval()
    saved.save_pretrained(tmp_path / "gpt2")
    model = ed.get_model(f"hf:{tmp_path / 'gpt2'}")
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert any(isinstance(m, nn.Linear) for n, m in model.named_modules() if n.endswith("c_fc"))
    ids = torch.arange(12).view(1, 12)
    torch.testing.assert_close(model(ids).logits, saved(ids).logits)

    (tmp_path / "gpt2" / "model.safetensors").unlink()
    torch.save(saved.state_dict(), tmp_path / "gpt2" / "pytorch_model.bin")
    with pytest.raises(ed.FileFormatError, match="cannot be read as GPT2LMHeadModel"):
        ed.get_model(f"hf:{tmp_path / 'gpt2'}")
    with pytest.raises(ed.FileFormatError, match="cannot be read"):
        ed.get_model(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    "path", ["{folder}/absent", "./absent", "../absent/model", "~no-user-9/absent"]
)
def test_a_folder_that_is_not_there_is_not_looked_for_elsewhere(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface, "required", None)  # what reads models is not asked for
    path = path.format(folder=tmp_path)
    with pytest.raises(MissingFileError, match=re.escape(f"there is no folder '{path}'")):
        ed.get_model(f"hf:{path}")


def test_a_folder_in_the_home_folder_goes_by_its_short_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    words = f"hf:~/small: there is no folder '{tmp_path / 'small'}'"
    with pytest.raises(MissingFileError, match=re.escape(words)):
        ed.get_model("hf:~/small")
    pytest.importorskip("transformers")
    (tmp_path / "small").mkdir()
    with pytest.raises(ed.FileFormatError, match=re.escape(f"hf:{tmp_path / 'small'}")):
        ed.get_model("hf:~/small")  # it is found, and has no configuration


def test_weights_that_a_file_of_transformers_lacks_are_not_drawn_at_random(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=50, intermediate_size=16, **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path)
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(tmp_path)
    said = r"lacks 2 weights of BertForS.* \('classifier.bias', 'classifier.weight'\)"
    with pytest.raises(ed.MismatchError, match=said):
        ed.get_model(f"hf:{tmp_path}")


def test_weights_that_a_model_of_transformers_does_not_take_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    saved = transformers.GPT2LMHeadModel(config)
    saved.save_pretrained(tmp_path)
    name, path = f"hf:{tmp_path}", tmp_path / "model.safetensors"
    assert "lm_head.weight" not in load_file(path)  # tied, so it is not missing
    ed.get_model(name)
    more = {f"extra.{index}": torch.ones(2) for index in range(4)}
    save_file({**load_file(path), **more}, path, metadata={"format": "pt"})
    said = "has 4 weights that GPT2LMHeadModel does not take ('extra.0', 'extra.1', 'extra.2', …)"
    with pytest.warns(UserWarning, match=re.escape(said)):
        ed.get_model(name)
    capsys.readouterr()
    load_model(name, None)
    (note,) = (line for line in capsys.readouterr().err.splitlines() if "note: " in line)
    assert note.startswith("note: hf:")
    assert said in note
    load_model(name, None, quiet=True)
    assert "note: " not in capsys.readouterr().err


def test_warnings_of_a_model_s_own_are_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "warner.py").write_text(
        "import warnings, torch\n"
        "def net():\n"
        "    warnings.warn('old weights')\n"
        "    return torch.nn.Linear(2, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="old weights") as told:
        model = load_model("warner:net", None)
    assert isinstance(model, torch.nn.Linear)
    assert len(told) == 1


@pytest.mark.parametrize("name", ["pipeline", "BertTokenizer", "BertConfig", "utils", "AutoModel"])
def test_what_a_configuration_names_has_to_be_a_model_of_transformers(
    name: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(architectures=[name])
    config.save_pretrained(tmp_path)
    with pytest.raises(ed.FileFormatError, match=f"names '{name}', which is no model .*callable"):
        ed.get_model(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", "abc"), ("num_attention_heads", 0), ("architectures", ["BertModel"])],
)
def test_a_configuration_that_makes_no_model_is_refused(
    field: str, value: object, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=8,
        architectures=["LlamaForCausalLM"],
    )
    said = {**config.to_dict(), field: value}
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(ed.FileFormatError):
        ed.get_model(f"hf:{tmp_path}")


def test_a_configuration_without_a_class_or_with_an_unknown_one_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for names, found in ((None, "names no architecture"), (["BertNot"], "'BertNot', which .* not")):
        transformers.BertConfig(architectures=names).save_pretrained(tmp_path)
        with pytest.raises(ed.FileFormatError, match=found):
            ed.get_model(f"hf:{tmp_path}")


@pytest.mark.parametrize("kind", _LIBRARIES)
def test_a_missing_package_is_named_with_its_extra(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = _LIBRARIES[kind]
    for name in [n for n in sys.modules if n.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    extra = {"hf": "huggingface"}.get(kind, kind)
    with pytest.raises(ed.ExtraError, match=rf"{library} is not .*'eigendamage\[{extra}\]'"):
        ed.get_model(f"{kind}:resnet18")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("resnet20", {}, "zoo:NAME, timm:NAME"),
        ("zoo:nix", {}, "the zoo has no network 'nix'"),
        ("nix:nix", {}, "there is no module 'nix' here"),
        ("math:pi", {}, "not callable"),
        ("math:tau2", {}, "has no 'tau2'"),
        ("platform:system", {}, "must return a torch.nn.Module"),
        ("zoo:resnet20", {"pretrained": True}, "give the weights as a file"),
        ("timm:resnet18", {"pretrained": True, "weights": "a.pt"}, "not both"),
    ],
)
def test_a_name_that_cannot_be_is_refused(
    name: str, options: dict[str, object], words: str
) -> None:
    with pytest.raises(ed.EigenDamageError, match=words):
        ed.get_model(name, **options)


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
@pytest.mark.parametrize(
    "name", ["lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large"], ids=["pixels", "boxes"]
)
def test_a_network_around_a_backbone_fetches_no_weights(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(url: str, *_args: object, **_options: object) -> None:
        raise AssertionError(f"{url} was fetched")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetched)
    assert has_random_weights(f"torchvision:{name}")
    assert not ed.get_model(f"torchvision:{name}").training
