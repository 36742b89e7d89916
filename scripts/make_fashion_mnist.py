"""Choose the part of Fashion-MNIST that is bundled with the package, and write it there.

python scripts/make_fashion_mnist.py FOLDER

FOLDER holds the four IDX files of the original and its licence in a file COPYRIGHT, as in Debian's
package dataset-fashion-mnist. The choice is class-balanced, shuffled and always the same.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DATA = Path(__file__).resolve().parents[1] / "src" / "eigendamage" / "zoo" / "data"
SPLITS = {"train": ("train", 12_000), "test": ("t10k", 2_000)}
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SEED = 2019


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the IDX .gz files and COPYRIGHT are")
    source: Path = parser.parse_args().folder

    arrays: dict[str, NDArray[np.generic]] = {"class_names": np.array(CLASSES)}
    for split, (prefix, count) in SPLITS.items():
        images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz", dimensions=3)
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz", dimensions=1)
        chosen = balanced(labels, count, np.random.default_rng(SEED))
        arrays[f"{split}_images"] = images[chosen]
        arrays[f"{split}_labels"] = labels[chosen]
        if split == "train":
            # Of all 60,000, as everybody's code for this data set has them.
            arrays["mean"] = np.round(images.mean(keepdims=True).ravel() / 255, 4)
            arrays["std"] = np.round(images.std(keepdims=True).ravel() / 255, 4)

    DATA.mkdir(parents=True, exist_ok=True)
    beside = DATA / "fashion_mnist.partial.npz"
    np.savez_compressed(beside, **arrays)
    target = beside.replace(DATA / "fashion_mnist.npz")
    shutil.copyfile(source / "COPYRIGHT", DATA / "LICENSE.fashion-mnist")
    print(f"{target}: {target.stat().st_size / 1e6:.2f} MB")


def read_idx(path: Path, *, dimensions: int) -> NDArray[np.uint8]:
    """Read an IDX file of bytes: a magic number, the sizes in big-endian int32, the bytes."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:4] != bytes([0, 0, 8, dimensions]):
        raise SystemExit(f"{path} is no IDX file of bytes in {dimensions} dimensions")
    start = 4 + 4 * dimensions
    shape = np.frombuffer(raw[4:start], ">i4")
    return np.frombuffer(raw[start:], np.uint8).reshape(shape)


def balanced(
    labels: NDArray[np.uint8], count: int, generator: np.random.Generator
) -> NDArray[np.intp]:
    """Choose ``count`` indices, equally many of each class, in shuffled order."""
    each = count // len(CLASSES)
    of_class = [np.flatnonzero(labels == c) for c in range(len(CLASSES))]
    chosen = [generator.choice(members, each, replace=False) for members in of_class]
    return generator.permutation(np.concatenate(chosen))


if __name__ == "__main__":
    main()
