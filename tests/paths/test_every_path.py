"""What holds for every path: valid velocities that carry the probabilities, and draws with exactly those laws.

Numbers in test names: ``dfm`` those of arXiv 2407.15595, ``kinetic`` those of arXiv 2412.03487 in our sheets.
"""

import itertools

import pytest
import torch

from raydist.config.registries import PATHS, SOURCES
from raydist.paths.base import JumpNoise
from tests.paths import cases
from tests.paths.cases import IDS, MASK, SYMBOLS, TIMES, built_path, case_id
from tests.sampling.oracle import chi_square

EVERY = [*cases.mixture_cases(), *cases.other_cases()]
FEW = [
    {"name": "mixture", "source": "mask"},
    {"name": "mixture", "source": "uniform", "schedule": {"name": "polynomial", "power": 3.0}},
    {"name": "mixture", "source": "given", "schedule": {"name": "source_kinetic_optimal"}},
    {"name": "mixture", "source": "previous", "schedule": {"name": "cosine"}},
    *cases.other_cases(),
]
every_path = pytest.mark.parametrize("fields", EVERY, ids=case_id)
few_paths = pytest.mark.parametrize("fields", FEW, ids=case_id)
VOCAB = IDS.vocab_size
TOKENS = torch.arange(VOCAB)


def at(time, shape=()):
    return torch.full(shape, time, dtype=torch.float64)


def laws_and_derivatives(path, clean_X, time):
    """``p_t(. | x1)`` and its derivative in time by forward-mode differentiation."""
    time_X = at(time, clean_X.shape)
    return torch.func.jvp(lambda t: path.probabilities(clean_X, t), (time_X,), (torch.ones_like(time_X),))


def precision(fields):
    """Embedding distances are float32 matrix products, whose last bits depend on the number of rows."""
    return 1e-5 if fields.get("metric") == "embedding" else 1e-9


def dense_velocity(path, clean, time, *, method="velocity"):
    """``[x, z]`` for one clean token."""
    every = TOKENS[None, :]
    return getattr(path, method)(torch.full_like(every, clean), every, at(time, every.shape))[0].t()


def test_every_registered_path_and_source_is_tried():
    assert {fields["name"] for fields in EVERY} == set(PATHS.classes())
    assert set(cases.SOURCES) == set(SOURCES.classes())


@every_path
def test_dfm_01_kinetic_01_03_velocities_carry_the_path(fields, tmp_path):
    """Columns sum to 0, no negative rate off the diagonal, and ``sum_z u(x, z) p(z) = p'(x)``; also with a corrector."""
    path = built_path(fields, tmp_path)
    for time, clean in itertools.product(TIMES, SYMBOLS.tolist()):
        laws, derivatives = laws_and_derivatives(path, torch.tensor([[clean]]), time)
        law, derivative = laws[0, 0], derivatives[0, 0]
        assert law.sum().item() == pytest.approx(1, abs=1e-12)
        preserving = dense_velocity(path, clean, time, method="preserving_velocity")
        velocity = dense_velocity(path, clean, time)
        for rates in (velocity, preserving):
            off_diagonal = rates - torch.diag(rates.diagonal())
            assert (off_diagonal >= 0).all()
            torch.testing.assert_close(rates.sum(0), torch.zeros(VOCAB).double(), atol=1e-9, rtol=0)
        torch.testing.assert_close(velocity @ law, derivative, atol=precision(fields), rtol=0)
        torch.testing.assert_close(preserving @ law, torch.zeros(VOCAB).double(), atol=precision(fields), rtol=0)


@every_path
def test_kinetic_09_any_corrector_gain_keeps_the_path(fields, tmp_path):
    """``u + g v`` generates the same path for any ``g >= 0``."""
    path = built_path(fields, tmp_path)
    for clean, gain in itertools.product(SYMBOLS.tolist(), (0.3, 20.0)):
        laws, derivatives = laws_and_derivatives(path, torch.tensor([[clean]]), 0.6)
        rates = dense_velocity(path, clean, 0.6) + gain * dense_velocity(path, clean, 0.6, method="preserving_velocity")
        torch.testing.assert_close(rates @ laws[0, 0], derivatives[0, 0], atol=20 * precision(fields), rtol=0)


