"""What is exported computes what the model computed, or it is not written."""

from __future__ import annotations

import copy
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune

import eigendamage as ed
from eigendamage.errors import MissingFileError
from tests.cases import CASES, Residual
from tests.networks import NETWORKS
from tests.transformer_networks import Fused, Gated, Grouped, Plain, tokens, transformer

_export_module = sys.modules[ed.export.__module__]
MODELS = [*CASES, *NETWORKS, "transformer"]
# The others go through the same code; each takes some seconds.
ONNX_SLOW = set(MODELS) - {"mobilenet"}


def _model(name: str) -> tuple[nn.Module, Tensor]:
    """A network of the tables in float32, with inputs."""
    if name in CASES:
        model, x = CASES[name].model(), CASES[name].data(4)[0]
    elif name in NETWORKS:
        model, x = NETWORKS[name].model(), NETWORKS[name].inputs()
    else:
        counted = Fused("by head", counted=True)
        model, x = transformer(Grouped(), Gated(), Fused(), counted, Plain()), tokens()
    return model.float(), x.float() if x.is_floating_point() else x


def _factored(*, middle: nn.Conv2d | None = None) -> nn.Module:
    """`Residual` whose first convolution is factored, without a bias, before a batch norm."""
    model = Residual().eval()
    stages = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 6, 1, bias=False)]
    if middle is not None:
        stages = [nn.Conv2d(3, 4, 1, bias=False), middle, stages[1]]
    model.stem = ed.FactoredConv2d(*stages)
    return model


def _export(model: nn.Module, path: Path, example: Any, **options: Any) -> ed.Export:
    return ed.export(model, path, example, progress=False, **options)


def _nothing_but(folder: Path, *names: str) -> bool:
    return sorted(p.name for p in folder.iterdir()) == sorted(names)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# --- every network


@pytest.mark.parametrize("name", MODELS)
def test_plain_of_every_network(name: str, tmp_path: Path) -> None:
    model, x = _model(name)
    written = _export(model, tmp_path / "plain", x, format="plain")
    assert written.max_difference < 1e-5
    assert written.compared == (1, len(x), len(x) + 1)
    assert _nothing_but(tmp_path / "plain", "model.py", "model.safetensors")


