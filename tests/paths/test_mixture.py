"""The mixture path against the master equation of a whole sequence, and its integrated steps.

Numbers in test names: ``dfm`` those of arXiv 2407.15595, ``kinetic`` those of arXiv 2412.03487 in our sheets.
"""

import itertools
import math

import pytest
import torch

from raydist.config.registries import PATHS
from raydist.core.errors import ConfigError
from raydist.core.token_ids import TokenIds
from raydist.paths.base import JumpNoise
from raydist.paths.schedules import PolynomialSchedule
from tests.paths.cases import IDS, MASK, built_path
from tests.paths.test_every_path import at, dense_velocity, draws, fits, jump_law
from tests.sampling.oracle import random_law

SMALL = TokenIds(vocab_size=4, bos=None, eos=None, mask=3, pad=None)
STATES = torch.tensor(list(itertools.product(range(4), repeat=2)))
DATA = torch.tensor(list(itertools.product(range(3), repeat=2)))
TARGET = random_law((3, 3), seed=4).flatten()
SOURCES = ["mask", "uniform"]


def small_path(source, schedule="linear", **more):
    return PATHS.parse({"name": "mixture", "source": source, "schedule": schedule, **more}).build(SMALL)


def marginal(path, time):
    """``p_t(x)`` over all 16 states, and the joint with the data ``[x1, x]``; differentiable in time."""
    laws_DNV = path.probabilities(DATA, time.expand(DATA.shape))
    joint_DX = TARGET[:, None] * laws_DNV[:, 0, STATES[:, 0]] * laws_DNV[:, 1, STATES[:, 1]]
    return joint_DX.sum(0), joint_DX


def posteriors(path, time):
    """``p_{1|t}(. | x)`` at both positions, ``[x, 2, V]``; uniform for states that the path never visits."""
    law_X, joint_DX = marginal(path, at(time))
    one_hot = torch.nn.functional.one_hot(DATA, 4).double()
    return torch.where(
        law_X[:, None, None] > 0,
        torch.einsum("dx,dnv->xnv", joint_DX, one_hot) / law_X.clamp(min=1e-300)[:, None, None],
        torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0], dtype=torch.float64),
    )


def marginal_generator(path, time, *, forward=1.0, preserving=0.0):
    """Rates between whole states ``[to, from]``: ``sum_i sum_x1 p(x1 | z) u^i``."""
    posterior_XNV = posteriors(path, time)
    generator = torch.zeros(16, 16, dtype=torch.float64)
    velocities = torch.zeros(4, 4, 4, dtype=torch.float64)  # [x1, to, from]
    for clean in range(3):
        every = torch.arange(4)[None, :]
        there = at(time, (1, 4))
        rates = forward * path.velocity(torch.full_like(every, clean), every, there)[0]
        if preserving:
            rates = rates + preserving * path.preserving_velocity(torch.full_like(every, clean), every, there)[0]
        velocities[clean] = rates.t()
    for z, i in itertools.product(range(16), range(2)):
        rates_V = torch.einsum("c,cv->v", posterior_XNV[z, i], velocities[:, :, STATES[z, i]])
        for value in range(4):
            target = STATES[z].clone()
            target[i] = value
            generator[int(target[0]) * 4 + int(target[1]), z] += rates_V[value]
    return generator


@pytest.mark.parametrize("schedule", ["linear", {"name": "polynomial", "power": 3.0}, "source_kinetic_optimal"])
@pytest.mark.parametrize("source", SOURCES)
def test_dfm_02_kolmogorov_forward_equation(source, schedule):
    """``p_t' = U p_t`` for alpha - beta = 1, and ``0 = U p_t`` for alpha = beta, on all 16 states."""
    path = small_path(source, schedule)
    for time in (0.2, 0.7):
        law, derivative = torch.func.jvp(lambda t: marginal(path, t)[0], (at(time),), (at(1.0),))
        for corrector in (0.0, 2.5):
            generator = marginal_generator(path, time, preserving=corrector)
            torch.testing.assert_close(generator @ law, derivative, atol=1e-10, rtol=0)
        frozen = marginal_generator(path, time, forward=0.0, preserving=1.0)
        torch.testing.assert_close(frozen @ law, torch.zeros(16).double(), atol=1e-10, rtol=0)


