import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eigendamage import zoo
from eigendamage.errors import DataError, FileFormatError, MissingFileError
from eigendamage.zoo import _limits

PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def png(value: int, size: tuple[int, int] = (4, 5), mode: str = "RGB") -> bytes:
    """A picture of one colour, (height, width)."""
    colour = (value, 0, 255 - value) if mode == "RGB" else value
    stream = io.BytesIO()
    Image.new(mode, (size[1], size[0]), colour).save(stream, "PNG")
    return stream.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


SPLITS = {
    "train/dog/1.png": png(10),
    "train/cat/1.png": png(20),
    "train/ape/1.png": png(30),
    "test/dog/1.png": png(40),
    "test/cat/1.JPEG": png(50),
    "readme.txt": b"no image",
    ".cache/1.png": b"hidden",
    "__MACOSX/train/dog/._1.png": b"a resource fork",
}


def reds(images: zoo.ImageSet) -> list[int]:
    return [round(v) for v in (images.images[:, 0, 0, 0] * 255).tolist()]


@pytest.mark.parametrize("kind", ["folder", "zip", "wrapped zip"])
def test_split_is_read_with_classes_in_alphabetical_order_over_all_splits(tmp_path, kind):
    if kind == "folder":
        source = write(tmp_path / "data", SPLITS)
    else:
        prefix = "cifar-main/" if kind == "wrapped zip" else ""
        files = {prefix + name: content for name, content in SPLITS.items()}
        source = write_zip(tmp_path / "data.zip", files)
    train, test = (zoo.load_images(source, split, **PLAIN) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("ape", "cat", "dog")
    assert dict(zip(reds(train), train.labels.tolist(), strict=True)) == {30: 0, 20: 1, 10: 2}
    assert dict(zip(reds(test), test.labels.tolist(), strict=True)) == {50: 1, 40: 2}


def test_pixels_are_rgb_in_channels_first_order_and_normalised(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 5, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (image,) = zoo.load_images(tmp_path).images
    mean, std = torch.tensor(zoo.RGB_MEAN), torch.tensor(zoo.RGB_STD)
    expected = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(2, 0, 1)
    torch.testing.assert_close(image, expected)


def test_without_splits_every_split_is_everything(tmp_path):
    source = write(tmp_path, {"b/1.png": png(1), "a/1.png": png(2)})
    for split in ("train", "test"):
        images = zoo.load_images(source, split, **PLAIN)
        assert dict(zip(reds(images), images.labels.tolist(), strict=True)) == {1: 1, 2: 0}


@pytest.mark.parametrize("names", ["{}.png", "test/{}.png", "photos/{}.png"])
def test_images_without_class_folders_are_unlabeled(tmp_path, names):
    source = write(tmp_path, {names.format(i): png(i) for i in range(3)})
    images = zoo.load_images(source, "test", **PLAIN)
    assert sorted(reds(images)) == [0, 1, 2]
    assert images.labels is None


def test_images_beside_class_folders_are_refused(tmp_path):
    source = write(tmp_path, {"a/1.png": png(1), "b/1.png": png(1), "stray.png": png(2)})
    with pytest.raises(DataError, match=r"1 of 3 images, 'stray\.png'"):
        zoo.load_images(source)


def test_absent_split_is_refused_with_those_there_are(tmp_path):
    source = write(tmp_path, {"train/a/1.png": png(1), "val/a/1.png": png(1)})
    with pytest.raises(DataError, match="no images in a folder 'test'; it has train, val"):
        zoo.load_images(source, "test")


def test_order_is_shuffled_and_a_limit_takes_its_first(tmp_path):
    source = write_zip(tmp_path / "d.zip", {f"{i // 10}/{i:02}.png": png(i) for i in range(40)})
    everything = reds(zoo.load_images(source, seed=1, **PLAIN))
    some = zoo.load_images(source, seed=1, limit=12, **PLAIN)
    assert sorted(everything) == list(range(40)) != everything
    assert reds(some) == everything[:12]
    assert some.labels.tolist() == [red // 10 for red in reds(some)]
    assert some.class_names == ("0", "1", "2", "3")
    assert reds(zoo.load_images(source, seed=2, limit=12, **PLAIN)) != reds(some)


def test_limit_reads_no_other_file(tmp_path):
    files = {f"{i}.png": png(i) for i in range(20)}
    broken = write(tmp_path, files | {"20.png": b"broken"})
    # Whatever the seed, one of 21 is left out by a limit of 20; some seed leaves out the broken.
    assert any(_is_readable(broken, seed) for seed in range(200))
    with pytest.raises(DataError, match=r"'20\.png' cannot be read as an image"):
        zoo.load_images(broken)


def _is_readable(source: Path, seed: int) -> bool:
    try:
        return len(zoo.load_images(source, limit=20, seed=seed)) == 20
    except DataError:
        return False


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "a/../../evil.png", "C:\\evil.png"])
def test_archive_that_points_out_of_itself_is_refused(tmp_path, name):
    source = write_zip(tmp_path / "d.zip", {"fine.png": png(1), name: png(2)})
    with pytest.raises(FileFormatError, match=r"evil\.png', which points out of the archive"):
        zoo.load_images(source)


@pytest.mark.parametrize("kind", ["zip", "npz"])
def test_file_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(_limits, "MAX_BYTES", 1000)
    path = tmp_path / f"d.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("bomb.png", bytes(2000))
    else:
        np.savez_compressed(path, images=np.zeros((2, 40, 40), np.uint8))
    with pytest.raises(DataError, match="would unpack to"):
        zoo.load_images(path)


def test_images_that_would_fill_the_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_limits, "MAX_BYTES", 1000)
    source = write(tmp_path, {f"{i}.png": png(1, (16, 16)) for i in range(2)})
    with pytest.raises(DataError, match="2 images of 16 x 16' would unpack"):
        zoo.load_images(source)


