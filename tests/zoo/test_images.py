import random

import numpy as np
import pytest
import torch

from eigendamage import zoo
from eigendamage.errors import DataError


@pytest.fixture
def ten() -> zoo.ImageSet:
    images = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 1, 6, 6)
    return zoo.ImageSet(images, torch.arange(10), ())


def order(batches: zoo.ImageBatches) -> list[int]:
    return torch.cat([labels for _, labels in batches]).tolist()


@pytest.mark.parametrize(("split", "each"), [("train", 1_200), ("test", 200)])
def test_bundled_images_are_balanced_and_shuffled(split, each):
    images = zoo.fashion_mnist(split)
    assert images.images.shape == (10 * each, 1, 28, 28)
    assert images.labels.bincount().tolist() == [each] * 10
    # Sorted by class, the first tenth would hold one class.
    assert len(images.labels[:each].unique()) == 10
    assert len(images.class_names) == 10


def test_bundled_images_are_normalised_by_the_constants_of_the_whole_data_set():
    images = zoo.fashion_mnist("train").images
    assert images.dtype == torch.float32
    assert images.min().item() == pytest.approx(-0.286 / 0.353, abs=1e-5)
    assert images.max().item() == pytest.approx((1 - 0.286) / 0.353, abs=1e-5)
    # A fifth of the data has the mean and the spread of all of it, but for chance.
    assert abs(images.mean().item()) < 0.01
    assert abs(images.std().item() - 1) < 0.01


def test_no_test_image_is_among_the_training_images():
    train, test = (
        {image.numpy().tobytes() for image in zoo.fashion_mnist(split).images}
        for split in ("train", "test")
    )
    assert len(train & test) == 0


def test_batches_without_a_seed_keep_the_order_and_hold_everything(ten):
    batches = ten.batches(4)
    assert [len(images) for images, _ in batches] == [4, 4, 2]
    assert len(batches) == 3
    assert order(batches) == order(batches) == list(range(10))


def test_images_stay_with_their_labels(ten):
    for images, labels in ten.batches(3, shuffle_seed=1, augment=True):
        assert torch.equal(images[:, 0, 0, 0], labels.float())


def test_each_pass_has_an_order_of_its_own_that_the_seed_fixes(ten):
    one, two, other = (ten.batches(4, shuffle_seed=seed) for seed in (7, 7, 8))
    first, second = order(one), order(one)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert [order(two), order(two)] == [first, second]
    assert order(other) != first


def test_augmented_images_are_crops_of_the_padded_image_or_of_its_mirror_image():
    image = torch.arange(36.0).view(1, 6, 6)
    images = zoo.ImageSet(image.expand(200, 1, 6, 6).contiguous())
    padded = torch.nn.functional.pad(image[None], (2, 2, 2, 2), mode="replicate")[0]
    crops = [padded[:, y : y + 6, x : x + 6] for y in range(5) for x in range(5)]
    allowed = {c.numpy().tobytes() for crop in crops for c in (crop, crop.flip(2).contiguous())}
    (batch,) = images.batches(200, augment=True)
    seen = {image.numpy().tobytes() for image in batch}
    assert seen <= allowed
    # 200 draws from 50 miss one with a chance of 1.8 % each.
    assert len(seen) > 40


def test_global_generators_are_untouched(ten):
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    order(ten.batches(2, shuffle_seed=3, augment=True))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_unlabeled_batches_are_bare_images():
    images = zoo.ImageSet(torch.zeros(5, 3, 4, 4))
    assert [batch.shape for batch in images.batches(3)] == [(3, 3, 4, 4), (2, 3, 4, 4)]


def test_take_keeps_images_labels_and_names_together(ten):
    named = zoo.ImageSet(ten.images, ten.labels, tuple("abcdefghij"))
    part = named.take(slice(-3, None))
    assert part.labels.tolist() == part.images[:, 0, 0, 0].tolist() == [7, 8, 9]
    assert part.class_names == named.class_names
    assert named.take(torch.tensor([4, 2])).labels.tolist() == [4, 2]


def test_labels_must_be_as_many_as_images():
    with pytest.raises(DataError, match="3 images come with 2 labels"):
        zoo.ImageSet(torch.zeros(3, 1, 2, 2), torch.zeros(2, dtype=torch.int64))


def test_empty_set_and_empty_batches_are_refused(ten):
    with pytest.raises(DataError, match="batch size of 0"):
        ten.batches(0)
    with pytest.raises(DataError, match="empty"):
        ten.take(slice(0, 0)).batches(2)
