"""The likelihood bound of any path, against the likelihood of the Markov chain that a model defines.

On two positions of three symbols the chain's law at t = 1 is the solution of its Kolmogorov equation, so that for a model
with any answers ``-log p_1(x1)`` is known for every x1, and the bound must lie above it.
"""

import itertools

import pytest
import torch

from raydist.core.terms import CrossEntropyTerm, ElboTerm, PathElboTerm
from raydist.models.heads import evaluate_terms
from raydist.models.linear_loss import linear_loss
from raydist.models.path_elbo import PathElboCost
from raydist.objectives.flow_bound import bound_term
from tests.objectives.test_discrete_flow import IDS, METRIC, corrupted, objective_of, rows_of_law
from tests.objectives.test_set_block import random_rows, rng_of
from tests.sampling.flow_oracle import MASK_SOURCE, UNIFORM_SOURCE, ids_of, path_of, posteriors
from tests.sampling.oracle import entropy, random_law

THREE_WAY = {"name": "three_way", "randomness": 0.9}
PATHS_BY_NAME = {
    "metric": {**METRIC, "metric": {"name": "values", "exponent": 1.0}},
    "three_way": THREE_WAY,
    "three_way-uniform-flux": {**THREE_WAY, "flux_rule": "uniform"},
    "uniform": UNIFORM_SOURCE,
    "mask": MASK_SOURCE,
}
LENGTH, SYMBOLS = 2, 3


def exact_rates(path, tokens_V, time):
    """``u_t(y, x | x1)`` as ``[x1, x, y]`` from the dense velocity, float64."""
    clean_VV, current_VV = tokens_V[:, None].expand(-1, len(tokens_V)), tokens_V[None].expand(len(tokens_V), -1)
    times_VV = torch.full(clean_VV.shape, float(time), dtype=torch.float64)
    velocity_VVV = path.velocity(clean_VV, current_VV, times_VV)
    return velocity_VVV.scatter(-1, current_VV[..., None], 0.0)


class AnyModel:
    """Answers of a model that is between the exact posterior (0) and a random table (1), and its chain.

    What is wrong fades towards t = 1, where rates are infinite and so would be the bound.
    """

    def __init__(self, path_config, *, wrongness):
        self.path, self.ids = path_of(path_config, SYMBOLS)
        self.law = random_law((SYMBOLS,) * LENGTH, seed=2)
        self.wrongness = wrongness
        self.states_SN = torch.tensor(list(itertools.product(range(self.ids.vocab_size), repeat=LENGTH)))
        generator = torch.Generator().manual_seed(5)
        self.table = torch.randn(len(self.states_SN), LENGTH, SYMBOLS, generator=generator, dtype=torch.float64)

    def answers(self, time):
        """``P[s, i, x1]``; states that cannot be get a flat answer."""
        exact = posteriors(self.law, self.path, self.states_SN, time).nan_to_num(1 / SYMBOLS)
        wrong = self.wrongness * (1 - time) ** 2
        answers = (1 - wrong) * exact + wrong * torch.softmax(self.table, -1)
        if self.path.absorbing_id is None:
            return answers
        known = torch.nn.functional.one_hot(self.states_SN.clamp(max=SYMBOLS - 1), SYMBOLS).double()
        return torch.where((self.states_SN == self.path.absorbing_id)[..., None], answers, known)

    def generator(self, time):
        """Rates of the whole sequence, ``[S, S]`` from row to column."""
        answers = self.answers(time)
        rates = exact_rates(self.path, torch.arange(self.ids.vocab_size), time)[:SYMBOLS]
        matrix = torch.zeros(len(self.states_SN), len(self.states_SN), dtype=torch.float64)
        for position in range(LENGTH):
            stride = self.ids.vocab_size ** (LENGTH - 1 - position)
            here = self.states_SN[:, position]
            out = torch.einsum("sk,ksv->sv", answers[:, position], rates[:, here])
            for value in range(self.ids.vocab_size):
                rows = torch.arange(len(here))
                matrix[rows, rows + (value - here) * stride] += out[:, value]
        return matrix - torch.diag(matrix.sum(1))

    def law_at_the_end(self, times):
        """``p_1`` of the chain: midpoint rates over each interval, whose exponential keeps every law a law."""
        start = self.path.source.probability(torch.arange(self.ids.vocab_size)).double()
        law_S = torch.stack([start[self.states_SN[:, i]] for i in range(LENGTH)]).prod(0)
        for left, right in itertools.pairwise(times):
            law_S = law_S @ torch.linalg.matrix_exp((right - left) * self.generator((left + right) / 2))
        return law_S

    def bounds(self, times):
        """The mean bound of each clean sequence, from the head's own cost, by the midpoint rule over the same times."""
        clean_CN = torch.tensor(list(itertools.product(range(SYMBOLS), repeat=LENGTH)))
        totals_C = torch.zeros(len(clean_CN), dtype=torch.float64)
        heads = {"lm": torch.eye(self.ids.vocab_size, dtype=torch.float64)}
        for left, right in itertools.pairwise(times):
            time = (left + right) / 2
            table = self.path.probabilities(torch.arange(SYMBOLS), torch.full((SYMBOLS,), time, dtype=torch.float64))
            logits_SNV = torch.full((*self.states_SN.shape, self.ids.vocab_size), -1e4, dtype=torch.float64)
            logits_SNV[..., :SYMBOLS] = self.answers(time).clamp(min=1e-300).log()
            for number, clean in enumerate(clean_CN):
                weights = torch.stack([table[clean[i], self.states_SN[:, i]] for i in range(LENGTH)]).prod(0)
                current_T = self.states_SN.flatten()
                term = bound_term(
                    self.path,
                    positions_T=torch.arange(len(current_T)),
                    targets_T=clean.repeat(len(self.states_SN)),
                    current_T=current_T,
                    times_T=torch.full(current_T.shape, time, dtype=torch.float64),
                    num_targets=torch.tensor(1),
                )
                (result,) = evaluate_terms(logits_SNV, terms=[term], heads=heads)
                costs_S = result.losses_T.view(-1, LENGTH).sum(1)
                totals_C[number] += (right - left) * (weights * costs_S)[weights > 0].sum()
        return clean_CN, totals_C


