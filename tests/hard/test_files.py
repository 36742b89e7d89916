"""Files that cannot be written or read: an error that names them, and nothing half-written."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import eigendamage as ed
from eigendamage import files
from eigendamage.files import alone_in, written_beside, written_together
from eigendamage.report import write_page
from eigendamage.training._checkpoint import Checkpoint


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3)
    ).eval()


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 6, generator=generator) for _ in range(10)]


@pytest.fixture(scope="module")
def small() -> ed.Compressed:
    return ed.compress(
        network(), batches(), budget=ed.Budget(macs=0.6), method="eigendamage", progress=False
    )


@contextmanager
def full_disk(size: int = 100) -> Generator[None]:
    """No file may grow above a size, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _checkpoint(folder: Path) -> None:
    Checkpoint(folder / "x", {}, every=0.0, writing=True).save({"weights": torch.ones(9999)})


WRITERS: dict[str, Callable[[ed.Compressed, Path], object]] = {
    "a model": lambda small, folder: ed.save(small, folder / "x"),
    "a curvature": lambda small, folder: ed.save_curvature(small.curvature, folder / "x"),
    "a plan": lambda small, folder: small.plan.save(folder / "x"),
    "a report": lambda small, folder: small.report.save(folder / "x"),
    "a page": lambda small, folder: write_page(small.report, folder / "x"),
    "a state": lambda _, folder: _checkpoint(folder),
}


@pytest.mark.parametrize("what", list(WRITERS))
def test_a_full_disk_is_told_and_leaves_what_was_there(
    what: str, small: ed.Compressed, tmp_path: Path
) -> None:
    write = WRITERS[what]
    with full_disk(), pytest.raises(ed.FileError, match=r"cannot write .*x") as told:
        write(small, tmp_path)
    if what != "a state":  # torch has words of its own
        assert "File too large" in str(told.value)
    assert not list(tmp_path.iterdir())
    write(small, tmp_path)
    before = _contents(tmp_path)
    with full_disk(), pytest.raises(ed.FileError):
        write(small, tmp_path)
    assert _contents(tmp_path) == before


