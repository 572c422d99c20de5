"""Velocities of least kinetic energy for laws as they are given. Numbers are those of arXiv 2412.03487 in our sheet."""

import itertools
import math

import pytest
import torch
from torch.func import jvp

from raydist.core.token_ids import TokenIds
from raydist.paths.base import JumpNoise
from raydist.paths.kinetic import KineticPath, rates_from_path
from raydist.paths.sources import UniformLaw
from raydist.paths.token_schedule import GreatCircle
from tests.paths.cases import built_path
from tests.paths.test_every_path import at, draws

NUM_STATES = 5


def velocity_of_laws(law, slope, *, rule="kinetic_optimal"):
    """``[x, z]``."""
    num = law.shape[0]
    rates = rates_from_path(law.expand(num, -1), slope.expand(num, -1), current_N=torch.arange(num), rule=rule).t()
    return rates - torch.diag(rates.sum(0))


def kinetic_energy(velocity_VV, *, laws_V):
    """``sum_{x != z} p(z) u(x, z)^2 / p(x)`` of a velocity ``[x, z]``."""
    energies_VV = velocity_VV**2 * laws_V[None, :] / laws_V[:, None]
    return energies_VV.sum() - energies_VV.diagonal().sum()


def random_smooth_path(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b, c = torch.randn(3, NUM_STATES, generator=generator, dtype=torch.float64)
    return lambda t: torch.softmax(a + b * t + c * torch.sin(3 * t), dim=0)


def at_random_points():
    for seed, time in itertools.product(range(4), (0.1, 0.6)):
        yield jvp(random_smooth_path(seed), (at(time),), (at(1.0),))


@pytest.mark.parametrize("rule", ["kinetic_optimal", "uniform"])
def test_e01_continuity_for_a_random_smooth_path(rule):
    for law, slope in at_random_points():
        velocity = velocity_of_laws(law, slope, rule=rule)
        torch.testing.assert_close(velocity @ law, slope, atol=1e-10, rtol=0)
        torch.testing.assert_close(velocity.sum(0), torch.zeros(NUM_STATES).double(), atol=1e-10, rtol=0)
        assert (velocity - torch.diag(velocity.diagonal()) >= 0).all()


def test_e02_least_energy():
    """``sum p'^2 / p``, below the other rule's and below that of the optimum plus any flow on a circle."""
    for index, (law, slope) in enumerate(at_random_points()):
        best = kinetic_energy(velocity_of_laws(law, slope), laws_V=law)
        assert best.item() == pytest.approx((slope**2 / law).sum().item(), rel=1e-10)
        assert kinetic_energy(velocity_of_laws(law, slope, rule="uniform"), laws_V=law) > best
        flux = torch.zeros(NUM_STATES, NUM_STATES, dtype=torch.float64)
        order = torch.randperm(NUM_STATES, generator=torch.Generator().manual_seed(index))
        flux[order.roll(-1), order] = 0.01
        other = velocity_of_laws(law, slope) + flux / law - torch.diag((flux / law).sum(0))
        torch.testing.assert_close(other @ law, slope, atol=1e-10, rtol=0)
        assert kinetic_energy(other, laws_V=law) > best


def test_tokens_of_probability_zero_have_no_velocity():
    law = torch.tensor([0.0, 0.25, 0.75], dtype=torch.float64)
    slope = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)
    for rule in ("kinetic_optimal", "uniform"):
        velocity = velocity_of_laws(law, slope, rule=rule)
        assert velocity[:, 0].tolist() == [0.0, 0.0, 0.0]
        torch.testing.assert_close(velocity @ law, slope)


