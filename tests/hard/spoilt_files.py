"""Files that the library reads, spoilt at random, and what reading them ends in."""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import eigendamage as ed

_LEAVES: tuple[Any, ...] = (
    *(-1, 0, 1, 7, 2**31, 2**63, -(2**63), 1e308, -0.5, True, None),
    *("", "..", "0", "\x00", [], {}, [[]], "NaN"),
)
_PICTURES = {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "ppm": "PPM", "webp": "WEBP", "tif": "TIFF"}


def network() -> nn.Module:
    """What the spoilt files are of."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).eval()


def batches() -> list[Tensor]:
    """Inputs of it."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 6, 6, generator=generator) for _ in range(4)]


class SpoiltFiles:
    """Whole files of every kind in a folder, each of which is spoilt, read and mended in turn."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._random = Random(seed)
        self._folder = folder
        result = ed.compress(
            network(), batches(), budget=ed.Budget(macs=0.5), progress=False, refine=0
        )
        saved = folder / "saved"
        ed.save(result, saved)
        ed.save_curvature(result.curvature, folder / "curvature.safetensors")
        torch.save(network().state_dict(), folder / "weights.pt")
        load: Callable[[], object] = lambda: ed.load(network(), saved)  # noqa: E731
        curvature, weights = folder / "curvature.safetensors", folder / "weights.pt"
        plan = folder / "plan.json"
        result.plan.save(plan)
        self.readers: dict[Path, Callable[[], object]] = {
            saved / "model.safetensors": load,
            saved / "structure.json": load,
            saved / "report.json": lambda: ed.Report.load(saved / "report.json"),
            plan: lambda: ed.apply_plan(network(), ed.Plan.load(plan), result.curvature),
            curvature: lambda: _planned(ed.load_curvature(curvature)),
            weights: lambda: ed.zoo.load_weights(network(), weights),
        }
        for path in _images(folder):
            self.readers[path] = lambda path=path: ed.zoo.load_images(
                path if path.suffix in (".zip", ".npz") else path.parent
            )
        for read in self.readers.values():
            read()

    def go_through(self, counts: Counter[tuple[str, str]]) -> None:
        """Spoil each file once in a new way, and count what reading it ends in.

        Raises:
            Exception: any that is no `EigenDamageError`.
        """
        for path, read in self.readers.items():
            whole = path.read_bytes()
            path.write_bytes(self._spoilt(path, whole))
            try:
                read()
            except ed.EigenDamageError as error:
                assert len(str(error)) > 20, repr(error)
                counts[path.name, type(error).__name__] += 1
            else:
                counts[path.name, "read"] += 1
            finally:
                path.write_bytes(whole)

    def _spoilt(self, path: Path, whole: bytes) -> bytes:
        draws, spoilt = self._random, bytearray(whole)
        how = draws.choice(("bits", "bits", "bytes", "cut", "repeated", "leaf", "leaf"))
        if how == "leaf" and path.suffix == ".json":
            return self._with_another_leaf(whole)
        if how == "cut":
            return whole[: draws.randrange(len(whole))]
        if how == "repeated":
            start, stop = sorted(draws.randrange(len(whole)) for _ in range(2))
            return whole[:stop] + whole[start:]
        for _ in range(draws.choice((1, 1, 3, 10))):
            at = draws.randrange(min(len(spoilt), draws.choice((40, 300, len(spoilt)))))
            if how == "bits":
                spoilt[at] ^= 1 << draws.randrange(8)
            else:
                spoilt[at] = draws.choice((0, 255, 127, 128, *b'9-"{'))
        return bytes(spoilt)

    def _with_another_leaf(self, whole: bytes) -> bytes:
        """A document with one value, somewhere in it, replaced or removed."""
        document = here = json.loads(whole)
        while True:
            key = self._random.choice(list(here) if isinstance(here, dict) else range(len(here)))
            if (
                not isinstance(here[key], dict | list)
                or not here[key]
                or self._random.random() < 0.2
            ):
                break
            here = here[key]
        if self._random.random() < 0.2:
            del here[key]
        else:
            here[key] = self._random.choice(_LEAVES)
        return json.dumps(document).encode()


def _planned(curvature: ed.Curvature) -> None:
    """A curvature that is read has to give a plan, or be refused by it."""
    try:
        plan = ed.make_plan(network(), curvature, ed.Budget(macs=0.6), method="eigendamage")
    except ed.EigenDamageError:
        return
    small = ed.apply_plan(network(), plan, curvature)
    assert bool(torch.isfinite(small(batches()[0])).all())


def _images(folder: Path) -> list[Path]:
    """Pictures in folders of their own, a zip of pictures and an .npz."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    paths: list[Path] = []
    for suffix, kind in _PICTURES.items():
        paths.append(folder / kind / f"a.{suffix}")
        paths[-1].parent.mkdir()
        Image.fromarray(pixels).save(paths[-1], kind)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    paths.append(folder / "pictures.zip")
    with zipfile.ZipFile(paths[-1], "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f"a/{number}.png", stream.getvalue())
    paths.append(folder / "arrays.npz")
    np.savez_compressed(paths[-1], images=np.stack([pixels] * 3), labels=np.arange(3))
    return paths