@pytest.mark.parametrize("name", ["tokens", "resnet", "transformer"])
def test_torch_export(name: str, tmp_path: Path) -> None:
    model, x = _model(name)
    _export(model, tmp_path / "model.pt2", x, format="torch.export")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(x[:3]), model(x[:3]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ONNX_SLOW else n for n in MODELS]
)
def test_onnx(name: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the extra export")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    model, x = _model(name)
    written = _export(model, tmp_path / "model.onnx", x)
    assert written.max_difference < 1e-5
    assert _nothing_but(tmp_path, "model.onnx")
    assert written.bytes == (tmp_path / "model.onnx").stat().st_size
    opsets = {o.domain: o.version for o in onnx.load(tmp_path / "model.onnx").opset_import}
    assert written.opset == 18 == opsets[""]
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    assert session.get_inputs()[0].shape == ["batch", *x.shape[1:]]
    more = torch.cat([x, x, x[:1]])
    found = session.run(["output"], {session.get_inputs()[0].name: more.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(more), atol=1e-5, rtol=0)


# --- folding


@pytest.mark.parametrize(
    "middle",
    [None, nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)],
    ids=["two stages", "three stages", "depthwise"],
)
def test_batch_norm_goes_into_the_expanding_stage(middle: nn.Conv2d | None, tmp_path: Path) -> None:
    model = _factored(middle=middle).eval()
    written = _export(model, tmp_path / "model.pt2", torch.randn(4, 3, 7, 6), format="torch.export")
    assert (written.folded, written.batch_norms) == (2, 2)
    assert written.max_difference < 1e-5
    state = torch.export.load(tmp_path / "model.pt2").state_dict
    expected = nn.utils.fusion.fuse_conv_bn_eval(model.stem[-1], model.bn1)  # type: ignore[index]
    last = len(model.stem) - 1  # type: ignore[arg-type]
    torch.testing.assert_close(state[f"stem.{last}.weight"], expected.weight)
    for stage in range(last):
        assert torch.equal(state[f"stem.{stage}.weight"], model.stem[stage].weight)  # type: ignore[index]
    # The layer had no bias and has taken the place of the batch norm's; nothing else is left of it.
    assert [n for n in state if n.startswith("bn")] == ["bn1.bias", "bn2.bias"]
    torch.testing.assert_close(state["bn1.bias"], expected.bias)


class _Chain(nn.Module):
    """A layer and a batch norm, with what a test puts between or beside them."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm
        nn.init.uniform_(norm.running_mean, -1, 1)  # type: ignore[arg-type]
        nn.init.uniform_(norm.running_var, 0.5, 2)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


class _ReadTwice(_Chain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.norm(y) + y


class _LayerTwice(_Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(torch.relu(self.layer(x))))


class _NormTwice(_Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.relu(self.norm(self.layer(x))))


class _Between(_Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.relu(self.layer(x)))


IMAGES, ROWS, SEQUENCES = (2, 3, 5, 5), (4, 3), (2, 5, 3)


@pytest.mark.parametrize(
    ("model", "shape", "folded"),
    [
        (_Chain(nn.Linear(3, 4), nn.BatchNorm1d(4)), ROWS, 1),
        (_Chain(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, affine=False)), ROWS, 1),
        (_Chain(nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4)), IMAGES, 1),
        (_Chain(nn.Conv2d(3, 6, 1, groups=3), nn.BatchNorm2d(6, affine=False)), IMAGES, 1),
        # Here batch norm's channels are not the layer's.
        (_Chain(nn.Linear(3, 5), nn.BatchNorm1d(5)), (2, 5, 3), 0),
        (_ReadTwice(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), IMAGES, 0),
        (_LayerTwice(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), IMAGES, 0),
        (_Between(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), IMAGES, 0),
        (_NormTwice(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), IMAGES, 1),
        # Its statistics have nowhere to go: the second call still reads them.
        (_NormTwice(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)), IMAGES, 0),
        (_Chain(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4)), IMAGES, 0),
    ],
)
def test_batch_norm_is_folded_only_where_that_changes_nothing(
    model: nn.Module, shape: tuple[int, ...], folded: int, tmp_path: Path
) -> None:
    written = _export(model, tmp_path / "plain", torch.randn(shape), format="plain")
    assert written.folded == folded
    assert written.max_difference < 1e-5
    kept = _export(model, tmp_path / "kept", torch.randn(shape), format="plain", fold=False)
    assert kept.folded == 0
    assert kept.max_difference == 0


# --- refusals


def test_what_computes_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt2"
    path.write_text("what was there")

    def wrong(program: Any) -> int:
        name = "head.bias"
        program.state_dict[name] = nn.Parameter(program.state_dict[name] + 0.01)
        return 0

    monkeypatch.setattr(_export_module, "fold_batchnorm", wrong)
    x = torch.randn(4, 3, 7, 6)
    with pytest.raises(ed.ExportError, match=r"output 'output'.*differs by 0\.01"):
        _export(_factored(), path, x, format="torch.export")
    assert _nothing_but(tmp_path, "model.pt2")
    assert path.read_text() == "what was there"
    accepted = _export(_factored(), path, x, format="torch.export", tolerance=0.1)
    assert accepted.max_difference == pytest.approx(0.01, rel=0.01)


class _Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class _OneSize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4, -1) + 1


def test_what_cannot_be_exported_is_refused_by_what_it_is(tmp_path: Path) -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ed.ExportError, match="cannot trace the model"):
        _export(_Branching(), tmp_path / "plain", x, format="plain")
    with pytest.raises(ed.ExportError, match="must not branch on the values"):
        _export(_Branching(), tmp_path / "plain", x, format="plain", dynamic_batch=False)
    with pytest.raises(ed.ExportError, match="give dynamic_batch=False"):
        _export(_OneSize(), tmp_path / "plain", x.repeat(1, 5)[:, :7], format="plain")
    with pytest.raises(ed.ExportError, match=r"ending in \.pt2"):
        _export(nn.Linear(3, 3), tmp_path / "model.bin", x, format="torch.export")
    with pytest.raises(ed.ExportError, match="opset 17"):
        _export(nn.Linear(3, 3), tmp_path / "model.onnx", x, opset=17)
    with pytest.raises(ed.ExportError, match="it is a folder"):
        _export(nn.Linear(3, 3), tmp_path, x)
    with pytest.raises(MissingFileError, match="does not exist; make it"):
        _export(nn.Linear(3, 3), tmp_path / "no" / "model.onnx", x)
    with pytest.raises(ed.DataError, match="cannot run on inputs"):
        _export(nn.Linear(5, 3), tmp_path / "plain", x, format="plain")
    assert _nothing_but(tmp_path)


class _InDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 6), nn.Linear(3, 6)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.tanh(self.left(batch["a"]) + self.right(batch["b"]))


@pytest.mark.parametrize("format", ["onnx", "torch.export", "plain"])
def test_a_model_that_takes_the_whole_dict(format: str, tmp_path: Path) -> None:
    example = {"a": torch.randn(4, 5), "b": torch.randn(4, 3)}
    path = tmp_path / {"plain": "plain", "onnx": "model.onnx"}.get(format, "model.pt2")
    written = _export(_InDict(), path, example, format=format)
    assert written.compared == (1, 4, 5)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ed.ExportError, match=r"pip install 'eigendamage\[export\]'"):
        _export(nn.Linear(3, 3), tmp_path / "model.onnx", torch.randn(4, 3))


def test_a_fixed_batch(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    written = _export(_OneSize(), tmp_path / "plain", x, format="plain", dynamic_batch=False)
    assert written.batch == 4
    assert written.compared == (4,)
    assert "batches of 4 only" in str(written)


def test_widths_that_may_cost_time_are_told_of_onnx_alone(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    odd = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 1), nn.Flatten())
    odd.never_read = nn.Identity()
    odd.never_read.layer = nn.Conv2d(3, 5, 1)
    even = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.Flatten())
    x = torch.randn(2, 3, 5, 5)
    written = _export(odd, tmp_path / "odd.onnx", x)
    assert (written.odd_widths, written.convolutions) == (1, 2)
    assert "1 of 2 convolutions put out a number of channels that is no multiple of 8" in str(
        written
    )
    written = _export(even, tmp_path / "even.onnx", x)
    assert (written.odd_widths, written.convolutions) == (0, 2)
    assert "multiple" not in str(written)
    assert "multiple" not in str(_export(odd, tmp_path / "plain", x, format="plain"))
    # Its outputs are the model's, which no compression changes.
    last = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 21, 1))
    written = _export(last, tmp_path / "last.onnx", x)
    assert (written.odd_widths, written.convolutions) == (0, 1)


# --- what goes in and comes out


class _Named(nn.Module):
    """Two inputs by name, outputs in containers, among them what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, first: Tensor, second: Tensor, twice: bool = False) -> dict[str, Any]:
        y = self.layer(first) + second * (2 if twice else 1)
        return {"logits": y, "hidden": [y + 1, (first, None)], "cache": object()}


