"""Every scheme as a list of phases."""

from __future__ import annotations

import pytest

from nulsq_cli.schemes import SCHEMES, phases
from nulsq_cli.values import Bits

LOW = Bits(4, 4)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_ends_at_the_width_that_was_asked_for_and_has_no_empty_phase(name):
    for epochs in (0, 1, 7, 30):
        found = phases(name, LOW, epochs, {})
        assert all(phase.epochs > 0 for phase in found)
        assert not found or found[-1].bits == LOW
        assert not found or not found[0].continues
        taught = any(phase.lesson != "labels" for phase in found)
        assert taught == (SCHEMES[name].needs_teacher and bool(found))


def test_qkd_divides_its_epochs_over_one_schedule():
    found = phases("qkd", LOW, 200, {"self_study": 0.15, "co_study": 0.5})
    assert [(p.name, p.epochs, p.lesson, p.continues) for p in found] == [
        ("self-study", 30, "labels", False), ("co-study", 100, "mutual", True), ("tutoring", 70, "tutor", True),
    ]  # fmt: skip
    assert sum(p.epochs for p in phases("qkd", LOW, 7, {})) == 7


def test_profit_goes_down_the_ladder_and_then_freezes_third_by_third():
    found = phases("profit", LOW, 15, {})
    assert [(p.name, str(p.bits), p.epochs) for p in found] == [
        ("float", "32/32", 15), ("activations 8", "32/8", 15), ("activations 5", "32/5", 15), ("activations 4", "32/4", 15),
        ("weights 8", "8/4", 15), ("weights 5", "5/4", 15), ("sampling", "4/4", 5),
        ("frozen 0/3", "4/4", 15), ("frozen 1/3", "4/4", 15), ("frozen 2/3", "4/4", 15),
    ]  # fmt: skip
    assert [p.frozen_share for p in found[-3:]] == [0, 1 / 3, 2 / 3] and found[6].samples_instability
    with_norms = phases(
        "profit", Bits(2, 2), 1, {"ladder": [4], "norm_epochs": 2, "float_epochs": 0, "sampling_epochs": 0, "parts": 1}
    )
    assert [(p.name, str(p.bits), p.epochs, p.only_norms) for p in with_norms[:3]] == [
        ("activations 4, norms", "32/4", 2, True), ("activations 4", "32/4", 1, False), ("activations 4, norms", "32/4", 2, True),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "words"), [
    ("qkd", {"self_study": 0.8, "co_study": 0.5}, "shares"), ("profit", {"ladder": [4, 8]}, "descending"),
    ("profit", {"parts": 0}, "parts"), ("kd", {"x": 1}, "'x'"),
])  # fmt: skip
def test_bad_options_are_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        phases(name, LOW, 10, options)
