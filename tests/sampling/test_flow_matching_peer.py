"""Peer parity with the published package ``flow-matching`` 1.0.10, where its definitions are ours.

They differ here: what it calls the cosine schedule is our sine; its solver has Euler rates only (our ``step_rule: euler``) and
takes a corrector at t = 0 as it is given, where the rate is infinite (ours leaves it out); its draws come from torch's global
generator. Its divergence-free part, ``kappa' / (kappa (1 - kappa)) ((1 - kappa) p + kappa delta_{x1})``, is our forward minus
backward velocity.
"""

import pytest
import torch
from flow_matching.loss import MixturePathGeneralizedKL
from flow_matching.path import MixtureDiscreteProbPath
from flow_matching.path.scheduler import CondOTScheduler, CosineScheduler, PolynomialConvexScheduler
from flow_matching.solver import MixtureDiscreteEulerSolver
from flow_matching.utils import ModelWrapper

from raydist.config.registries import PATHS, SCHEDULES
from raydist.core.terms import ElboTerm
from raydist.models.heads import evaluate_terms
from raydist.objectives.discrete_flow import DiscreteFlowConfig
from tests.objectives.test_set_block import random_rows, rng_of
from tests.sampling.flow_oracle import (
    UNIFORM_SOURCE,
    chain_law,
    euler_kernel,
    ids_of,
    path_of,
    posteriors,
    too_unlikely,
)
from tests.sampling.oracle import chi_square, empirical_law, random_law

SCHEDULERS = [
    ({"name": "linear"}, CondOTScheduler()),
    ({"name": "polynomial", "power": 3.0}, PolynomialConvexScheduler(n=3)),
]


@pytest.mark.parametrize(("ours", "theirs"), [*SCHEDULERS, ({"name": "sine"}, CosineScheduler())])
def test_schedules(ours, theirs):
    path, _ = path_of({**UNIFORM_SOURCE, "schedule": ours}, 4)
    times = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    tokens = torch.zeros(10, dtype=torch.int64)
    output = theirs(times)
    torch.testing.assert_close(path.schedule.value(times, tokens), output.alpha_t)
    torch.testing.assert_close(SCHEDULES.parse(ours).derivative(times), output.d_alpha_t)
    torch.testing.assert_close(path.schedule.jump_rate(times, tokens), output.d_alpha_t / (1 - output.alpha_t))


@pytest.mark.parametrize(("ours", "theirs"), SCHEDULERS)
def test_path_law(ours, theirs):
    """Both paths' draws of x_t, given x0 and x1, have the same law: ours by its dense probabilities."""
    path, _ = path_of({**UNIFORM_SOURCE, "schedule": ours}, 4)
    num_draws, time = 20_000, 0.6
    start, clean = torch.full((num_draws, 1), 3), torch.full((num_draws, 1), 1)
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        theirs_t = MixtureDiscreteProbPath(scheduler=theirs).sample(start, clean, torch.full((num_draws,), time)).x_t
    expected = path.probabilities(clean[0], torch.tensor([time], dtype=torch.float64), start_X=start[0])[0]
    assert not too_unlikely(*chi_square(torch.bincount(theirs_t[:, 0], minlength=4).double(), expected))
    uniforms = torch.rand(num_draws, 1, generator=torch.Generator().manual_seed(1))
    ours_t = path.corrupt(clean, start_BL=start, time_BL=torch.tensor([[time]]), uniforms_BL=uniforms)
    assert not too_unlikely(*chi_square(torch.bincount(ours_t[:, 0], minlength=4).double(), expected))


@pytest.mark.parametrize(("ours", "theirs"), SCHEDULERS)
def test_generalised_kl_loss_and_gradient(ours, theirs):
    config = DiscreteFlowConfig(path=PATHS.parse({**UNIFORM_SOURCE, "schedule": ours}), loss="elbo")
    objective, rows = config.build(ids_of(11, with_mask=False)), random_rows(5)
    noised = objective.corrupt(rows, rng_of(rows))
    (term,) = objective.terms(noised)
    assert isinstance(term, ElboTerm)
    clean_BL, current_BL = rows.tokens_BS[:, :-1], noised.inputs["tokens_BL"]
    generator = torch.Generator().manual_seed(2)
    hidden_BLD = torch.randn(*clean_BL.shape, 6, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    results = []
    for peer in (False, True):
        hidden, weight = hidden_BLD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        if peer:
            loss = MixturePathGeneralizedKL(MixtureDiscreteProbPath(scheduler=theirs), reduction="sum")
            total = loss(hidden @ weight.T, clean_BL, current_BL, noised.inputs["time_BL"][:, 0].double())
        else:
            total = evaluate_terms(hidden, terms=[term], heads={"lm": weight})[0].loss_sum
        total.backward()
        results.append((total.detach(), hidden.grad, weight.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    assert noised.counts["targets"] == clean_BL.numel()


class _Posterior(ModelWrapper):
    def __init__(self, law, path):
        super().__init__(None)
        self.law, self.path = law, path

    def forward(self, x, t, **extras):
        return posteriors(self.law, self.path, x, float(t[0]))


@pytest.mark.parametrize("corrector", [0.0, 1.5])
def test_the_peers_euler_solver_draws_from_our_enumerated_chain(corrector):
    """Ours is compared with the same enumeration in test_discrete_flow.py (06, G10); so both solvers have one law."""
    law, num_steps = random_law((3, 3), seed=3), 4
    path, ids = path_of({**UNIFORM_SOURCE, "step_rule": "euler"}, 3)

    def strength(time):
        return corrector if float(time) > 0 else 0.0

    times = [i / num_steps for i in range(num_steps + 1)]
    kernel = euler_kernel(path, 3, corrector=strength)
    expected = chain_law(law, path, times=times, kernel=kernel, vocab_size=ids.vocab_size)
    solver = MixtureDiscreteEulerSolver(
        model=_Posterior(law, path),
        path=MixtureDiscreteProbPath(scheduler=CondOTScheduler()),
        vocabulary_size=3,
        source_distribution_p=torch.full((3,), 1 / 3, dtype=torch.float64),
    )
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(1)
        start = torch.randint(0, 3, (6000, 2))
        drawn = solver.sample(
            start,
            step_size=None,
            div_free=strength if corrector else 0.0,
            dtype_categorical=torch.float64,
            time_grid=torch.tensor(times, dtype=torch.float64),
        )
    assert not too_unlikely(*chi_square(empirical_law(drawn.tolist(), law.shape), expected))