def test_names_and_containers(tmp_path: Path) -> None:
    example = {"second": torch.randn(4, 2), "first": torch.randn(4, 3), "twice": True}
    model = _Named()
    written = _export(model, tmp_path / "model.pt2", example, format="torch.export")
    assert written.outputs == ("logits", "hidden_0", "hidden_1_0")
    module = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.equal(module(**example)["hidden"][1][0], example["first"])
    plain = _export(model, tmp_path / "plain", example, format="plain")
    assert plain.outputs == written.outputs
    assert plain.max_difference == 0


class _Clashing(nn.Module):
    """Inputs called as what the file itself uses, modules by names that are no identifiers."""

    def __init__(self) -> None:
        super().__init__()
        names = ("x²", "x2", "ﬁt", "__x", "class", "1", "größe", "a-b")
        for index, name in enumerate(names):
            self.add_module(name, nn.Linear(3, 3, bias=bool(index % 2)))

    def forward(self, torch: Tensor, device: Tensor, nn: Tensor, F: Tensor) -> Tensor:
        y = torch * nn.relu() + F.sin()
        for layer in self.children():
            y = layer(y).tanh()
        zeros = y.new_zeros(y.shape)
        return y.flatten(1) + device + zeros + _gelu(y)


def _gelu(x: Tensor) -> Tensor:
    return nn.functional.gelu(x)