@pytest.mark.parametrize(
    ("format", "name"), [("onnx", "x.onnx"), ("torch.export", "x.pt2"), ("plain", "x")]
)
def test_a_full_disk_is_told_by_exports_too(format: Any, name: str, tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        ed.export(network(), folder / name, batches()[0], format=format, progress=False)

    with full_disk(), pytest.raises(ed.FileError, match=rf"cannot write .*{name}"):
        write(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ed.FileError, match=rf"cannot write .*{name}"):
        write(Path("/proc"))  # where nobody may
    write(tmp_path)
    assert (tmp_path / name).exists()


@pytest.mark.parametrize("what", list(WRITERS))
def test_a_file_in_place_of_the_folder_is_told(
    what: str, small: ed.Compressed, tmp_path: Path
) -> None:
    """As a folder that cannot be written to, which root may write to all the same."""
    blocked = tmp_path / "blocked"
    blocked.write_text("mine", encoding="utf-8")
    with pytest.raises(ed.FileError, match="blocked"):
        WRITERS[what](small, blocked)
    assert blocked.read_text(encoding="utf-8") == "mine"
    assert _contents(tmp_path).keys() == {"blocked"}


@pytest.mark.parametrize("what", [name for name in WRITERS if name != "a model"])
def test_a_pipe_or_a_folder_in_place_of_the_file_stays(
    what: str, small: ed.Compressed, tmp_path: Path
) -> None:
    """A pipe stands for all that a rename would replace by a file, as a device."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "x").symlink_to("pipe")
    with pytest.raises(ed.FileError, match=r"cannot write .*x: it is no regular file"):
        WRITERS[what](small, tmp_path)
    assert (tmp_path / "x").is_symlink()
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "x").unlink()
    (tmp_path / "x").mkdir()
    with pytest.raises(ed.FileError, match=r"cannot write .*x: it is a folder"):
        WRITERS[what](small, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipe", "x"]


def test_a_pipe_among_the_files_of_a_model_stays(small: ed.Compressed, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "report.html")
    with pytest.raises(ed.FileError, match=r"cannot write .*report\.html: it is no regular file"):
        ed.save(small, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").is_fifo()


def test_a_file_behind_a_link_may_be_replaced(small: ed.Compressed, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    (tmp_path / "x").symlink_to("mine")
    small.plan.save(tmp_path / "x")
    assert ed.Plan.load(tmp_path / "x") == small.plan
    assert (tmp_path / "mine").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(("name", "words"), [("null\0byte", "null byte"), ("x" * 300, "too long")])
def test_a_name_that_no_file_can_have_is_told(
    name: str, words: str, small: ed.Compressed, tmp_path: Path
) -> None:
    path = tmp_path / name
    calls: tuple[Callable[[], object], ...] = (
        lambda: ed.save(small, path),
        lambda: ed.save_curvature(small.curvature, path),
        lambda: small.plan.save(path),
        lambda: _run(path, 0.6),
        lambda: ed.Plan.load(path),
        lambda: ed.load(network(), path),
    )
    for call in calls:
        with pytest.raises(ed.FileError, match=words):
            call()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_has_no_name_is_told(
    small: ed.Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (".", "/"):
        with pytest.raises(ed.FileError, match=f"cannot write {path}: it is a folder"):
            small.plan.save(path)
    with pytest.raises(ed.FileError, match=r"cannot write into /: .* give a folder in it"):
        ed.save(small, "/")
    ed.save(small, ".")
    assert ed.Plan.load("plan.json") == small.plan


@pytest.mark.parametrize("moment", [KeyboardInterrupt, MemoryError])
def test_an_interruption_leaves_no_part_of_a_file(
    moment: type[BaseException], tmp_path: Path
) -> None:
    def stop(path: Path) -> None:
        path.write_text("half", encoding="utf-8")
        raise moment

    with pytest.raises(moment), written_beside(tmp_path / "a") as beside:
        stop(beside)
    with pytest.raises(moment), written_together(tmp_path / "b", ("c",)) as folder:
        stop(folder / "c")
    assert not list(tmp_path.iterdir())


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _run(directory: Path, macs: float) -> ed.Compressed:
    return ed.compress(
        network(),
        batches(),
        budget=ed.Budget(macs=macs),
        method="eigendamage",
        rounds=2,
        epochs=1,
        directory=directory,
        progress=False,
    )


def _hold(directory: Path, held: Any, done: Any) -> None:
    with alone_in(directory):
        held.set()
        done.wait(60)


def test_a_second_run_in_a_folder_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    """Also while the first is in another process, and not once that one was killed."""
    folder = tmp_path / "rounds"
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(folder, held, done))
    process.start()
    assert held.wait(60)
    with pytest.raises(ed.FileError, match=r"another run is at work in .*rounds"):
        _run(folder, 0.6)
    assert not list(folder.iterdir())
    process.kill()
    process.join()
    result = _run(folder, 0.6)
    assert result.report.macs[1] <= 0.6 * result.report.macs[0]
    assert not [name for name in _contents(folder) if ".part" in name]


def test_a_model_is_saved_below_a_folder_in_which_a_run_is_at_work(
    small: ed.Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for other writers, which are quick, and not until the run ends."""
    monkeypatch.setattr(files, "_PATIENCE_S", 0.05)
    with alone_in(tmp_path):
        ed.save(small, tmp_path / "x")
    assert ed.load(network(), tmp_path / "x").state_dict().keys() == small.model.state_dict().keys()


def test_models_that_are_saved_at_once_do_not_mix(tmp_path: Path, small: ed.Compressed) -> None:
    other = ed.compress(
        network(), batches(), budget=ed.Budget(macs=0.4), method="eigendamage", progress=False
    )
    failed: list[BaseException] = []

    def save(what: ed.Compressed) -> None:
        try:
            for _ in range(10):
                ed.save(what, tmp_path / "x")
        except BaseException as error:  # noqa: BLE001 - a thread's error is told by the test
            failed.append(error)

    threads = [threading.Thread(target=save, args=(what,)) for what in (small, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    loaded = ed.load(network(), tmp_path / "x").state_dict()  # refuses what does not fit
    assert loaded.keys() in (small.model.state_dict().keys(), other.model.state_dict().keys())
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "zeros": bytes(64),
    "no JSON": b"\xff\xfe{",
    "deep": b"[" * 100_000,
    "deep in a field": b'{"version": 1, "layers": ' + b'{"a":' * 50_000,
    "a huge number": b'{"version": 1' + b"0" * 5000 + b"}",
    "a huge exponent": b'{"version": 1e999}',
    "not a number": b'{"version": NaN}',
    "a list": b"[1]",
    "lone surrogates": b'{"version": 1, "model": "\\ud800"}',
    "twice": b'{"version": 1, "version": {}}',
    "true for one": b'{"version": true}',
}


@pytest.mark.parametrize("what", list(HOSTILE))
@pytest.mark.parametrize("kind", ["plan", "report", "structure"])
def test_a_hostile_document_is_refused(what: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.json"
    path.write_bytes(HOSTILE[what])
    readers: dict[str, Callable[[], object]] = {
        "plan": lambda: ed.Plan.load(path),
        "report": lambda: ed.Report.load(path),
        "structure": lambda: ed.load(network(), tmp_path),
    }
    with pytest.raises(ed.FileFormatError, match=rf"{kind}\.json"):
        readers[kind]()


def test_a_field_that_is_there_twice_is_named(small: ed.Compressed, tmp_path: Path) -> None:
    small.plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text(encoding="utf-8")
    twice = text.replace('"kind":', '"kind": "keep", "kind":', 1)
    (tmp_path / "plan.json").write_text(twice, encoding="utf-8")
    assert json.loads(twice) == json.loads(text)
    with pytest.raises(ed.FileFormatError, match=r"plan.* the field 'kind' twice"):
        ed.Plan.load(tmp_path / "plan.json")


def _header(**entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def _entry(shape: list[int], at: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": at}


TENSORS: dict[str, bytes] = {
    "nothing": b"",
    "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "a header past the end": (1000).to_bytes(8, "little") + b"{}",
    "more data than there is": _header(a=_entry([1000], [0, 4000])),
    "a shape that overflows": _header(a=_entry([2**62, 2**62], [0, 4])) + bytes(4),
    "offsets that overlap": _header(a=_entry([1], [0, 4]), b=_entry([1], [0, 4])) + bytes(4),
    "offsets backwards": _header(a=_entry([1], [4, 0])) + bytes(8),
    "a negative size": _header(a=_entry([-1], [0, 4])) + bytes(4),
    "an unknown dtype": _header(a=_entry([1], [0, 4], "X9")) + bytes(4),
    "deep": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "a pickle": b"\x80\x04\x95" + bytes(64),
}


@pytest.mark.parametrize("what", list(TENSORS))
def test_hostile_tensors_are_refused(what: str, small: ed.Compressed, tmp_path: Path) -> None:
    ed.save(small, tmp_path / "x")
    path = tmp_path / "x" / "model.safetensors"
    path.write_bytes(TENSORS[what])
    readers: tuple[Callable[[], object], ...] = (
        lambda: ed.load(network(), tmp_path / "x"),
        lambda: ed.load_curvature(path),
        lambda: ed.zoo.load_weights(network(), path),
    )
    for read in readers:
        with pytest.raises(ed.FileFormatError, match=r"model\.safetensors"):
            read()


@pytest.mark.parametrize("cut", [0.0, 0.3, 0.9, 0.999])
def test_a_file_cut_short_is_told_wherever_it_is_cut(
    cut: float, small: ed.Compressed, tmp_path: Path
) -> None:
    ed.save(small, tmp_path / "x")
    ed.save_curvature(small.curvature, tmp_path / "x" / "curvature.safetensors")
    whole = {p: p.read_bytes() for p in (tmp_path / "x").iterdir() if p.suffix != ".html"}
    for path, content in whole.items():
        path.write_bytes(content.rstrip()[: int(cut * len(content.rstrip()))])
        if path.name in ("plan.json", "report.json"):  # the model is whole without them
            with pytest.warns(UserWarning, match=path.name):
                ed.load(network(), tmp_path / "x")
        else:
            with pytest.raises(ed.FileFormatError, match=path.name):
                ed.load_curvature(path) if "curvature" in path.name else ed.load(
                    network(), tmp_path / "x"
                )
        path.write_bytes(content)
    assert load_file(tmp_path / "x" / "model.safetensors")


@pytest.mark.parametrize(
    "read",
    [
        lambda path: ed.Plan.load(path / "plan.json"),
        lambda path: ed.load(network(), path),
        lambda path: ed.load_curvature(path / "curvature.safetensors"),
    ],
)
def test_what_is_not_there_is_told(read: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(ed.FileError, match="absent") as told:
        read(tmp_path / "absent")
    assert isinstance(told.value, FileNotFoundError)