def test_entry_that_is_longer_than_it_declares_is_refused(tmp_path):
    path = write_zip(tmp_path / "d.zip", {"a.png": png(1)})
    size = len(png(1)).to_bytes(4, "little")
    raw = path.read_bytes()
    assert raw.count(size * 2) == 2
    path.write_bytes(raw.replace(size * 2, size + (10).to_bytes(4, "little")))
    with pytest.raises((FileFormatError, DataError), match=r"a\.png"):
        zoo.load_images(path)


def test_images_of_two_sizes_need_a_size_to_resize_to(tmp_path):
    source = write(tmp_path, {"a.png": png(1, (4, 5)), "b.png": png(1, (6, 7))})
    with pytest.raises(DataError, match=r"'(a|b)\.png' is . x . pixels .*'(a|b)\.png' is . x ."):
        zoo.load_images(source)
    assert zoo.load_images(source, resize=(8, 6)).images.shape == (2, 3, 8, 6)


@pytest.mark.parametrize(("mode", "expected"), [("L", 100), ("P", 100), ("RGBA", 100)])
def test_grey_palette_and_transparent_images_become_rgb(tmp_path, mode, expected):
    image = Image.new(
        "RGBA" if mode == "RGBA" else "L", (4, 4), (100,) * 4 if mode == "RGBA" else 100
    )
    if mode == "P":
        image = image.convert("P")
        image.info["transparency"] = bytes(range(100))
    image.save(tmp_path / "a.png")
    images = zoo.load_images(tmp_path, **PLAIN).images
    torch.testing.assert_close(images, torch.full((1, 3, 4, 4), expected / 255))


def test_sixteen_bit_image_is_refused_rather_than_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"'deep\.png' has I;16 pixels"):
        zoo.load_images(tmp_path)


def test_linked_class_folders_are_followed_and_a_loop_ends(tmp_path):
    write(tmp_path / "far", {"cat/1.png": png(1)})
    source = write(tmp_path / "data", {"dog/1.png": png(2)})
    (source / "cat").symlink_to(tmp_path / "far" / "cat")
    (source / "dog" / "loop").symlink_to(source)
    images = zoo.load_images(source, **PLAIN)
    assert sorted(zip(reds(images), images.labels.tolist(), strict=True)) == [(1, 0), (2, 1)]


def test_npz_with_splits_says_all_it_needs(tmp_path):
    pixels = np.arange(6, dtype=np.uint8).repeat(16).reshape(6, 4, 4)
    np.savez(
        tmp_path / "d.npz",
        train_images=pixels,
        train_labels=np.arange(6) % 2,
        test_images=pixels[:2],
        mean=np.array([0.5]),
        std=np.array([0.25]),
        class_names=np.array(["even", "odd"]),
    )
    train = zoo.load_images(tmp_path / "d.npz", "train", limit=5)
    values = ((train.images[:, 0, 0, 0] * 0.25 + 0.5) * 255).round().int()
    assert train.images.shape == (5, 1, 4, 4)
    assert (values % 2).tolist() == train.labels.tolist()
    assert train.class_names == ("even", "odd")
    assert zoo.load_images(tmp_path / "d.npz", "test").labels is None