def test_plain_where_names_clash_with_the_files_own_or_are_no_identifiers(tmp_path: Path) -> None:
    example = {name: torch.randn(4, 3) for name in ("torch", "device", "nn", "F")}
    written = _export(_Clashing().double(), tmp_path / "plain", _doubled(example), format="plain")
    assert written.max_difference < 1e-12
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    assert "layer_1.weight" in stored
    assert "größe.weight" in stored


def _doubled(example: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in example.items()}


def test_an_unknown_format_is_told_before_anything_is_done(tmp_path: Path) -> None:
    def runs(_x: Tensor) -> Tensor:
        raise AssertionError

    model = nn.Linear(3, 3)
    model.forward = runs
    unchecked: Any = inspect.unwrap(ed.export)  # types are checked in tests alone
    with pytest.raises(ed.ExportError, match=r"'onnnx'; expected one of 'onnx', 'torch\.export'"):
        unchecked(model, tmp_path / "no" / "model.onnx", torch.randn(4, 3), format="onnnx")


def test_a_pipe_in_place_of_the_file_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.pt2")
    with pytest.raises(ed.FileError, match=r"model\.pt2: it is no regular file"):
        ed.export(nn.Linear(3, 3), tmp_path / "model.pt2", torch.randn(4, 3), format="torch.export")
    assert (tmp_path / "model.pt2").is_fifo()