@pytest.mark.parametrize("probability", [0.0, 0.03, 1 / 3, 0.9])
def test_e04_great_circle(probability):
    """The roots of p_t move on the great circle from the roots of p to the clean token, at squared speed ``4 Omega^2``."""
    rest = torch.softmax(torch.randn(3, generator=torch.Generator().manual_seed(2), dtype=torch.float64), 0)
    source = torch.cat([torch.tensor([probability], dtype=torch.float64), (1 - probability) * rest])
    schedule = GreatCircle(source, never_clean=None)
    omega = math.acos(math.sqrt(probability))
    clean = torch.tensor(0)
    end = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)

    def law(t):
        kappa = schedule.value(t, clean)
        return (1 - kappa) * source + kappa * end

    for time in (0.0, 0.2, 0.5, 0.99, 1.0):
        circle = (math.sin((1 - time) * omega) * source.sqrt() + math.sin(time * omega) * end) / math.sin(omega)
        torch.testing.assert_close(law(at(time)), circle**2, atol=1e-12, rtol=0)
        remaining = schedule.remaining(at(time), clean).item()
        assert remaining == pytest.approx(1 - schedule.value(at(time), clean).item(), abs=1e-12)
    for time in (0.2, 0.5, 0.99):
        here, slope = jvp(law, (at(time),), (at(1.0),))
        used = here > 0
        assert (slope[used] ** 2 / here[used]).sum().item() == pytest.approx(4 * omega**2, rel=1e-9)
        kappa, derivative = jvp(lambda t: schedule.value(t, clean), (at(time),), (at(1.0),))
        assert schedule.jump_rate(at(time), clean).item() == pytest.approx((derivative / (1 - kappa)).item(), rel=1e-9)
        assert schedule.jump_rate(at(time), clean).item() == pytest.approx(2 * omega / math.tan((1 - time) * omega))
        assert schedule.reverse_rate(at(time), clean).item() == pytest.approx((derivative / kappa).item(), rel=1e-9)
    assert schedule.value(at(0.0), clean) == 0
    assert schedule.jump_rate(at(1.0), clean) == math.inf
    assert schedule.reverse_rate(at(0.0), clean) == math.inf
    at_start = 0.0 if probability == 0 else 2 * omega / math.tan(omega)
    assert schedule.jump_rate(at(0.0), clean).item() == pytest.approx(at_start, abs=1e-12)


def test_great_circle_for_a_source_that_is_the_clean_token():
    """The limit ``kappa = 1 - (1 - t)^2``."""
    schedule = GreatCircle(torch.tensor([1.0, 0.0]), never_clean=None)
    assert schedule.value(at(0.3), torch.tensor(0)).item() == pytest.approx(1 - 0.7**2, abs=1e-7)


def test_token_dependent_rates_and_the_fastest_tokens():
    source = torch.tensor([0.5, 0.2, 0.05, 0.25, 0.0])
    schedule = GreatCircle(source, never_clean=None)
    every = torch.arange(5)
    rates = schedule.rates.at(torch.tensor([0.3, 0.9]))
    assert rates.shape == (2, 5)
    assert len(set(rates[0].tolist())) == 5
    for index, time in enumerate((0.3, 0.9)):
        torch.testing.assert_close(rates[index], schedule.jump_rate(torch.tensor(time), every), rtol=1e-5, atol=0)
    for time in (0.01, 0.3, 0.9):
        forward, backward = schedule.jump_rate(at(time), every), schedule.reverse_rate(at(time), every)
        assert forward.argmax() == schedule.fastest_forward
        assert backward.argmax() == schedule.fastest_backward
    flat = GreatCircle(torch.tensor([0.25, 0.25, 0.0, 0.25, 0.25]), never_clean=2)
    assert flat.rates.at(torch.tensor([0.3, 0.9])).shape == (2, 1)


class Detour(KineticPath):
    """A path as a user would write it: from uniform to the clean token, by way of token 0."""

    def laws(self, clean_N, time_N):
        time_N1 = time_N[:, None]
        one_hot = torch.nn.functional.one_hot
        target, detour = one_hot(clean_N, self.vocab_size), one_hot(torch.zeros_like(clean_N), self.vocab_size)
        noise = torch.full((1, self.vocab_size), 1 / self.vocab_size, dtype=time_N.dtype)
        bump_N1 = time_N1 * (1 - time_N1)
        return (1 - time_N1) ** 2 * noise + 2 * bump_N1 * 0.5 * (detour + noise) + time_N1**2 * target


