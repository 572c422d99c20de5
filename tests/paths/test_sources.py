"""Source laws: inverse transforms on a fine grid of uniforms give the laws to the grid's spacing."""

import json

import numpy as np
import pytest
import torch

from raydist.config.registries import SOURCES
from raydist.core.errors import ConfigError
from raydist.core.token_ids import TokenIds
from tests.paths.cases import IDS, MASK, WEIGHTS, source_fields

GRID = ((torch.arange(5000) + 0.5) / 5000).double()[None, :]
NO_MASK = TokenIds(vocab_size=4, bos=None, eos=None, mask=None, pad=None)
CONTEXT = torch.tensor([[0, 3, 3, 4, 1]])
GIVEN = torch.tensor([[True, True, True, True, False]])


def frequencies(tokens):
    return (torch.bincount(tokens.flatten(), minlength=IDS.vocab_size) / tokens.numel()).double()


def law_of(name, folder):
    law = SOURCES.parse(source_fields(name, folder)).build(IDS)
    return law.in_context(CONTEXT, given_BL=GIVEN)


EXPECTED = {
    "mask": [0, 0, 1, 0, 0],
    "uniform": [0.25, 0.25, 0, 0.25, 0.25],
    "given": [w**0.5 / sum(v**0.5 for v in WEIGHTS) for w in WEIGHTS],
    "previous": [0.25, 0, 0, 0.5, 0.25],
}
every_source = pytest.mark.parametrize("name", EXPECTED)


@every_source
def test_draws_have_the_law(name, tmp_path):
    law, expected = law_of(name, tmp_path), torch.tensor(EXPECTED[name], dtype=torch.float64)
    torch.testing.assert_close(law.dense(torch.zeros(1, 3, dtype=torch.int64))[0, 1], expected)
    torch.testing.assert_close(law.probability(torch.arange(5)[None, :])[0], expected)
    torch.testing.assert_close(frequencies(law.draw(GRID)), expected, atol=5e-4, rtol=0)


@every_source
def test_draws_of_another_token_have_the_law_without_the_current_one(name, tmp_path):
    law = law_of(name, tmp_path)
    for current in range(IDS.vocab_size):
        rest = torch.tensor(EXPECTED[name], dtype=torch.float64)
        rest[current] = 0
        drawn = frequencies(law.draw_other(torch.full(GRID.shape, current), uniforms_BL=GRID))
        if rest.sum() == 0:
            assert drawn[current] == 1
        else:
            torch.testing.assert_close(drawn, rest / rest.sum(), atol=5e-4, rtol=0)


@every_source
def test_the_ends_of_the_uniforms_draw_possible_tokens(name, tmp_path):
    law = law_of(name, tmp_path)
    for end in (0.0, 1 - 2.0**-53):
        uniforms = torch.full((1, 5), end, dtype=torch.float64)
        drawn = [law.draw(uniforms), law.draw_other(torch.arange(5)[None, :], uniforms_BL=uniforms)]
        possible = law.probability(torch.cat(drawn, dim=1))[0] > 0
        assert possible[:5].all()
        assert (possible[5:] | (drawn[1][0] == torch.arange(5))).all()
    assert law.draw(torch.rand(1, 5)).dtype == torch.int64


def test_only_the_mask_is_absorbing(tmp_path):
    assert {name: law_of(name, tmp_path).absorbing_id for name in EXPECTED} == {
        "mask": MASK, "uniform": None, "given": None, "previous": None,
    }  # fmt: skip


def test_uniform_without_a_mask_and_on_one_token():
    law = SOURCES.parse("uniform").build(NO_MASK)
    assert law.probability(torch.arange(4)).tolist() == [0.25] * 4
    assert sorted(law.draw(GRID).unique().tolist()) == [0, 1, 2, 3]
    alone = SOURCES.parse("uniform").build(TokenIds(vocab_size=2, bos=None, eos=None, mask=1, pad=None))
    current = torch.zeros(1, 3, dtype=torch.int64)
    assert torch.equal(alone.draw_other(current, uniforms_BL=GRID[:, :3]), current)
    assert torch.equal(alone.draw_other(current + 1, uniforms_BL=GRID[:, :3]), current)


def test_previous_is_a_law_of_each_row():
    tokens = torch.tensor([[0, 0, 1], [3, 4, 1], [4, 4, 4]])
    given = torch.tensor([[True, True, False], [True, True, False], [False, False, False]])
    law = SOURCES.parse("previous").build(IDS).in_context(tokens, given_BL=given)
    drawn = law.draw(GRID.expand(3, -1))
    expected = [[1, 0, 0, 0, 0], [0, 0, 0, 0.5, 0.5], [0.25, 0.25, 0, 0.25, 0.25]]
    for row in range(3):
        torch.testing.assert_close(frequencies(drawn[row]), torch.tensor(expected[row]).double(), atol=5e-4, rtol=0)


def test_given_reads_npy_and_json_and_pads(tmp_path):
    np.save(tmp_path / "counts.npy", np.array([3, 1]))
    (tmp_path / "counts.json").write_text(json.dumps([3, 1]))
    for name in ("counts.npy", "counts.json"):
        law = SOURCES.parse({"name": "given", "path": str(tmp_path / name)}).build(IDS)
        assert law.probability(torch.arange(5)).tolist() == [0.75, 0.25, 0, 0, 0]
    flat = SOURCES.parse({"name": "given", "path": str(tmp_path / "counts.npy"), "power": 0}).build(IDS)
    assert flat.probability(torch.arange(5)).tolist() == [0.5, 0.5, 0, 0, 0]


@pytest.mark.parametrize(
    "content", ["[1, 2, 3, 4, 5, 6]", "[1, -1]", "[0, 0]", "[[1, 2]]", '{"a": 1}', "nonsense", "[1, NaN]", "[]"]
)
def test_given_refuses_what_is_no_law_on_the_vocabulary(content, tmp_path):
    path = tmp_path / "weights.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        SOURCES.parse({"name": "given", "path": str(path)}).build(IDS)
    assert error.value.where == "objective.path.source.path"


def test_given_refuses_pickled_arrays_and_missing_files(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    for name in ("objects.npy", "missing.npy"):
        with pytest.raises(ConfigError, match="cannot be read"):
            SOURCES.parse({"name": "given", "path": str(tmp_path / name)}).build(IDS)


def test_previous_is_the_other_law_where_no_row_has_anything_given():
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    source = SOURCES.parse("previous").build(IDS)
    law = source.in_context(tokens, given_BL=torch.zeros(2, 6, dtype=torch.bool))
    uniforms = torch.rand(2, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(law.draw(uniforms), SOURCES.parse("uniform").build(IDS).draw(uniforms))
