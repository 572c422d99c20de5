"""Schedules: closed forms against autograd, inverse round trips, and the limits at both ends."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydist.config.registries import SCHEDULES
from raydist.core.errors import ConfigError
from raydist.paths.schedules import CubicSchedule, LinearSchedule, LogLinearSchedule, PolynomialSchedule, Schedule
from tests.paths.cases import SCHEDULE_FIELDS, SHARED_SCHEDULES

INSIDE = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
ENDS = torch.tensor([0.0, 1.0], dtype=torch.float64)
IDS = [f"{fields['name']}{index}" for index, fields in enumerate(SHARED_SCHEDULES)]
every_schedule = pytest.mark.parametrize("schedule", [SCHEDULES.parse(fields) for fields in SHARED_SCHEDULES], ids=IDS)


def test_every_registered_schedule_is_tried():
    assert {fields["name"] for fields in SCHEDULE_FIELDS} == set(SCHEDULES.classes())


@every_schedule
def test_derivative_is_that_of_autograd(schedule):
    time = INSIDE.clone().requires_grad_()
    (expected,) = torch.autograd.grad(schedule.value(time).sum(), time)
    torch.testing.assert_close(schedule.derivative(INSIDE), expected, rtol=1e-12, atol=1e-12)
    assert (schedule.derivative(INSIDE) >= 0).all()


@every_schedule
def test_closed_forms_are_those_of_the_definitions(schedule):
    kappa, slope = schedule.value(INSIDE), schedule.derivative(INSIDE)
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(schedule.remaining(INSIDE), 1 - kappa, **close)
    torch.testing.assert_close(schedule.jump_rate(INSIDE), slope / (1 - kappa), **close)
    torch.testing.assert_close(schedule.reverse_rate(INSIDE), slope / kappa, **close)
    expected = (kappa[1:] - kappa[:-1]) / (1 - kappa[:-1])
    torch.testing.assert_close(schedule.jump_probability(INSIDE[:-1], INSIDE[1:]), expected, **close)


@every_schedule
def test_ends(schedule):
    start = schedule.eps if isinstance(schedule, LogLinearSchedule) else 0.0
    assert schedule.value(ENDS).tolist() == pytest.approx([start, 1.0], abs=1e-15)
    assert schedule.remaining(ENDS).tolist() == pytest.approx([1 - start, 0.0], abs=1e-15)
    assert schedule.inverse(torch.tensor([start, 1.0], dtype=torch.float64)).tolist() == pytest.approx([0.0, 1.0])
    assert schedule.jump_rate(ENDS)[1] == math.inf
    assert schedule.reverse_rate(ENDS)[0] == (math.inf if start == 0 else (1 - start) / start)
    assert not torch.isnan(schedule.jump_rate(ENDS)).any()
    assert not torch.isnan(schedule.reverse_rate(ENDS)).any()
    one = ENDS[1:]
    assert schedule.jump_probability(torch.cat([ENDS, INSIDE[:3]]), one).tolist() == [1.0] * 5


@every_schedule
def test_nothing_cancels_near_the_data(schedule):
    """``lambda_t (1 - t)`` tends to the order of the zero of ``1 - kappa`` at t = 1, in float32 too."""
    rest = torch.tensor([2.0**-12, 2.0**-16, 2.0**-20])
    orders = (schedule.jump_rate(1 - rest) * rest).tolist()
    nearest = max(round(orders[0]), 1)
    assert orders == pytest.approx([nearest] * 3, rel=5e-3)


@pytest.mark.parametrize(
    ("name", "at_start"),
    [("linear", 1.0), ("log_linear", 1.0), ("cosine", 0.0), ("sine", math.pi / 2), ("kinetic_optimal", 0.0)],
)
def test_jump_rate_at_the_start(name, at_start):
    assert SCHEDULES.parse(name).jump_rate(ENDS[:1]).item() == pytest.approx(at_start, abs=1e-15)


@pytest.mark.parametrize(("power", "at_start"), [(0.5, math.inf), (1.0, 1.0), (1.5, 0.0), (3.0, 0.0)])
def test_polynomial_jump_rate_at_the_start(power, at_start):
    assert PolynomialSchedule(power=power).jump_rate(ENDS[:1]).item() == at_start


@every_schedule
@given(time=st.floats(0.0, 1.0))
@settings(max_examples=30, deadline=None)
def test_inverse_round_trip(schedule, time):
    time = torch.tensor([time], dtype=torch.float64)
    kappa = schedule.value(time).clamp(max=1)
    again = schedule.value(schedule.inverse(kappa))
    assert again.item() == pytest.approx(kappa.item(), rel=1e-12, abs=1e-15)
    if schedule.derivative(time) > 1e-3:
        assert schedule.inverse(kappa).item() == pytest.approx(time.item(), rel=1e-9, abs=1e-9)


@every_schedule
def test_dtype_is_kept(schedule):
    time = INSIDE.float()
    for method in (schedule.value, schedule.derivative, schedule.inverse, schedule.jump_rate, schedule.remaining):
        assert method(time).dtype == torch.float32


def test_e09_cubic_family():
    """Invariant 9 of arXiv 2407.15595: the cubic's special members, ends and slopes."""
    for (a, b), power in {(1.0, 1.0): 1, (0.0, 2.0): 2, (0.0, 3.0): 3}.items():
        cubic = CubicSchedule(slope_at_noise=a, slope_at_data=b)
        torch.testing.assert_close(cubic.value(INSIDE), INSIDE**power, rtol=1e-12, atol=1e-14)
    for a in (0.0, 0.7, 3.0):
        for b in (0.0, 1.3, 3.0):
            cubic = CubicSchedule(slope_at_noise=a, slope_at_data=b)
            t = INSIDE
            plain = -2 * t**3 + 3 * t**2 + a * (t**3 - 2 * t**2 + t) + b * (t**3 - t**2)
            torch.testing.assert_close(cubic.value(t), plain, rtol=1e-12, atol=1e-14)
            assert cubic.derivative(ENDS).tolist() == pytest.approx([a, b])


def test_a_schedule_needs_two_methods_only():
    class Quartic(Schedule):
        name: str = "quartic"

        def value(self, time):
            return time**4

        def derivative(self, time):
            return 4 * time**3

    ours, closed = Quartic(), PolynomialSchedule(power=4)
    for method in ("remaining", "inverse", "jump_rate", "reverse_rate"):
        torch.testing.assert_close(getattr(ours, method)(INSIDE), getattr(closed, method)(INSIDE), rtol=1e-9, atol=0)


def test_log_linear_is_the_noise_of_mdlm():
    """``kappa = exp(-sigma)`` with ``sigma = -log(1 - (1 - eps) s)``; the loss weight ``sigma' / (e^sigma - 1)`` is 1 / s."""
    s = (1 - INSIDE).requires_grad_()
    sigma = -torch.log(1 - (1 - 1e-3) * s)
    (slope,) = torch.autograd.grad(sigma.sum(), s)
    schedule = LogLinearSchedule(eps=1e-3)
    torch.testing.assert_close(schedule.value(INSIDE), torch.exp(-sigma).detach())
    torch.testing.assert_close(schedule.jump_rate(INSIDE), (slope / (torch.exp(sigma) - 1)).detach())
    torch.testing.assert_close(LogLinearSchedule(eps=0).value(INSIDE), LinearSchedule().value(INSIDE))


def test_a_wrong_field_names_its_key():
    with pytest.raises(ConfigError) as error:
        SCHEDULES.parse({"name": "polynomial", "power": 0})
    assert error.value.where == "objective.path.schedule.power"