def test_npz_of_colour_images_without_splits_is_normalised_as_files_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), np.uint8)
    np.savez(tmp_path / "d.npz", images=pixels)
    write(tmp_path / "files", {})
    (tmp_path / "files").mkdir(exist_ok=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "files" / f"{i}.png")
    from_array = zoo.load_images(tmp_path / "d.npz", seed=4).images
    assert torch.equal(from_array, zoo.load_images(tmp_path / "files", seed=4).images)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, "neither 'train_images' nor 'images'; it has x"),
        ({"images": np.zeros((2, 4, 4))}, r"'images' is float64 of shape \(2, 4, 4\); uint8"),
        ({"images": np.zeros((2, 4), np.uint8)}, r"uint8 of shape \(2, 4\)"),
        (
            {"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)},
            r"'labels' is int64 of shape \(3,\); 2 class indices",
        ),
        ({"images": np.zeros((2, 4, 4), np.uint8)}, "1 channels and does not say how"),
    ],
)
def test_npz_of_another_form_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message):
        zoo.load_images(tmp_path / "d.npz")


def test_npz_with_pickles_is_refused(tmp_path):
    np.savez(tmp_path / "d.npz", images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(FileFormatError, match="plain arrays"):
        zoo.load_images(tmp_path / "d.npz")


def test_normalising_with_too_few_numbers_is_refused(tmp_path):
    write(tmp_path, {"a.png": png(1)})
    with pytest.raises(DataError, match="3 channels cannot be normalised"):
        zoo.load_images(tmp_path, mean=(0.5,), std=(0.5,))


@pytest.mark.parametrize("name", ["broken.zip", "broken.npz"])
def test_broken_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(FileFormatError, match=name):
        zoo.load_images(tmp_path / name)


def _of_another_version(archive: bytes) -> bytes:
    """Every entry asks for version 9.9 of the format to be read."""
    local, central = b"PK\x03\x04", b"PK\x01\x02"
    found = bytearray(archive)
    for mark, at in ((local, 4), (central, 6)):
        start = found.find(mark)
        while start >= 0:
            found[start + at : start + at + 2] = (99).to_bytes(2, "little")
            start = found.find(mark, start + 4)
    return bytes(found)


def _with_a_name_that_is_no_text(archive: bytes) -> bytes:
    """Names are said to be UTF-8, and are not."""
    return archive.replace("é".encode(), b"\xff\xfe")


def _encrypted(archive: bytes) -> bytes:
    found = bytearray(archive)
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = found.find(mark)
        while start >= 0:
            found[start + at] |= 1
            start = found.find(mark, start + 4)
    return bytes(found)


@pytest.mark.parametrize("spoil", [_of_another_version, _with_a_name_that_is_no_text, _encrypted])
@pytest.mark.parametrize("name", ["odd.zip", "odd.npz"])
def test_an_archive_of_a_kind_that_is_not_read_is_refused(tmp_path, name, spoil):
    path = tmp_path / name
    if path.suffix == ".zip":
        write_zip(path, {"é/1.png": png(10)})
    else:
        arrays = {"images": np.zeros((2, 4, 4, 3), np.uint8), "é": np.zeros(1)}
        np.savez(path, **arrays)
    whole = path.read_bytes()
    zoo.load_images(path)
    path.write_bytes(spoil(whole))
    assert path.read_bytes() != whole
    with pytest.raises(FileFormatError, match=name):
        zoo.load_images(path)
    if spoil is not _encrypted:  # names can be read all the same
        with pytest.raises(FileFormatError, match=name):
            zoo.find_splits(path)


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(MissingFileError, match="there is no data"):
        zoo.load_images(tmp_path / "absent")
    with pytest.raises(DataError, match=r"holds no images; known are .*\.jpg"):
        zoo.load_images(tmp_path)
    with pytest.raises(DataError, match="limit of 0"):
        zoo.load_images(tmp_path, limit=0)
