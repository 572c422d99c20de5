"""The metric-induced path. Numbers in test names are those of arXiv 2412.03487 in our sheet."""

import itertools
import json

import pytest
import torch
from safetensors.torch import save_file

from raydist.config.registries import PATHS
from raydist.core.errors import ConfigError
from raydist.core.token_ids import TokenIds
from raydist.paths.base import JumpNoise
from raydist.paths.kinetic import KineticPath
from raydist.paths.metric import BetaSchedule, MetricPath
from raydist.paths.token_metric import TokenMetric
from tests.paths.cases import IDS, MASK, SYMBOLS, embedding_fields
from tests.paths.test_every_path import at, dense_velocity, draws, fits, jump_law

NO_MASK = TokenIds(vocab_size=5, bos=None, eos=None, mask=None, pad=None)


class TableMetric(TokenMetric):
    """Any distances, also such as are no metric."""

    def __init__(self, table_VV):
        self.table_VV = table_VV

    def distances(self, tokens_N):
        return self.table_VV[tokens_N]


def path_of(table_VV, *, a=0.9, c=3.0, step_rule="integrated", ids=NO_MASK, min_distance=1e-3):
    return MetricPath(
        metric=TableMetric(table_VV),
        beta=BetaSchedule(a=a, c=c),
        min_distance=min_distance,
        step_rule=step_rule,
        ids=ids,
    )


def random_distances(seed):
    return torch.rand(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


@pytest.mark.parametrize("seed", range(3))
def test_e03_continuity_for_random_distances(seed):
    """And mass moves only to strictly nearer tokens."""
    table = random_distances(seed)
    path = path_of(table)
    for clean, time in itertools.product(range(5), (0.05, 0.5, 0.9)):
        here = torch.tensor([clean])
        law, slope = torch.func.jvp(lambda t, here=here: path.laws(here, t)[0], (at(time, (1,)),), (at(1.0, (1,)),))
        velocity = dense_velocity(path, clean, time)
        torch.testing.assert_close(velocity @ law, slope, atol=1e-9, rtol=0)
        distance = table[clean].clone().scatter(0, here, 0.0)
        for x, z in itertools.product(range(5), repeat=2):
            if x != z:
                assert (velocity[x, z] > 0) == bool(distance[x] < distance[z])


def test_closed_form_is_the_kinetic_optimal_velocity_of_the_laws():
    path = path_of(random_distances(7))
    clean_N, current_N = (side.flatten() for side in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))
    time_N = at(0.4, clean_N.shape)
    general = KineticPath.rates_at(path, clean_N, current_N=current_N, time_N=time_N)
    torch.testing.assert_close(path.rates_at(clean_N, current_N=current_N, time_N=time_N), general)


def test_e07_the_discrete_metric_is_a_mixture_with_the_uniform_source():
    """``kappa_t = (e^beta - 1) / (e^beta + K - 1)``, and the mixture's rates ``kappa' / (1 - kappa)`` to the clean token."""
    path = path_of(1 - torch.eye(5, dtype=torch.float64), a=1.3, c=2.0)
    for time in (0.2, 0.6, 0.9):
        beta, slope = torch.func.jvp(BetaSchedule(a=1.3, c=2.0).value, (at(time),), (at(1.0),))

        remaining, falling = torch.func.jvp(lambda beta: 5 / (torch.exp(beta) + 4), (beta,), (slope,))
        kappa = (torch.exp(beta) - 1) / (torch.exp(beta) + 4)
        for clean in range(5):
            expected = torch.full((5,), float(remaining / 5), dtype=torch.float64)
            expected[clean] += kappa
            law = path.probabilities(torch.tensor([clean]), at(time, (1,)))[0]
            torch.testing.assert_close(law, expected, atol=1e-12, rtol=0)
            velocity = torch.zeros(5, 5, dtype=torch.float64)
            velocity[clean] = -falling / remaining
            velocity = velocity - torch.diag(velocity.sum(0))
            torch.testing.assert_close(dense_velocity(path, clean, time), velocity, atol=1e-9, rtol=0)


def test_beta_schedule():
    beta = BetaSchedule(a=0.9, c=3.0)
    time = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    value, slope = torch.func.jvp(beta.value, (time,), (torch.ones_like(time),))
    torch.testing.assert_close(beta.derivative(time), slope)
    assert beta.value(at(0.5)).item() == pytest.approx(3.0)
    assert beta.value(at(0.0)) == 0
    assert beta.value(at(1.0)) == torch.inf
    assert (value.diff() > 0).all()


@pytest.mark.parametrize("ids", [NO_MASK, IDS])
def test_mask_is_no_token_of_the_path(ids):
    law = path_of(random_distances(1), ids=ids).probabilities(SYMBOLS, at(0.3, (4,)))
    torch.testing.assert_close(law.sum(1), torch.ones(4).double())
    assert (law[:, MASK] == 0).all() == (ids.mask is not None)