class _InPlace(nn.Module):
    """Writes through views of which the results are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y.view(-1).add_(1)
        y[:, 0] = 0
        y[:, 1:3].mul_(2)
        return y


def test_plain_keeps_what_is_written_through_views(tmp_path: Path) -> None:
    written = _export(_InPlace(), tmp_path / "plain", torch.randn(3, 4), format="plain")
    assert written.max_difference == 0


class _Odd(nn.Module):
    """Weights that belong to no layer, a tied one, constants, names that are one when flat."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.register_buffer("forward_", torch.randn(4))
        self.register_buffer("passing", torch.randn(4), persistent=False)
        self.free = nn.Parameter(torch.randn(4))
        self.x_0 = nn.Linear(4, 4).half()
        self.x = nn.Sequential(nn.Linear(4, 4))  # in one name, that is x_0 as well
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.embed.weight
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.drop = nn.Dropout(0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.drop(self.embed(ids)) * self.free + self.forward_ + self.passing
        x = x + torch.tensor([1.0, 2.0, 3.0, float("inf")]).clamp(max=4.0)
        return self.out(self.lstm(x)[0] + self.x_0(self.x(x).half()).float())


def test_plain_of_weights_of_all_kinds(tmp_path: Path) -> None:
    written = _export(_Odd(), tmp_path / "plain", torch.randint(0, 5, (3, 6)), format="plain")
    assert written.max_difference < 1e-6


# --- the model stays, the package is not needed


def test_the_model_and_the_random_state_are_left_alone(tmp_path: Path) -> None:
    model = _factored()
    model.train()
    model.bn1.eval()  # type: ignore[union-attr]
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    seed = torch.get_rng_state()
    _export(model, tmp_path / "plain", torch.randn(4, 3, 7, 6), format="plain")
    torch.set_rng_state(seed)
    seed = torch.get_rng_state()
    _export(model, tmp_path / "plain", torch.ones(4, 3, 7, 6), format="plain")
    assert torch.equal(seed, torch.get_rng_state())
    assert [m.training for m in model.modules()] == modes
    assert type(model.stem) is ed.FactoredConv2d
    assert not any(m._forward_hooks for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_folder_of_plain_code_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    x = torch.randn(4, 3, 7, 6)
    for _ in range(2):
        _export(_factored(), tmp_path / "plain", x, format="plain")
        assert {f.name for f in (tmp_path / "plain").iterdir()} == {"model.py", "model.safetensors"}


def test_the_plain_file_runs_without_this_package(tmp_path: Path) -> None:
    model, x = _factored(), torch.randn(5, 3, 7, 6)
    _export(model, tmp_path / "plain", x, format="plain")
    save_file({"x": x}, tmp_path / "x.safetensors")
    script = (
        "import sys; sys.modules['eigendamage'] = None\n"
        "import torch; from safetensors.torch import load_file, save_file; import model\n"
        "net = model.load(); y = net(load_file('../x.safetensors')['x']).detach()\n"
        "assert all(type(m).__module__.startswith('torch.nn') for m in net.children())\n"
        "assert len(list(net.children())) == 6\n"
        "save_file({'y': y}, '../y.safetensors')"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "plain", check=True, env={})
    found = load_file(tmp_path / "y.safetensors")["y"]
    torch.testing.assert_close(found, model(x), atol=1e-5, rtol=0)


def test_a_plain_model_has_no_class_of_this_package() -> None:
    model, x = _factored(), torch.randn(5, 3, 7, 6)
    prune.l1_unstructured(model.conv2, "weight", 0.5)
    expected = model(x)
    plain = ed.plain(model)
    assert type(plain.stem) is nn.Sequential
    assert [n for n, m in plain.named_modules() if type(m).__module__.startswith("eigen")] == []
    assert torch.equal(plain(x), expected)
    assert int((plain.state_dict()["conv2.weight"] == 0).sum()) == 288
    assert type(model.stem) is ed.FactoredConv2d
    assert prune.is_pruned(model)


class _Reading(nn.Module):
    """Reads the weight of a layer itself, and keeps a computed tensor in a dict."""

    def __init__(self) -> None:
        super().__init__()
        first, last = nn.Linear(4, 2, bias=False), nn.Linear(2, 4)
        self.layer = ed.FactoredLinear(first, last)
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.cache["weight"] = self.layer.weight
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)


def test_a_model_that_reads_a_factored_weight(tmp_path: Path) -> None:
    model = _Reading()
    model(torch.randn(3, 4))  # with gradients, so that what is kept does not copy itself
    written = _export(model, tmp_path / "plain", torch.randn(3, 4), format="plain")
    assert written.max_difference < 1e-6


def test_a_compressed_model(tmp_path: Path) -> None:
    model, x = _model("resnet")
    data = [torch.randn(16, 3, 8, 8) for _ in range(2)]
    half = ed.Budget(macs=0.5)
    small = ed.compress(model, data, budget=half, method="eigendamage", progress=False).model
    assert any(isinstance(m, ed.FactoredConv2d) for m in small.modules())
    written = _export(small, tmp_path / "plain", x, format="plain")
    assert written.folded == written.batch_norms == 6
    assert written.max_difference < 1e-5


@pytest.mark.slow
def test_weights_beside_the_onnx_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    save = torch.onnx.ONNXProgram.save

    def save_apart(program: Any, path: Path) -> None:  # as torch does above 2 GB
        save(program, path, external_data=True)

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", save_apart)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    written = _export(model, tmp_path / "model.onnx", torch.randn(4, 64))
    assert _nothing_but(tmp_path, "model.onnx", "model.onnx.data")
    assert written.bytes > 2 * 64 * 64 * 4
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    x = torch.randn(7, 64)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(x), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own
def test_of_a_wrapped_model_the_original_is_written(tmp_path: Path) -> None:
    model = CASES["fc"].model().float().eval()
    x = CASES["fc"].data(4)[0].float()
    compiled = torch.compile(model)
    assert isinstance(compiled, nn.Module)
    for wrapped in (compiled, nn.DataParallel(model), nn.DataParallel(compiled)):
        written = _export(wrapped, tmp_path / "model.pt2", x, format="torch.export")
        assert written.batch is None
        assert written.max_difference < 1e-6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript is deprecated
def test_a_program_of_torchscript_is_refused(tmp_path: Path) -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ed.ExportError, match="TorchScript"):
        _export(torch.jit.trace(nn.Linear(3, 2), x), tmp_path / "model.onnx", x)
    assert _nothing_but(tmp_path)
