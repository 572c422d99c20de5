"""Discrete Flow Matching. Numbers in test names are those of the invariants of arXiv 2407.15595 in our reference sheet;
those with a G prefix are of arXiv 2412.03487, those with a CFG prefix of arXiv 2311.13443, whose w is ours plus 1.
"""

import itertools

import pytest
import torch

from raydist.config.registries import PATHS, SAMPLERS
from raydist.core.errors import ConfigError
from raydist.models.mask_spec import FullMask
from raydist.paths.base import JumpNoise
from raydist.sampling.base import Trained
from raydist.sampling.noise_prediction import NoisePrediction
from tests.sampling.decoders import MASK_ID, tiny_decoder, trained
from tests.sampling.flow_oracle import (
    MASK_SOURCE,
    UNIFORM_SOURCE,
    FlowOracle,
    chain_law,
    euler_kernel,
    generator_matrix,
    path_of,
    posteriors,
    token_table,
    too_unlikely,
)
from tests.sampling.oracle import chi_square, conditional, divergence, empirical_law, marginal, random_law

EULER_UNIFORM = {**UNIFORM_SOURCE, "step_rule": "euler"}
METRIC = {"name": "metric", "metric": {"name": "values"}}
EULER_METRIC = METRIC | {"beta": {"a": 1.0, "c": 2.0}, "step_rule": "euler"}
THREE_WAY = {"name": "three_way"}
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 1], [3, 3]]


def oracle_and_sampler(law, path_config, *, seed=0, shift=False, time_input=None, **fields):
    """A model that knows the posterior, and the sampler, both built from what a training would have recorded."""
    path, ids = path_of(path_config, law.shape[0])
    oracle = FlowOracle(law, path, vocab_size=ids.vocab_size, shift=shift, time_input=time_input)
    record = {"name": "discrete_flow", "path": PATHS.parse(path_config).model_dump(mode="json"), "shift": shift}
    config = SAMPLERS.parse({"name": "discrete_flow", **fields})
    return oracle, config.build(Trained(ids=ids, objective=record, seed=seed))


def draws(law, path_config, *, num_draws, **fields):
    oracle, sampler = oracle_and_sampler(law, path_config, **fields)
    generations = sampler.generate(oracle, [[0]] * num_draws, max_new_tokens=law.ndim)
    return empirical_law([generation.tokens for generation in generations], law.shape), generations, oracle


def product_of_marginals(law):
    result = marginal(law, 0)
    for i in range(1, law.ndim):
        result = result[..., None] * marginal(law, i)
    return result


def test_05_mask_posterior_knows_neither_time_nor_schedule():
    law = random_law((3, 3), seed=1)
    states = torch.tensor(list(itertools.product(range(4), repeat=2)))
    answers = []
    for schedule in ("linear", "cosine"):
        path, _ = path_of({**MASK_SOURCE, "schedule": {"name": schedule}}, 3)
        answers += [posteriors(law, path, states, time) for time in (0.2, 0.7)]
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=1e-10, atol=1e-12)
    uniform, _ = path_of(UNIFORM_SOURCE, 3)
    early, late = (posteriors(law, uniform, states[(states < 3).all(1)], time) for time in (0.2, 0.7))
    assert (early - late).abs().max() > 0.1


@pytest.mark.parametrize("config", [MASK_SOURCE, UNIFORM_SOURCE], ids=["mask", "uniform"])
def test_06_one_step_is_the_product_of_marginals(config):
    law = random_law((3, 3), seed=2)
    counts, _, _ = draws(law, config, num_draws=6000, num_steps=1)
    assert not too_unlikely(*chi_square(counts, product_of_marginals(law)))
    assert too_unlikely(*chi_square(counts, law))