@pytest.mark.parametrize(("step_rule", "start"), [("integrated", 0.0), ("integrated", 0.5), ("euler", 0.5)])
def test_steps_count_the_rates_in_beta_or_in_time(step_rule, start):
    """``p_t [d(z) - d(x)]_+`` times ``beta_{t+h} - beta_t``, finite at t = 0 where ``beta'`` is not, or ``h beta_t'``."""
    rows, stop, clean, table = 5000, start + 0.1, 3, random_distances(2)
    path, beta = path_of(table, step_rule=step_rule), BetaSchedule(a=0.9, c=3.0)
    step = beta.value(at(stop)) - beta.value(at(start))
    if step_rule == "euler":
        step = 0.1 * beta.derivative(at(start))
    distance = table[clean].clone().scatter(0, torch.tensor([clean]), 0.0)
    law = torch.softmax(-beta.value(at(start)) * distance, dim=0)
    for z in (0, 1, 4):
        after = path.jump(
            torch.full((rows, 1), z),
            clean_BL=torch.full((rows, 1), clean),
            start_time_BL=at(start, (1, 1)),
            stop_time_BL=at(stop, (1, 1)),
            corrector_BL=None,
            noise=JumpNoise(whether=draws(z, rows, 1), where=draws(20 + z, rows, 1)),
        )
        assert fits(after, jump_law(step * law * (distance[z] - distance).clamp(min=0), z))


def test_euler_steps_stand_still_where_the_rate_is_infinite():
    path = path_of(random_distances(2), step_rule="euler")
    rates = path.step_rates(torch.tensor([0]), current_N=torch.tensor([1]), start_N=at(0.0, (1,)), stop_N=at(0.1, (1,)))
    assert (rates == 0).all()


def test_equal_embeddings_still_end_in_one_token(tmp_path):
    """Rows 0 and 1 are equal, and tokens 3 and 4 have no row: ``min_distance`` keeps them apart."""
    table = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 1.0]])
    fields = {"name": "metric", "metric": embedding_fields(tmp_path, table=table)}
    path = PATHS.parse(fields).build(IDS)
    clean_X = SYMBOLS.clone()
    last = path.probabilities(clean_X, at(1.0, (4,)))
    torch.testing.assert_close(last, torch.nn.functional.one_hot(clean_X, 5).double())
    assert path.probabilities(clean_X[:1], at(0.999, (1,)))[0, 1] > 0.1


def test_embedding_distances_are_those_of_the_rows(tmp_path):
    table = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    units = torch.nn.functional.normalize(table, dim=1)
    for normalize, exponent in itertools.product((True, False), (1.0, 2.0, 4.0)):
        fields = embedding_fields(tmp_path, table=table, normalize=normalize, exponent=exponent)
        metric = PATHS.parse({"name": "metric", "metric": fields}).metric.build(vocab_size=5)
        rows = units if normalize else table
        expected = torch.cdist(rows.double(), rows.double()) ** exponent
        torch.testing.assert_close(metric.distances(torch.arange(5)).double(), expected, atol=2e-3, rtol=1e-4)


def test_one_hot_embeddings_are_the_discrete_metric(tmp_path):
    """The squared distance of different unit vectors is 2."""
    fields = {"name": "metric", "metric": embedding_fields(tmp_path, table=torch.eye(5)), "beta": {"c": 0.7}}
    ours = PATHS.parse(fields).build(NO_MASK)
    theirs = path_of(1 - torch.eye(5, dtype=torch.float64), c=1.4)
    for clean, time in itertools.product(range(5), (0.2, 0.8)):
        torch.testing.assert_close(dense_velocity(ours, clean, time), dense_velocity(theirs, clean, time))


def test_values_metric():
    metric = PATHS.parse({"name": "metric", "metric": {"name": "values", "exponent": 2, "scale": 2}}).metric
    expected = torch.tensor([[1.0, 0.25, 0.0, 0.25, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(metric.build(vocab_size=5).distances(torch.tensor([2])), expected)


def test_table_of_a_hugging_face_folder(tmp_path):
    """One file, or the shard that the index names."""
    table = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    for folder, name in (("one", "model.safetensors"), ("shards", "model-00002-of-00002.safetensors")):
        (tmp_path / folder).mkdir()
        save_file({"model.embed_tokens.weight": table.bfloat16()}, tmp_path / folder / name)
        index = {"weight_map": {"model.embed_tokens.weight": name}}
        if folder == "shards":
            (tmp_path / folder / "model.safetensors.index.json").write_text(json.dumps(index))
        fields = {"name": "metric", "metric": {"name": "embedding", "path": str(tmp_path / folder), "normalize": False}}
        distances = PATHS.parse(fields).metric.build(vocab_size=5).distances(torch.arange(5))
        expected = torch.cdist(table.bfloat16().double(), table.bfloat16().double()) ** 2
        torch.testing.assert_close(distances.double(), expected, atol=1e-5, rtol=1e-4)


def test_refusals(tmp_path):
    missing = {"name": "metric", "metric": {"name": "embedding", "path": str(tmp_path / "nothing.safetensors")}}
    with pytest.raises(ConfigError, match="cannot be read"):
        PATHS.parse(missing).build(IDS)
    fields = {"name": "metric", "metric": embedding_fields(tmp_path) | {"tensor": "absent"}}
    with pytest.raises(ConfigError, match="cannot be read"):
        PATHS.parse(fields).build(IDS)
    fields = {"name": "metric", "metric": embedding_fields(tmp_path, table=torch.zeros(5))}
    with pytest.raises(ConfigError, match="not a matrix"):
        PATHS.parse(fields).build(IDS)