def test_a_users_path_needs_its_laws_only():
    """Continuity of the differentiated velocity, for any clean token, and draws in a sampler's inference mode."""
    path = Detour(source=UniformLaw(TokenIds(vocab_size=4, bos=None, eos=None, mask=None, pad=None)))
    for clean, time in itertools.product(range(1, 4), (0.2, 0.8)):
        here = torch.tensor([[clean]])
        law, slope = jvp(
            lambda t, here=here: path.probabilities(here, t)[0, 0], (at(time, (1, 1)),), (at(1.0, (1, 1)),)
        )
        every = torch.arange(4)[None, :]
        velocity = path.velocity(torch.full_like(every, clean), every, at(time, every.shape))[0].t()
        torch.testing.assert_close(velocity @ law, slope, atol=1e-12, rtol=0)
    clean_BL = torch.tensor([[1, 2, 3]]).expand(64, -1)
    noise = JumpNoise(whether=draws(1, 64, 3), where=draws(2, 64, 3))
    times = {"start_time_BL": at(0.5, (1, 1)), "stop_time_BL": at(0.7, (1, 1)), "corrector_BL": None}
    outside = path.jump(torch.zeros_like(clean_BL), clean_BL=clean_BL, noise=noise, **times)
    with torch.inference_mode():
        inside = path.jump(torch.zeros_like(clean_BL), clean_BL=clean_BL.clone(), noise=noise, **times)
    assert torch.equal(inside, outside)
    assert (outside != 0).any()


def test_positions_that_stay_clean_cost_nothing(monkeypatch):
    path = Detour(source=UniformLaw(TokenIds(vocab_size=4, bos=None, eos=None, mask=None, pad=None)))
    asked, laws = [], path.laws
    monkeypatch.setattr(path, "laws", lambda clean_N, time_N: asked.append(len(clean_N)) or laws(clean_N, time_N))
    clean_BL = torch.tensor([[1, 2, 3], [3, 3, 3]])
    start_BL = torch.tensor([[1, 2, 0], [3, 3, 3]])
    noise = {"time_BL": at(0.5, (2, 1)), "uniforms_BL": draws(1, 2, 3)}
    noised_BL = path.corrupt(clean_BL, start_BL=start_BL, **noise)
    assert asked == [1]
    assert torch.equal(noised_BL[start_BL == clean_BL], clean_BL[start_BL == clean_BL])
    assert torch.equal(path.corrupt(clean_BL, start_BL=clean_BL, **noise), clean_BL)


def test_three_way_path_is_its_three_parts(tmp_path):
    """At t = 1/2 with ``kappa = t^2`` and r = 0.8: 1/4 data, 0.15 random over the four symbols, the rest mask."""
    path = built_path({"name": "three_way", "randomness": 0.8}, tmp_path)
    law = path.probabilities(torch.tensor([[3]]), at(0.5, (1, 1)))[0, 0]
    expected = torch.tensor([0.0375, 0.0375, 0.6, 0.2875, 0.0375], dtype=torch.float64)
    torch.testing.assert_close(law, expected, atol=1e-12, rtol=0)


def test_three_way_velocity_has_at_most_the_energy_of_the_weighted_form(tmp_path):
    """Against the velocity of arXiv 2407.15595, ``sum_j a_j w_j + b delta_z`` with the slowest part's ratio b."""
    ids = TokenIds(vocab_size=4, bos=None, eos=None, mask=3, pad=None)
    path = built_path({"name": "three_way", "randomness": 0.8}, tmp_path, ids=ids)
    clean, time = 1, 0.6
    uniform, mask, target = (
        torch.tensor(w, dtype=torch.float64) for w in ([1 / 3, 1 / 3, 1 / 3, 0], [0, 0, 0, 1.0], [0, 1.0, 0, 0])
    )
    parts = torch.stack([target, uniform, mask])

    def shares(t):
        kappa = t**2
        return torch.stack([kappa, 0.8 * kappa * (1 - kappa), (1 - kappa) * (1 - 0.8 * kappa)])

    share, slope = jvp(shares, (at(time),), (at(1.0),))
    ratio = (slope / share).min()
    theirs = ((slope - share * ratio) @ parts)[:, None] + ratio * torch.eye(4, dtype=torch.float64)
    law = share @ parts
    torch.testing.assert_close(theirs @ law, slope @ parts, atol=1e-12, rtol=0)
    every = torch.arange(4)[None, :]
    ours = path.velocity(torch.full_like(every, clean), every, at(time, every.shape))[0].t()
    torch.testing.assert_close(ours @ law, slope @ parts, atol=1e-12, rtol=0)
    assert kinetic_energy(ours, laws_V=law) <= kinetic_energy(theirs, laws_V=law)