@every_path
def test_dfm_03_ends(fields, tmp_path):
    """p_0 is the source, the law of ``draw_start``; p_1 is the clean token."""
    path = built_path(fields, tmp_path)
    grid = ((torch.arange(4000) + 0.5) / 4000).double()[None, :]
    for clean in SYMBOLS.tolist():
        here = torch.tensor([[clean]])
        first, last = (path.probabilities(here, at(time, (1, 1)))[0, 0] for time in (0.0, 1.0))
        drawn = path.draw_start(torch.full(grid.shape, clean), uniforms_BL=grid)
        frequencies = torch.bincount(drawn[0], minlength=VOCAB) / 4000
        leak = 1e-3 if fields.get("schedule", {}).get("name") == "log_linear" else 0.0
        torch.testing.assert_close(first, frequencies.double(), atol=1e-3 + leak, rtol=0)
        torch.testing.assert_close(last, torch.nn.functional.one_hot(here[0, 0], VOCAB).double(), atol=1e-12, rtol=0)


@every_path
def test_conditioning_on_the_source_averages_to_the_path(fields, tmp_path):
    """``sum_x0 p(x0) p_t(x | x0, x1) = p_t(x | x1)``, and ``x0 = x1`` stays."""
    path = built_path(fields, tmp_path)
    for clean in SYMBOLS.tolist():
        here = torch.full((1, VOCAB), clean)
        source = path.probabilities(here[:, :1], at(0.0, (1, 1)))[0, 0]
        given_start = path.probabilities(here, at(0.37, here.shape), start_X=TOKENS[None, :])[0]
        if fields.get("schedule", {}).get("name") != "log_linear":
            expected = path.probabilities(here[:, :1], at(0.37, (1, 1)))[0, 0]
            torch.testing.assert_close(source @ given_start, expected, atol=precision(fields) / 1e3, rtol=0)
        assert given_start[clean, clean].item() == pytest.approx(1, abs=1e-12)