def times_to(latest, num):
    """Denser towards the end, where rates grow."""
    return [1 - (1 - latest) ** (step / num) for step in range(num + 1)]


@pytest.mark.parametrize("wrongness", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("name", PATHS_BY_NAME)
def test_the_bound_is_above_the_likelihood_of_the_models_chain(name, wrongness):
    model = AnyModel(PATHS_BY_NAME[name], wrongness=wrongness)
    times = times_to(0.9999, 80)
    law_S = model.law_at_the_end(times)
    assert float(law_S.sum()) == pytest.approx(1.0, abs=1e-9)
    clean_CN, bounds_C = model.bounds(times)
    strides = torch.tensor([model.ids.vocab_size ** (LENGTH - 1 - i) for i in range(LENGTH)])
    costs_C = -law_S[clean_CN @ strides].log()
    assert (bounds_C > costs_C - 0.01).all(), (bounds_C - costs_C).min()
    mean_bound = float(model.law.flatten() @ bounds_C)
    if wrongness == 0.0:
        torch.testing.assert_close(costs_C, -model.law.flatten().log(), rtol=0.01, atol=0.01)
        tight = pytest.approx(entropy(model.law), rel=0.01)
        assert (mean_bound == tight) == (name == "mask"), "bridges of other paths mix to a law that is not Markov's"
    assert mean_bound < 3 * float(model.law.flatten() @ costs_C), "a bound that says nothing"


@pytest.mark.parametrize("name", ["metric", "three_way"])
def test_wrong_answers_cost_more(name):
    times = times_to(0.999, 40)
    law = AnyModel(PATHS_BY_NAME[name], wrongness=0.0).law.flatten()
    means = [float(law @ AnyModel(PATHS_BY_NAME[name], wrongness=w).bounds(times)[1]) for w in (0.0, 0.3, 0.9)]
    assert means[0] < means[1] < means[2]


def test_a_three_way_path_without_randomness_has_the_bound_of_the_mask_mixture():
    """The general cost and the mixtures' own, position by position on the same draws."""
    rows = random_rows(40)
    schedule = {"schedule": {"name": "polynomial", "power": 2}}
    three_way, noised = corrupted(rows, {"name": "three_way", "randomness": 0.0, **schedule}, loss="elbo")
    mixture = objective_of({**MASK_SOURCE, **schedule}, loss="elbo")
    (general,) = three_way.terms(noised)
    assert isinstance(general, PathElboTerm)
    known = {"positions_T": general.positions_T, "targets_T": general.targets_T, "num_targets": general.num_targets}
    special = bound_term(mixture.path, **known, current_T=general.current_T, times_T=general.times_T)
    assert isinstance(special, ElboTerm)
    masked_T = general.current_T == IDS.mask
    found, expected = both_costs(general, special, num_outputs=IDS.vocab_size)
    found, expected = found[masked_T], expected[masked_T]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_discrete_metric_has_the_bound_of_the_uniform_mixture():
    """Distance 1 between all tokens: a mixture of uniform and data with ``kappa = (e^beta - 1) / (e^beta + K - 1)``."""
    ids = ids_of(5, with_mask=False)
    flat = {"name": "metric", "metric": {"name": "values", "exponent": 1e-9}, "beta": {"c": 1.0, "a": 1.0}}
    objective = objective_of(flat, ids=ids, loss="elbo", time={"low": 0.0, "high": 0.9})
    rows = rows_of_law(random_law((5, 5), seed=4), 200)
    (general,) = objective.terms(objective.corrupt(rows, rng_of(rows)))

    class Rates:
        def at(self, time_C):
            beta_C, derivative_C = time_C / (1 - time_C), 1 / (1 - time_C) ** 2
            return (derivative_C * beta_C.exp() / (beta_C.exp() + 4))[:, None]  # kappa' / (1 - kappa)

    values = {name: getattr(general, name) for name in ("positions_T", "targets_T", "current_T", "times_T")}
    special = ElboTerm(name="elbo", rates=Rates(), **values)
    found, expected = both_costs(general, special, num_outputs=ids.vocab_size)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def both_costs(general, special, *, num_outputs):
    """Costs of two terms for the same random logits."""
    generator = torch.Generator().manual_seed(3)
    logits_BLV = 5 * torch.randn(1, int(general.positions_T.max()) + 1, num_outputs, generator=generator)
    heads = {"lm": torch.eye(num_outputs)}
    return [evaluate_terms(logits_BLV, terms=[term], heads=heads)[0].losses_T for term in (general, special)]


@pytest.mark.parametrize("fields", [PATHS_BY_NAME["metric"], THREE_WAY], ids=["metric", "three_way"])
def test_tables_are_the_rates_of_the_path(fields):
    path, ids = path_of(fields, 4)
    tokens_V, time = torch.arange(ids.vocab_size), torch.tensor(0.37, dtype=torch.float64)
    expected = exact_rates(path, tokens_V, time)
    for token, table_VV in zip(tokens_V, path.tables(time, current_G=tokens_V), strict=True):
        torch.testing.assert_close(table_VV, expected[:, token])


@pytest.mark.parametrize("chunk", [1, 4, None])
def test_the_gradient_is_that_of_the_formula(chunk):
    """Autograd through the dense formula in float64, with more rows in the head than tokens, times and tokens in any order."""
    path, ids = path_of(PATHS_BY_NAME["metric"], 6)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 7, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(9, 7, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.rand(11, generator=generator, dtype=torch.float64)
    targets, current = (torch.randint(0, 6, (11,), generator=generator) for _ in range(2))
    times = torch.tensor([0.2, 0.7, 0.2, 0.4] * 3, dtype=torch.float64)[:11]
    cost = PathElboCost(targets_T=targets, current_T=current, times_T=times, transitions=path)

    def dense(hidden, weight):
        total = torch.zeros((), dtype=torch.float64)
        probs_TV = torch.softmax(hidden @ weight.t(), -1)[:, : ids.vocab_size]
        for t in range(len(targets)):
            u_VV = exact_rates(path, torch.arange(ids.vocab_size), times[t])[:, current[t]]
            model_V, target_V = probs_TV[t] @ u_VV, u_VV[targets[t]]
            moves_V = target_V > 0
            surprise = (target_V[moves_V] * (target_V[moves_V] / model_V[moves_V]).log()).sum()
            total = total + weights[t] * (model_V.sum() - target_V.sum() + surprise)
        return total

    loss, costs = linear_loss(hidden, weight_VD=weight, cost=cost, weights_T=weights, chunk_positions=chunk)
    found = torch.autograd.grad(loss, (hidden, weight))
    expected = dense(hidden, weight)
    torch.testing.assert_close(loss, expected)
    for one, other in zip(found, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        again = linear_loss(hidden, weight_VD=weight, cost=cost, weights_T=weights, chunk_positions=chunk)
    torch.testing.assert_close(again[1], costs)


@pytest.mark.parametrize(("wrong", "right", "pulls"), [(300.0, -300.0, False), (30.0, -60.0, True)])
def test_an_impossible_answer_costs_much_but_not_everything(wrong, right, pulls):
    """Finite cost, finite gradient, which pulls away from the wrong one unless all other probabilities underflow to zero."""
    path, _ = path_of(PATHS_BY_NAME["metric"], 4)
    logits = torch.tensor([[wrong, 0.0, 0.0, right]]).requires_grad_()
    cost = PathElboCost(
        targets_T=torch.tensor([3]), current_T=torch.tensor([1]), times_T=torch.tensor([0.5]), transitions=path
    )
    loss, _ = linear_loss(logits, weight_VD=torch.eye(4), cost=cost)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert loss > 1
    assert gradient.isfinite().all()
    if pulls:
        assert gradient[0, 0] > 0 > gradient[0, 2]


TRAININGS = [
    {"loss": "ce"},
    {"loss": "ce", "copy_loss": True},
    {"loss": "ce", "weighting": "jump_rate"},
    {"loss": "elbo"},
]


def test_validation_measures_one_quantity_whatever_the_loss():
    """The bound of the same model on the same draws, for every training loss of a mask path."""
    rows, bounds, losses = random_rows(6), [], []
    logits_BLV = torch.randn(6, rows.tokens_BS.shape[1] - 1, 16, generator=torch.Generator().manual_seed(1))
    logits_BLV[..., IDS.mask] = -1e4
    for fields in TRAININGS:
        objective = objective_of(MASK_SOURCE, **fields)
        measured = objective.for_validation()
        results = []
        for one in (objective, measured):
            noised = one.corrupt(rows, rng_of(rows))
            terms = one.combine(evaluate_terms(logits_BLV, terms=one.terms(noised), heads={"lm": torch.eye(16)}))
            results.append(terms.sums["targets"] / noised.counts["targets"])
        assert results[0] == results[1], "the loss of validation is the loss of training"
        metric = terms.metrics["bound_nats_per_token"]
        bounds.append(float(metric.total / metric.count))
        losses.append(float(results[0]))
        assert set(terms.metrics) == {"bound_nats_per_token", f"loss/{fields['loss']}"}
    assert bounds == pytest.approx([bounds[0]] * len(bounds), rel=1e-5)
    assert len({round(loss, 4) for loss in losses}) > 2


@pytest.mark.parametrize("name", ["metric", "three_way", "uniform"])
def test_every_path_reports_the_bound_in_validation(name):
    rows = random_rows(3)
    objective = objective_of(PATHS_BY_NAME[name])
    noised = objective.corrupt(rows, rng_of(rows))
    (term,) = objective.terms(noised)
    assert isinstance(term, CrossEntropyTerm)
    measured = objective.for_validation()
    decoder_logits = torch.randn(3, rows.tokens_BS.shape[1] - 1, 12, generator=torch.Generator().manual_seed(1))
    results = evaluate_terms(decoder_logits, terms=measured.terms(noised), heads={"lm": torch.eye(12)})
    bound = measured.combine(results).metrics["bound_nats_per_token"]
    assert float(bound.total / bound.count) > 0
    assert float(bound.count) == rows.tokens_BS[:, :-1].numel()


def test_where_there_is_no_bound_none_is_reported():
    """Too few of the times, a metric that is not done at the latest time, and too many tokens for the rates of all pairs."""
    late = {"time": {"low": 0.5}}
    coarse = {**METRIC, "metric": {"name": "values", "scale": 1e6}}
    wide = ids_of(2000, with_mask=False)
    for objective in (objective_of(METRIC, **late), objective_of(coarse), objective_of(METRIC, ids=wide)):
        assert objective.for_validation() is objective
    assert objective_of(METRIC).for_validation() is not objective_of(METRIC)
