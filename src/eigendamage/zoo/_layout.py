"""Which files make up a split, and what their folders say about their classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eigendamage.errors import DataError
from eigendamage.zoo._sources import ImageFile

_SPLITS = frozenset({"train", "test", "val", "valid", "validation"})


@dataclass(frozen=True)
class Layout:
    """The files of a split, the class index of each (None: unlabeled) and the classes' names."""

    files: tuple[ImageFile, ...]
    labels: tuple[int, ...] | None
    class_names: tuple[str, ...]


def lay_out(files: Sequence[ImageFile], split: str, where: str) -> Layout:
    """Choose the files of ``split`` and label each by its class folder.

    The folders are ``<split>/<class>/...``, or ``<class>/...`` where there are no splits: then any
    split is all there is. One folder around everything is looked through. Classes count in
    alphabetical order over all the splits; files without a class folder are unlabeled.

    Raises:
        DataError: if there are other splits but not this one, or if only some files have a class.
    """
    known = {split, *_SPLITS}
    paths = _unwrapped({file: file.parts for file in files}, known)
    splits = {parts[0] for parts in paths.values() if len(parts) > 1} & known
    if splits and split not in splits:
        raise DataError(
            f"'{where}' has no images in a folder '{split}'; it has {', '.join(sorted(splits))}"
        )
    if splits:
        names = _class_names(parts[1:] for parts in paths.values() if parts[0] in splits)
        paths = {file: parts[1:] for file, parts in paths.items() if parts[0] == split}
    else:
        names = _class_names(paths.values())

    loose = [file for file, parts in paths.items() if len(parts) == 1]
    if len(loose) == len(paths):
        return Layout(tuple(paths), None, ())
    if loose:
        raise DataError(
            f"'{where}': {len(loose)} of {len(paths)} images, '{loose[0].name}' among them, are"
            " beside the class folders; put every image in one, or all of them in none"
        )
    index = {name: i for i, name in enumerate(names)}
    return Layout(tuple(paths), tuple(index[parts[0]] for parts in paths.values()), names)


def splits_of(files: Sequence[ImageFile]) -> tuple[str, ...]:
    """The split folders there are, sorted; none where the classes or images come first."""
    paths = _unwrapped({file: file.parts for file in files}, set(_SPLITS))
    return tuple(sorted({parts[0] for parts in paths.values() if len(parts) > 1} & _SPLITS))


def _class_names(paths: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(sorted({parts[0] for parts in paths if len(parts) > 1}))


def _unwrapped(
    paths: dict[ImageFile, tuple[str, ...]], splits: set[str]
) -> dict[ImageFile, tuple[str, ...]]:
    while True:
        firsts = {parts[0] for parts in paths.values()}
        if len(firsts) > 1 or firsts & splits or any(len(parts) == 1 for parts in paths.values()):
            return paths
        paths = {file: parts[1:] for file, parts in paths.items()}