def test_dfm_04_the_master_equation_reaches_the_data():
    """Runge-Kutta on ``p' = U p`` from the source, in steps that shrink towards t = 1, where the rates grow."""
    path = small_path("uniform", {"name": "polynomial", "power": 2.0})
    law = marginal(path, at(0.0))[0]
    grid = [1 - (1 - i / 80) ** 2 for i in range(79)]
    for start, stop in itertools.pairwise(grid):
        first, middle, last = (marginal_generator(path, t) for t in (start, (start + stop) / 2, stop))
        k1 = first @ law
        k2 = middle @ (law + (stop - start) / 2 * k1)
        k3 = middle @ (law + (stop - start) / 2 * k2)
        k4 = last @ (law + (stop - start) * k3)
        law = law + (stop - start) / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    torch.testing.assert_close(law, marginal(path, at(grid[-1]))[0], atol=1e-6, rtol=0)
    data = torch.zeros(16, dtype=torch.float64)
    data[DATA[:, 0] * 4 + DATA[:, 1]] = TARGET
    assert (law - data).abs().sum() < 2 * 2 * (1 - grid[-1] ** 2)


def test_dfm_05_mask_posterior_depends_on_neither_time_nor_schedule():
    expected = posteriors(small_path("mask"), 0.5)
    for schedule, time in itertools.product(["linear", "cosine"], (0.1, 0.9)):
        torch.testing.assert_close(posteriors(small_path("mask", schedule), time), expected)


def test_another_schedule_has_the_posterior_of_the_time_with_the_same_kappa():
    """Sheet (d) of arXiv 2407.15595: ``t' = kappa^-1(kappa'_t)``."""
    trained, wanted = PolynomialSchedule(power=3.0), PolynomialSchedule(power=1.5)
    time = trained.inverse(wanted.value(at(0.4))).item()
    there = posteriors(small_path("uniform", wanted.model_dump()), 0.4)
    torch.testing.assert_close(there, posteriors(small_path("uniform", trained.model_dump()), time))


def step_kernel(path, start, stop, *, corrector=None):
    """The law of one sampler step with the exact posterior, ``[to, from]``: positions move independently."""
    grid = ((torch.arange(64) + 0.5) / 64).double()
    whether, where = (draw.reshape(1, -1) for draw in torch.meshgrid(grid, grid, indexing="ij"))
    tokens_VVV = torch.zeros(4, 4, 4, dtype=torch.float64)  # [x1, from, to]
    for clean, current in itertools.product(range(4), range(4)):
        after = path.jump(
            torch.full(whether.shape, current),
            clean_BL=torch.full(whether.shape, clean),
            start_time_BL=at(start, (1, 1)),
            stop_time_BL=at(stop, (1, 1)),
            corrector_BL=None if corrector is None else at(corrector, (1, 1)),
            noise=JumpNoise(whether=whether, where=where),
        )
        tokens_VVV[clean, current] = torch.bincount(after[0], minlength=4) / after.numel()
    moves_XNV = torch.einsum("xnc,xncv->xnv", posteriors(path, start), tokens_VVV[:, STATES].permute(1, 2, 0, 3))
    return torch.einsum("xa,xb->abx", moves_XNV[:, 0], moves_XNV[:, 1]).reshape(16, 16)


@pytest.mark.parametrize("corrector", [None, 0.5])
@pytest.mark.parametrize("source", SOURCES)
def test_dfm_06_kinetic_10_sampler_law_converges_to_the_data(source, corrector):
    """With the exact posterior: at n = 1 the product of the marginals, then ever nearer to the data."""
    path = small_path(source)
    data = torch.zeros(16, dtype=torch.float64)
    data[DATA[:, 0] * 4 + DATA[:, 1]] = TARGET
    table = TARGET.reshape(3, 3)
    product = torch.zeros(4, 4, dtype=torch.float64)
    product[:3, :3] = table.sum(1)[:, None] * table.sum(0)
    distances = []
    for num_steps in (1, 4, 16):
        law = marginal(path, at(0.0))[0]
        for step in range(num_steps):
            law = step_kernel(path, step / num_steps, (step + 1) / num_steps, corrector=corrector) @ law
        distances.append(float((law - data).abs().sum()))
        if num_steps == 1:
            torch.testing.assert_close(law, product.flatten(), atol=1e-10, rtol=0)
    assert distances[1] < 0.6 * distances[0]
    assert distances[2] < 0.6 * distances[1]