def draws(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fits(tokens, law):
    statistic, freedom = chi_square(torch.bincount(tokens.flatten(), minlength=VOCAB).double(), law)
    return statistic < freedom + 5 * (2 * max(freedom, 1)) ** 0.5


@every_path
def test_corrupt_has_the_law_of_the_path(fields, tmp_path):
    rows = 6000
    path = built_path(fields, tmp_path, rows=rows)
    one = built_path(fields, tmp_path)
    clean_BL = SYMBOLS.expand(rows, -1)
    times_L = torch.tensor([0.15, 0.4, 0.6, 0.9], dtype=torch.float64)
    start_BL = path.draw_start(clean_BL, uniforms_BL=draws(1, rows, 4))
    noised_BL = path.corrupt(clean_BL, start_BL=start_BL, time_BL=times_L[None, :], uniforms_BL=draws(2, rows, 4))
    expected_LV = one.probabilities(clean_BL[:1], times_L[None, :])[0]
    assert all(fits(noised_BL[:, i], expected_LV[i]) for i in range(4))
    kept = path.corrupt(clean_BL, start_BL=clean_BL, time_BL=times_L[None, :], uniforms_BL=draws(2, rows, 4))
    assert torch.equal(kept, clean_BL)


@few_paths
@pytest.mark.parametrize("corrector", [None, 1.5])
def test_jump_has_the_law_of_the_dense_velocity(fields, corrector, tmp_path):
    """Euler steps: leave with ``1 - exp(-h sum r)`` for ``v ~ r``, ``r = u + c v`` from the dense rates at the start."""
    rows, start, stop = 3000, 0.37, 0.45
    more = {} if fields["name"] == "three_way" else {"step_rule": "euler"}
    path, one = built_path(fields, tmp_path, rows=rows, **more), built_path(fields, tmp_path)
    pairs = [(z, x) for x in (0, 3) for z in range(VOCAB) if z != MASK or fields["name"] != "metric"]
    current_BL, clean_BL = (torch.tensor(side).expand(rows, -1) for side in zip(*pairs, strict=True))
    after_BL = path.jump(
        current_BL,
        clean_BL=clean_BL,
        start_time_BL=at(start, (1, 1)),
        stop_time_BL=at(stop, (1, 1)),
        corrector_BL=None if corrector is None else at(corrector, (1, 1)),
        noise=JumpNoise(whether=draws(3, *clean_BL.shape), where=draws(4, *clean_BL.shape)),
    )
    for column, (z, clean) in enumerate(pairs):
        rates = dense_velocity(one, clean, start)[:, z]
        if corrector is not None:
            rates = rates + corrector * dense_velocity(one, clean, start, method="preserving_velocity")[:, z]
        assert fits(after_BL[:, column], jump_law((stop - start) * rates, z)), (z, clean)


def jump_law(hazards, z):
    """One jump at most, with given hazards to every token."""
    hazards = hazards.clone()
    hazards[z] = 0
    total = hazards.sum()
    law = hazards / total * -torch.expm1(-total) if total > 0 else hazards
    law[z] = torch.exp(-total)
    return law


@few_paths
def test_the_last_step_gives_the_clean_tokens(fields, tmp_path):
    path = built_path(fields, tmp_path, rows=50)
    clean_BL = SYMBOLS.expand(50, -1)
    current_BL = path.draw_start(clean_BL, uniforms_BL=draws(1, 50, 4))
    for start, corrector in itertools.product((0.0, 0.99), (None, at(1.0, (1, 1)))):
        after = path.jump(
            current_BL,
            clean_BL=clean_BL,
            start_time_BL=at(start, (1, 1)),
            stop_time_BL=at(1.0, (1, 1)),
            corrector_BL=corrector,
            noise=JumpNoise(whether=draws(5, 50, 4), where=draws(6, 50, 4)),
        )
        assert torch.equal(after, clean_BL)


@few_paths
@pytest.mark.parametrize("corrector", [None, 0.7])
def test_may_jump_misses_no_jump(fields, corrector, tmp_path):
    """Where it says no, no clean token makes the token change; at t = 0, inside, and in the last step."""
    rows = 400
    path = built_path(fields, tmp_path, rows=rows)
    noise = JumpNoise(whether=draws(7, rows, 5), where=draws(8, rows, 5))
    current_BL = TOKENS.expand(rows, -1)
    for start, stop in ((0.0, 0.1), (0.5, 0.6), (0.9, 1.0)):
        step = {
            "start_time_BL": at(start, (1, 1)),
            "stop_time_BL": at(stop, (1, 1)),
            "corrector_BL": None if corrector is None else at(corrector, (1, 1)),
            "noise": noise,
        }
        changed_BL = torch.zeros_like(current_BL, dtype=torch.bool)
        for symbol in SYMBOLS.tolist():
            clean_BL = torch.full_like(current_BL, symbol)
            if path.absorbing_id is not None:
                clean_BL = torch.where(current_BL == path.absorbing_id, clean_BL, current_BL)
            changed_BL |= path.jump(current_BL, clean_BL=clean_BL, **step) != current_BL
        may_BL = path.may_jump(current_BL, **step)
        assert (may_BL | ~changed_BL).all()
        assert changed_BL.any() or start == 0.0
        if "schedule" in fields and fields["schedule"]["name"] == "polynomial" and corrector is None:
            assert torch.equal(may_BL, changed_BL)


@few_paths
def test_draws_do_not_depend_on_the_rest_of_the_batch(fields, tmp_path, monkeypatch):
    """Rows alone, and chunks of one position, give the same tokens."""
    path, one = built_path(fields, tmp_path, rows=6), built_path(fields, tmp_path)
    clean_BL, uniforms_BL = SYMBOLS.expand(6, -1), draws(9, 6, 4)
    noise = JumpNoise(whether=draws(10, 6, 4) / 4, where=draws(11, 6, 4))

    def roll(path, rows):
        start = path.draw_start(clean_BL[rows], uniforms_BL=uniforms_BL[rows])
        middle = path.corrupt(clean_BL[rows], start_BL=start, time_BL=at(0.5, (1, 1)), uniforms_BL=uniforms_BL[rows])
        after = path.jump(
            middle,
            clean_BL=clean_BL[rows].flip(1),
            start_time_BL=at(0.5, (1, 1)),
            stop_time_BL=at(0.6, (1, 1)),
            corrector_BL=at(0.5, (1, 1)),
            noise=JumpNoise(whether=noise.whether[rows], where=noise.where[rows]),
        )
        return torch.cat([start, middle, after], dim=1)

    whole = roll(path, slice(0, 6))
    monkeypatch.setattr("raydist.paths.kinetic._CHUNK_ELEMENTS", 1)
    assert torch.equal(torch.cat([roll(one, slice(i, i + 1)) for i in range(6)]), whole)


@every_path
def test_rates_are_those_of_the_velocity(fields, tmp_path):
    """``lambda_t(y)`` of the likelihood bound is the rate at which noise turns into y; no rates where there is no such y."""
    path = built_path(fields, tmp_path)
    if fields["name"] != "mixture":
        assert path.rates is None
        return
    times = torch.tensor(TIMES)
    rates = path.rates.to(torch.device("cpu")).at(times).expand(-1, VOCAB)
    for clean, (index, time) in itertools.product(SYMBOLS.tolist(), enumerate(times.double().tolist())):
        velocity = dense_velocity(path, clean, time)
        noise = next(z for z in range(VOCAB) if z != clean)
        assert rates[index, clean].item() == pytest.approx(velocity[clean, noise].item(), rel=1e-5)
