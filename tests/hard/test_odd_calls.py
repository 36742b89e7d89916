"""Odd networks, data and options: a model that is within its budget, or an error with a name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from tests.hard.odd_calls import OddCall, odd_call, outcome

CALLS = 12


@st.composite
def odd_calls(draw: st.DrawFn) -> OddCall:
    """Calls that hypothesis chooses."""
    return odd_call(lambda options: draw(st.sampled_from(options)))


def test_any_call_ends_in_a_model_within_its_budget_or_in_an_error_with_a_name() -> None:
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=CALLS,
        phases=(Phase.generate,),  # what failed prints as what rebuilds it
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(call=odd_calls())
    def holds(call: OddCall) -> None:
        note(repr(call))
        with TemporaryDirectory() as folder:
            outcomes[outcome(call, Path(folder) / "small")] += 1

    holds()
    assert sum(outcomes.values()) >= CALLS
    assert outcomes["met"] > 0.3 * CALLS, outcomes
    assert len(outcomes) > 2, outcomes