def test_dfm_07_one_position_is_exact_for_any_number_of_steps():
    """One masked position, any grid: the reveal probabilities leave the law of x1 untouched, and chain exactly."""
    path = PATHS.parse({"name": "mixture", "schedule": "cosine"}).build(IDS)
    whether = ((torch.arange(1000) + 0.5) / 1000).double()[None, :]
    masked = torch.full(whether.shape, MASK)
    for start, stop in ((0.0, 0.3), (0.2, 0.21), (0.7, 0.999)):
        after = path.jump(
            masked,
            clean_BL=torch.zeros_like(masked),
            start_time_BL=at(start, (1, 1)),
            stop_time_BL=at(stop, (1, 1)),
            corrector_BL=None,
            noise=JumpNoise(whether=whether, where=whether),
        )
        kappa = [1 - math.cos(math.pi * t / 2) for t in (start, stop)]
        expected = (kappa[1] - kappa[0]) / (1 - kappa[0])
        assert (after == 0).double().mean().item() == pytest.approx(expected, abs=1e-3)


def test_dfm_08_corrector_iterations_converge_to_the_path():
    """alpha = beta at frozen time, from another law of full support."""
    path = small_path("uniform", "linear")
    wanted = marginal(path, at(0.6))[0]
    generator = marginal_generator(path, 0.6, forward=0.0, preserving=1.0)
    law = torch.matrix_exp(40.0 * generator) @ torch.full((16,), 1 / 16, dtype=torch.float64)
    reachable = wanted > 0
    law = torch.where(reachable, law, 0.0)
    torch.testing.assert_close(law / law.sum(), wanted, atol=1e-8, rtol=0)


@pytest.mark.parametrize("source", ["uniform", "given"])
@pytest.mark.parametrize("schedule", ["sine", "source_kinetic_optimal"])
def test_integrated_steps_with_corrector_integrate_the_hazards(source, schedule, tmp_path):
    """The law of one step from the hazards ``integral of u + c v`` over it, by Simpson's rule on the dense rates."""
    rows, start, stop, corrector = 20_000, 0.3, 0.6, 0.8
    path = built_path({"name": "mixture", "source": source, "schedule": {"name": schedule}}, tmp_path, rows=rows)
    clean = 3
    times = torch.linspace(start, stop, 21).tolist()
    weights = torch.tensor([1.0, *[4.0, 2.0] * 9, 4.0, 1.0]).double() * (stop - start) / 60
    rates = torch.stack(
        [
            dense_velocity(path, clean, t) + corrector * dense_velocity(path, clean, t, method="preserving_velocity")
            for t in times
        ]
    )
    hazards = torch.einsum("t,txz->xz", weights, rates)
    for z in (0, clean):
        after = path.jump(
            torch.full((rows, 1), z),
            clean_BL=torch.full((rows, 1), clean),
            start_time_BL=at(start, (1, 1)),
            stop_time_BL=at(stop, (1, 1)),
            corrector_BL=at(corrector, (1, 1)),
            noise=JumpNoise(whether=draws(1, rows, 1), where=draws(2, rows, 1)),
        )
        assert fits(after, jump_law(hazards[:, z], z))