@pytest.mark.parametrize(
    ("config", "corrector"),
    [
        (MASK_SOURCE | {"step_rule": "euler"}, 0.0),
        (EULER_UNIFORM, 0.0),
        (EULER_UNIFORM, 2.0),
        (EULER_METRIC, 0.0),
        (THREE_WAY, 0.5),
    ],
    ids=["mask", "uniform", "uniform corrected", "metric", "three-way corrected"],
)
def test_06_G10_the_law_converges_and_the_sampler_has_it(config, corrector):
    """The enumerated chain of Euler steps approaches the data as n grows; the sampler draws from that chain."""
    law, num_steps = random_law((3, 3), seed=3), 4
    path, ids = path_of(config, 3)

    def strength(time):
        return corrector * (time * (1 - time)) ** 0.25 if time > 0 else 0.0

    def enumerated(n):
        times = [i / n for i in range(n + 1)]
        kernel = euler_kernel(path, 3, corrector=strength)
        return chain_law(law, path, times=times, kernel=kernel, vocab_size=ids.vocab_size)

    errors = [divergence(law, enumerated(n)) for n in (2, 8, 32, 128)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02
    assert errors[-1] < errors[-2] / 2
    counts, _, _ = draws(
        law, config, num_draws=6000, num_steps=num_steps, corrector={"strength": corrector}, time_grid="uniform"
    )
    assert not too_unlikely(*chi_square(counts, enumerated(num_steps)))


@pytest.mark.parametrize("config", [MASK_SOURCE, UNIFORM_SOURCE, METRIC | {"beta": {"a": 1.0}}])
def test_04_the_master_equation_with_the_exact_posterior_follows_the_path_to_the_data(config):
    """dp/dt = p U_t over all states, by classical Runge-Kutta from the source to t = 0.98, where p_t is near the data."""
    law, end, num_steps = random_law((3, 3), seed=4), 0.98, 150
    path, ids = path_of(config, 3)

    def law_at(time):
        table_KV = token_table(path, 3, time)
        return torch.einsum("ab,ax,by->xy", law, table_KV, table_KV).flatten()

    def change(now_S, time):
        return now_S @ generator_matrix(law, path, time, vocab_size=ids.vocab_size)

    now_S, step = law_at(0.0), end / num_steps
    for i in range(num_steps):
        time = i * step
        k1 = change(now_S, time)
        k2 = change(now_S + step / 2 * k1, time + step / 2)
        k3 = change(now_S + step / 2 * k2, time + step / 2)
        k4 = change(now_S + step * k3, time + step)
        now_S = now_S + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    torch.testing.assert_close(now_S, law_at(end), rtol=0, atol=2e-5)
    data = now_S.reshape((ids.vocab_size,) * 2)[:3, :3]
    assert (data - law).abs().max() < 0.04


@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_07_one_position_is_exact_for_any_number_of_steps(num_steps):
    law = random_law((5,), seed=5)
    schedule = {"name": "polynomial", "power": 3}
    counts, _, _ = draws(law, {**MASK_SOURCE, "schedule": schedule}, num_draws=4000, num_steps=num_steps)
    assert not too_unlikely(*chi_square(counts, law))


@pytest.mark.parametrize("config", [MASK_SOURCE, UNIFORM_SOURCE, METRIC], ids=["mask", "uniform", "metric"])
def test_08_updates_at_frozen_time_keep_the_path_and_forget_the_start(config):
    """One position at a time they converge to p_t from any state; ``refresh`` has the enumerated law of its updates."""
    law, time, share, num_updates = random_law((3, 3), seed=6), 0.6, 0.3, 5
    path, ids = path_of(config, 3)
    table_KV = path.probabilities(torch.arange(3), torch.full((3,), time, dtype=torch.float64))
    on_path = torch.einsum("ab,ax,by->xy", law, table_KV, table_KV).flatten()
    states = torch.tensor(list(itertools.product(range(ids.vocab_size), repeat=2)))
    fresh_SNV = posteriors(law, path, states, time).nan_to_num(0.0) @ table_KV
    stay_SNV = torch.nn.functional.one_hot(states, ids.vocab_size).double()

    def product(first_SV, second_SV):
        return (first_SV[:, :, None] * second_SV[:, None, :]).flatten(1)

    one_at_a_time = (product(fresh_SNV[:, 0], stay_SNV[:, 1]) + product(stay_SNV[:, 0], fresh_SNV[:, 1])) / 2
    torch.testing.assert_close(on_path @ one_at_a_time, on_path, rtol=1e-10, atol=1e-12)
    reachable = torch.linalg.matrix_power(one_at_a_time, 2**20)[on_path > 0]
    torch.testing.assert_close(reachable, on_path.expand_as(reachable), rtol=1e-6, atol=1e-9)

    moves_SNV = share * fresh_SNV + (1 - share) * stay_SNV
    together = torch.linalg.matrix_power(product(moves_SNV[:, 0], moves_SNV[:, 1]), num_updates)
    oracle, sampler = oracle_and_sampler(law, config)
    rollout = sampler.rollout(oracle, [[0]] * 5000, [()] * 5000, num_new_tokens=2)
    rollout.tokens_BL = torch.tensor([[0, 2, 2]] * 5000)
    with torch.inference_mode():
        for update in range(num_updates):
            rollout.refresh(time, share=share, temperature=1.0, purpose=f"update/{update}")
    counts = empirical_law(rollout.tokens_BL[:, 1:].tolist(), (ids.vocab_size,) * 2)
    expected = together[2 * ids.vocab_size + 2].reshape(counts.shape)
    assert not too_unlikely(*chi_square(counts, expected))


def test_corrected_noise_prediction_solves_the_kolmogorov_equation_and_the_jump_has_its_rates():
    """02 for the second form of the backward velocity, given x1; then the jump's law by chi-square."""
    config = {**UNIFORM_SOURCE, "source": {"name": "uniform"}, "schedule": {"name": "polynomial", "power": 2}}
    path, _ = path_of(config, 4)
    time, corrector, clean, source = 0.5, 1.5, 1, torch.full((4,), 0.25, dtype=torch.float64)
    kappa, slope = time**2, 2 * time

    def law_at(t):
        return (1 - t**2) * source + t**2 * torch.eye(4, dtype=torch.float64)[clean]

    rates = torch.zeros(4, 4, dtype=torch.float64)  # from z (row) to v
    for z in range(4):
        rates[z, clean] += (1 + corrector) * slope / (1 - kappa)
        posterior = torch.eye(4, dtype=torch.float64)[z]
        if z == clean:
            posterior = source * (kappa * torch.ones(4) + (1 - kappa) * torch.eye(4, dtype=torch.float64)[z])
            posterior = posterior / posterior.sum()
        rates[z] += corrector * slope / kappa * posterior
        rates[z, z] = 0.0
    generator = rates - torch.diag(rates.sum(1))
    change = (law_at(time + 1e-6) - law_at(time - 1e-6)) / 2e-6
    torch.testing.assert_close(law_at(time) @ generator, change, rtol=1e-7, atol=1e-8)
    num_draws, step = 20_000, 0.2
    uniforms = torch.rand(4, num_draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for z in range(4):
        current = torch.full((1, num_draws), z)
        step_settings = {
            "start_time_BL": torch.tensor([[time]], dtype=torch.float64),
            "stop_time_BL": torch.tensor([[time + step]], dtype=torch.float64),
            "corrector_BL": torch.tensor([[corrector]], dtype=torch.float64),
            "noise": JumpNoise(uniforms[:1], uniforms[1:2]),
        }
        after = NoisePrediction(path).jump(
            current,
            clean_BL=torch.full_like(current, clean),
            refills=JumpNoise(uniforms[2:3], uniforms[3:]),
            **step_settings,
        )
        # x0 is drawn before the jump, so that the law of a step is a mixture over x0
        again = kappa / (kappa + (1 - kappa) * 0.25) if z == clean else 0.0
        expected = torch.zeros(4, dtype=torch.float64)
        for x0, weight in enumerate((again * source + (1 - again) * torch.eye(4, dtype=torch.float64)[z]).tolist()):
            out = torch.zeros(4, dtype=torch.float64)
            out[clean] += (1 + corrector) * slope / (1 - kappa) * (z != clean)
            out[x0] += corrector * slope / kappa * (x0 != z)
            leave = -torch.expm1(-step * out.sum())
            moves = leave * out / out.sum().clamp(min=1e-30)
            moves[z] += 1 - leave
            expected += weight * moves
        counts = torch.bincount(after[0], minlength=4).double()
        assert not too_unlikely(*chi_square(counts, expected))
        may_jump = NoisePrediction(path).may_jump(current, **step_settings)
        assert not ((after != current) & ~may_jump).any()
        assert not may_jump.all()


@pytest.mark.parametrize("form", ["source", "noise_prediction"])
def test_corrector_ends_in_the_data(form):
    law = random_law((3, 3), seed=7)
    counts, generations, _ = draws(
        law, UNIFORM_SOURCE, num_draws=3000, num_steps=100, corrector={"strength": 2.0, "form": form}
    )
    assert divergence(law, (counts + 0.5) / (counts + 0.5).sum()) < 0.01
    assert len(generations[0].states) == generations[0].num_forwards
    assert generations[0].states[-1] == generations[0].tokens


def test_11_a_given_text_stays_as_it_is():
    decoder = tiny_decoder()
    for config in (MASK_SOURCE, UNIFORM_SOURCE):
        sampler = tiny_sampler(config, num_steps=5, corrector={"strength": 3.0, "iterations": 1})
        rollout = sampler.rollout(decoder, [[1, 2], [3]], [[4], [5, 6]], num_new_tokens=3)
        with torch.inference_mode():
            sampler.run(rollout)
        assert rollout.tokens_BL[0, [0, 1, 5]].tolist() == [1, 2, 4]
        assert rollout.tokens_BL[1, [0, 4, 5]].tolist() == [3, 5, 6]
        assert rollout.history.num_forwards_B.min() >= 2
    everything = sampler.infill(decoder, [[1, 2, 3]], [[4]], num_new_tokens=0)
    assert everything[0].tokens == []
    assert everything[0].num_forwards == 0


def test_12_no_more_forwards_than_tokens():
    law = random_law((3, 3, 3), seed=8)
    _, generations, oracle = draws(law, MASK_SOURCE, num_draws=200, num_steps=300)
    assert max(generation.num_forwards for generation in generations) == 3
    assert {generation.num_forwards for generation in generations} <= {1, 2, 3}
    assert sum(oracle.rows_run) == sum(generation.num_forwards for generation in generations)
    for generation in generations:
        assert max(generation.revealed_at) == generation.num_forwards
        assert generation.states is None


def test_infilling_draws_the_conditional_law():
    law, num_draws = random_law((3, 3, 3), seed=9), 4000
    path, ids = path_of(MASK_SOURCE, 3)
    oracle = FlowOracle(law, path, vocab_size=ids.vocab_size, offset=0)
    _, sampler = oracle_and_sampler(law, MASK_SOURCE, num_steps=3)
    generations = sampler.infill(oracle, [[2]] * num_draws, [[1]] * num_draws, num_new_tokens=1)
    counts = empirical_law([generation.tokens for generation in generations], (3,))
    assert not too_unlikely(*chi_square(counts, marginal(conditional(law, {0: 2, 2: 1}), 1)))
    fine = sampler.config.model_copy(update={"num_steps": 200}).build(sampler.trained)
    generations = fine.infill(oracle, [()] * num_draws, [[1]] * num_draws, num_new_tokens=2)
    counts = empirical_law([generation.tokens for generation in generations], (3, 3))
    assert not too_unlikely(*chi_square(counts, conditional(law, {2: 1})[:, :, 1]))


def test_shifted_reading_is_the_same_chain():
    law = random_law((3, 3), seed=10)
    plain, _, _ = draws(law, UNIFORM_SOURCE, num_draws=500, num_steps=6)
    shifted, _, _ = draws(law, UNIFORM_SOURCE, num_draws=500, num_steps=6, shift=True)
    assert torch.equal(plain, shifted)
    _, sampler = oracle_and_sampler(law, UNIFORM_SOURCE, shift=True)
    with pytest.raises(ConfigError, match="start of the text"):
        sampler.infill(tiny_decoder(), [()], [[1]], num_new_tokens=1)


def test_a_schedule_chosen_after_training_is_told_in_trained_time():
    """Sheet (d): the model hears kappa_trained^-1(kappa_t); the data comes out."""
    law = random_law((3, 3), seed=11)
    trained_path = {**UNIFORM_SOURCE, "schedule": {"name": "polynomial", "power": 3}}
    chosen = {**UNIFORM_SOURCE, "schedule": {"name": "cosine"}}
    counts, _, oracle = draws(law, trained_path, num_draws=3000, num_steps=60, path=chosen)
    assert divergence(law, (counts + 0.5) / (counts + 0.5).sum()) < 0.01
    schedule = PATHS.parse(chosen).schedule
    expected = [float(schedule.value(torch.tensor(i / 60, dtype=torch.float64))) ** (1 / 3) for i in range(60)]
    assert oracle.times == pytest.approx(expected, abs=1e-6)


def test_a_path_given_after_training_must_be_the_trained_one(tmp_path):
    """But for the schedule, how steps are counted, where a file lies, and the coupling, which is of training alone."""
    law = random_law((3, 3), seed=11)
    for other in (METRIC, UNIFORM_SOURCE | {"coupling": {"name": "prefix"}}):
        with pytest.raises(ConfigError, match="trained with another path") as error:
            oracle_and_sampler(law, MASK_SOURCE, path=other)
        assert "coupling" not in error.value.found
    three_way = {"schedule": {"name": "cosine"}, "flux_rule": "uniform"}
    weights = [tmp_path / "here.json", tmp_path / "there.json"]
    for file in weights:
        file.write_text("[1, 2, 3]")
    here, there = ({"name": "mixture", "source": {"name": "given", "path": str(file)}} for file in weights)
    for trained_path, chosen in (
        (MASK_SOURCE, MASK_SOURCE | {"step_rule": "euler", "coupling": {"name": "prefix"}}),
        (METRIC, EULER_METRIC | {"beta": {}}),
        (THREE_WAY, THREE_WAY | three_way),
        (here, there),
    ):
        _, sampler = oracle_and_sampler(law, trained_path, path=chosen)
        assert (sampler.clock.trained_schedule is not None) == (chosen["name"] == "three_way")


@pytest.mark.parametrize(("grid", "expected"), [("uniform", 0.25), ("power", 0.0625), ("kappa", 0.25 ** (1 / 3))])
def test_time_grids(grid, expected):
    law = random_law((3,), seed=12)
    path = {**UNIFORM_SOURCE, "schedule": {"name": "polynomial", "power": 3}}
    _, sampler = oracle_and_sampler(law, path, num_steps=4, time_grid=grid)
    times = sampler.times
    assert times[0] == 0.0
    assert times[-1] == 1.0
    assert times[1] == pytest.approx(expected, abs=1e-9)
    assert times == sorted(times)


def test_kappa_grid_needs_a_schedule():
    """Refused when the sampler is built, not when it runs."""
    with pytest.raises(ConfigError, match="equal shares"):
        oracle_and_sampler(random_law((3,), seed=12), METRIC, time_grid="kappa")


def tiny_sampler(trained_path, *, stop_ids=(), objective=None, seed=0, **fields):
    record = objective or {"name": "discrete_flow", "path": PATHS.parse(trained_path).model_dump(mode="json")}
    config = SAMPLERS.parse({"name": "discrete_flow", **fields})
    return config.build(trained(stop_ids=stop_ids, objective=record, seed=seed))


@pytest.mark.parametrize("config", [MASK_SOURCE, UNIFORM_SOURCE], ids=["mask", "uniform"])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_a_prompt_does_not_feel_its_batch(config, guidance):
    decoder = tiny_decoder()
    sampler = tiny_sampler(config, num_steps=6, guidance=guidance, stop_ids=[0, 2], corrector={"strength": 1.0})
    together = sampler.generate(decoder, PROMPTS, max_new_tokens=10)
    assert together == [sampler.generate(decoder, [prompt], max_new_tokens=10)[0] for prompt in PROMPTS]
    assert together[::-1] == sampler.generate(decoder, PROMPTS[::-1], max_new_tokens=10)
    assert any(generation.stopped for generation in together)
    for generation in together:
        assert MASK_ID not in generation.tokens
        assert generation.stopped == (generation.tokens[-1] in (0, 2))
        assert generation.stopped or len(generation.tokens) == 10
        assert all(len(state) == len(generation.tokens) for state in generation.states)


class Branches(torch.nn.Module):
    """Logits that depend on whether the prompt is shown: ``conditional_V`` or ``unconditional_V``."""

    def __init__(self, conditional_V, unconditional_V, *, prompt):
        super().__init__()
        self.answers = torch.stack([unconditional_V, conditional_V])
        self.config, self.prompt = tiny_decoder().config, prompt
        self.register_parameter("device_marker", torch.nn.Parameter(torch.zeros(())))
        self.num_calls = 0

    def hidden(self, tokens_BL, positions_BL, mask, time_BL=None):
        self.num_calls += 1
        assert isinstance(mask, FullMask)
        shown_B = (tokens_BL[:, 0] == self.prompt).long()
        return self.answers[shown_B][:, None].expand(-1, tokens_BL.shape[1], -1)

    def head_logits(self, hidden):
        return hidden.clone()


def test_CFG1_CFG2_CFG7_guidance():
    """``conditional^(1 + w) unconditional^(-w)``: w = 0 is one forward, equal laws stay, any other w has the product's law."""
    generator = torch.Generator().manual_seed(0)
    conditional_V = torch.randn(12, generator=generator, dtype=torch.float64)
    unconditional_V = torch.randn(12, generator=generator, dtype=torch.float64)
    prompts = [[5]] * 4000

    def run(guidance, *answers):
        model = Branches(*answers, prompt=5)
        generations = tiny_sampler(MASK_SOURCE, num_steps=1, guidance=guidance).generate(
            model, prompts, max_new_tokens=1
        )
        return [generation.tokens for generation in generations], model.num_calls, generations[0].num_forwards

    tokens, calls, counted = run(0.0, conditional_V, unconditional_V)
    assert calls == counted == 1
    assert tokens == run(0.0, conditional_V, torch.zeros(12).double())[0]
    assert run(2.0, conditional_V, conditional_V)[0] == tokens
    for w in (1.5, -0.5):
        tokens, calls, counted = run(w, conditional_V, unconditional_V)
        assert calls == counted == 2
        expected = torch.softmax(((1 + w) * conditional_V - w * unconditional_V)[:MASK_ID], dim=0)
        assert not too_unlikely(*chi_square(empirical_law(tokens, (MASK_ID,)), expected))


def test_guidance_is_the_key_of_edit_flow():
    """Off by default, and in the same range."""
    ours, theirs = (SAMPLERS.classes()[name].model_fields["guidance"] for name in ("discrete_flow", "edit_flow"))
    assert ours.default == theirs.default == 0.0
    assert ours.metadata == theirs.metadata
    with pytest.raises(ConfigError, match="greater than -1"):
        SAMPLERS.parse({"name": "discrete_flow", "guidance": -1.0})


def test_temperature():
    logits_V = torch.linspace(0, 2, 12, dtype=torch.float64)
    model = Branches(logits_V, logits_V, prompt=5)

    def tokens(**fields):
        generations = tiny_sampler(MASK_SOURCE, num_steps=1, **fields).generate(model, [[5]] * 4000, max_new_tokens=1)
        return empirical_law([generation.tokens for generation in generations], (MASK_ID,))

    assert tokens(temperature=0.0)[MASK_ID - 1] == 4000
    assert not too_unlikely(*chi_square(tokens(temperature=0.5), torch.softmax(2 * logits_V[:MASK_ID], dim=0)))
    config = SAMPLERS.parse({"name": "discrete_flow", "temperature": 0.8, "temperature_schedule": "squared"})
    assert config.temperature_at(0.5) == pytest.approx(0.2)


def test_a_path_must_be_known():
    with pytest.raises(ConfigError, match="path is not known"):
        tiny_sampler(None, objective={"name": "masked"})
    assert tiny_sampler(None, objective={"name": "masked"}, path=MASK_SOURCE).path.absorbing_id == MASK_ID


def test_noise_prediction_needs_a_mixture():
    with pytest.raises(ConfigError, match="no noise prediction"):
        tiny_sampler(METRIC, corrector={"strength": 1.0, "form": "noise_prediction"})


def test_too_long_is_refused():
    with pytest.raises(ConfigError, match="longer than the model's positions"):
        tiny_sampler(MASK_SOURCE).infill(tiny_decoder(), [[1] * 60], [[2]], num_new_tokens=4)
