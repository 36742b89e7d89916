"""What the benchmarks hold our methods against is the network that it is said to be."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import eigendamage as ed
from eigendamage import zoo

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def competitors() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("competitors")


def test_shortcuts_of_torch_pruning_become_choices_of_channels_of_the_same_function(
    competitors: ModuleType,
) -> None:
    torch.manual_seed(0)
    model, x = zoo.resnet20(width=4).eval(), torch.randn(2, 3, 16, 16)
    convolved = competitors.with_convolved_shortcuts(model)
    small = competitors.torch_pruned(convolved, x[:1], None, "GroupMagnitude", "global", 0.6)
    indexed = competitors.with_indexed_shortcuts(small)

    torch.testing.assert_close(convolved(x), model(x))
    torch.testing.assert_close(indexed(x), small(x))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert competitors.shortcut_macs(small, x[:1]) > 0
    assert competitors.shortcut_macs(indexed, x[:1]) == 0


def test_stand_ins_for_shortcuts_are_not_trained(competitors: ModuleType) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 16, 16)
    convolved = competitors.with_convolved_shortcuts(zoo.resnet20(width=4).eval())
    small = competitors.torch_pruned(convolved, x, None, "GroupMagnitude", "global", 0.6)
    small(x).sum().backward()
    stands = [m.conv.weight for m in small.modules() if type(m).__name__ == "CopiedChannels"]
    assert len(stands) == 2
    assert all(weight.grad is None for weight in stands)
    assert small.conv1.weight.grad is not None


def test_inner_pruning_leaves_what_shortcuts_pass_on(competitors: ModuleType) -> None:
    torch.manual_seed(0)
    model, x = zoo.resnet20(width=8).eval(), torch.randn(1, 3, 16, 16)
    convolved = competitors.with_convolved_shortcuts(model)
    small = competitors.torch_pruned(convolved, x, None, "GroupMagnitude", "inner", 0.5)
    blocks = [*small.layer1, *small.layer2, *small.layer3]
    assert small.conv1.out_channels == 8
    assert [block.conv2.out_channels for block in blocks] == [8] * 3 + [16] * 3 + [32] * 3
    assert sum(block.conv1.out_channels for block in blocks) < 3 * (8 + 16 + 32)


def test_a_shortcut_that_has_learned_is_no_choice_of_channels(competitors: ModuleType) -> None:
    convolved = competitors.with_convolved_shortcuts(zoo.resnet20(width=4))
    with torch.no_grad():
        convolved.layer2[0].shortcut.conv.weight += 0.1
    with pytest.raises(ValueError, match="more than copy"):
        competitors.with_indexed_shortcuts(convolved)


@pytest.mark.parametrize("name", ["Tucker-2", "SVD"])
def test_low_rank_competitors_use_their_budget_and_leave_the_first_convolution_whole(
    competitors: ModuleType, name: str
) -> None:
    torch.manual_seed(0)
    model, x = zoo.resnet20(width=8).eval(), torch.randn(1, 3, 16, 16)
    small = competitors.competitors(model, x, [], {})[name](0.5)
    left = ed.count(small, x).macs / ed.count(model, x).macs
    assert 0.48 < left <= 0.5
    assert torch.equal(small.conv1.weight, model.conv1.weight)
    assert isinstance(small.layer1[0].conv1, torch.nn.Sequential)


def test_ranks_of_many_layers_do_not_all_round_alike(competitors: ModuleType) -> None:
    ranks = [competitors.rank_of(10, 0.55, index) for index in range(100)]
    assert set(ranks) == {5, 6}
    assert sum(ranks) == pytest.approx(550, abs=3)
    assert competitors.rank_of(10, 0.0, 0) == 1