@pytest.mark.parametrize("step_rule", ["integrated", "euler"])
def test_no_corrector_where_the_reverse_rate_is_infinite(step_rule):
    """At t = 0 a corrected step is the plain one."""
    path = small_path("uniform", "linear", step_rule=step_rule)
    current_BL, clean_BL = draws(3, 500, 2).mul(3).long(), draws(4, 500, 2).mul(3).long()
    step = {"clean_BL": clean_BL, "start_time_BL": at(0.0, (1, 1)), "stop_time_BL": at(0.2, (1, 1))}
    noise = JumpNoise(whether=draws(5, 500, 2), where=draws(6, 500, 2))
    corrected = path.jump(current_BL, corrector_BL=at(5.0, (1, 1)), noise=noise, **step)
    assert torch.equal(corrected, path.jump(current_BL, corrector_BL=None, noise=noise, **step))
    assert (corrected != current_BL).any()


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_kinetic_06_the_optimal_velocity_of_a_mixture_is_dfms(power, tmp_path):
    """``[p(z) p'(x) - p'(z) p(x)]_+ / p(z)`` of the mixture's probabilities equals its own velocity."""
    from tests.paths.test_kinetic import velocity_of_laws

    fields = {"name": "mixture", "source": "given", "schedule": {"name": "polynomial", "power": power}}
    path = built_path(fields, tmp_path)
    for time, clean in itertools.product((0.1, 0.8), (0, 3)):
        law, slope = torch.func.jvp(
            lambda t, clean=clean: path.probabilities(torch.tensor([[clean]]), t.expand(1, 1))[0, 0],
            (at(time),),
            (at(1.0),),
        )
        visited = law > 0
        expected = dense_velocity(path, clean, time)[:, visited]
        torch.testing.assert_close(velocity_of_laws(law, slope)[:, visited], expected, atol=1e-9, rtol=0)


def negative_bound(path, posterior, *, num_points=4000):
    """The integral over t of the bound of one position with data law q (general form with token rates), midpoint rule."""
    symbols = torch.arange(4)
    data = TARGET.reshape(3, 3).sum(1)
    total = 0.0
    times = (torch.arange(num_points) + 0.5) / num_points
    for time in times.double().tolist():
        laws_DV = path.probabilities(symbols[None, :3], at(time, (1, 3)))[0]
        denoiser_VD = posterior(data[:, None] * laws_DV, time)
        rates_D = path.rates.at(torch.tensor([time]).double())[0].expand(4)[:3]
        current, clean = torch.meshgrid(symbols, symbols[:3], indexing="ij")
        differs = (current != clean).double()
        here = torch.where(current < 3, (rates_D * denoiser_VD).gather(1, current.clamp(max=2)), 0.0)
        logs = denoiser_VD.clamp(min=1e-300).log()
        cost = (rates_D * denoiser_VD).sum(1, keepdim=True) - here - differs * rates_D[clean] * (1 + logs)
        total += float((data * laws_DV.t() * cost).sum()) / num_points
    return total


def exact(joint_DV, time):
    return (joint_DV / joint_DV.sum(0).clamp(min=1e-300)).t()


def blurred(joint_DV, time):
    return 0.9 * exact(joint_DV, time) + 0.1 / 3


def test_kinetic_05_bound_is_the_entropy_for_the_mask_and_above_it_otherwise():
    data = TARGET.reshape(3, 3).sum(1)
    entropy = float(torch.special.entr(data).sum())
    assert negative_bound(small_path("mask"), exact) == pytest.approx(entropy, abs=1e-6)
    for schedule in ("linear", "source_kinetic_optimal"):
        path = small_path("uniform", schedule)
        bound = negative_bound(path, exact, num_points=600)
        assert bound > entropy + 0.05
        assert negative_bound(path, blurred, num_points=600) > bound + 0.005


def test_kinetic_08_bound_does_not_depend_on_the_schedule():
    expected = negative_bound(small_path("uniform", "linear"), exact, num_points=1500)
    for schedule in ("cosine", {"name": "polynomial", "power": 2.0}, "source_kinetic_optimal"):
        path = small_path("uniform", schedule)
        assert negative_bound(path, exact, num_points=1500) == pytest.approx(expected, abs=2e-3)


def test_refusals():
    no_mask = TokenIds(vocab_size=4, bos=None, eos=None, mask=None, pad=None)
    with pytest.raises(ConfigError, match="no mask token"):
        PATHS.parse("mixture").build(no_mask)
    with pytest.raises(ConfigError, match="same for all rows"):
        PATHS.parse({"name": "mixture", "schedule": "source_kinetic_optimal", "source": "previous"})
