import pytest
import torch
from torch.nn import functional as F

from raydist.core.rng import RowRng
from raydist.core.rows import Rows
from raydist.core.token_ids import TokenIds
from raydist.objectives.next_token import NextTokenConfig
from tests.sampling.decoders import tiny_decoder

IDS = TokenIds(vocab_size=12, bos=None, eos=None, mask=None, pad=None)


def rows_of(tokens, documents, loss_mask=None):
    tokens_BS = torch.tensor(tokens)
    return Rows(
        step=0,
        tokens_BS=tokens_BS,
        documents_BS=torch.tensor(documents, dtype=torch.int32),
        loss_mask_BS=None if loss_mask is None else torch.tensor(loss_mask),
        rows_B=torch.arange(len(tokens_BS)),
        epochs_B=torch.zeros(len(tokens_BS), dtype=torch.int64),
    )


def corrupted(rows):
    objective = NextTokenConfig().build(IDS)
    rng = RowRng(seed=0, step=rows.step, epochs_B=rows.epochs_B, rows_B=rows.rows_B)
    return objective, objective.corrupt(rows, rng)


def test_targets_stop_at_document_ends_and_at_the_loss_mask():
    rows = rows_of(
        [[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]],
        [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]],
        [[True] * 5, [False, False, True, False, True]],
    )
    objective, noised = corrupted(rows)
    (term,) = objective.terms(noised)
    assert noised.inputs["tokens_BL"].tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert noised.inputs["positions_BL"].tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]
    assert term.positions_T.tolist() == [0, 2, 3, 5, 7]
    assert term.targets_T.tolist() == [2, 4, 5, 8, 1]
    assert noised.counts == {"targets": 5.0}


def test_loss_equals_each_document_on_its_own():
    """Packed documents cost what they cost alone: neither attention nor positions nor targets cross a boundary."""
    documents = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]
    packed = [token for document in documents for token in document]
    ids = [index for index, document in enumerate(documents) for _ in document]
    objective, noised = corrupted(rows_of([packed], [ids]))
    decoder = tiny_decoder()
    results = decoder(**noised.inputs, terms=objective.terms(noised))
    loss = objective.combine(results)
    expected = 0.0
    for document in documents:
        alone, single = corrupted(rows_of([document], [[0] * len(document)]))
        assert single.inputs["mask"].documents_BL is None
        logits = decoder.logits(**single.inputs)
        expected += F.cross_entropy(logits[0], torch.tensor(document[1:]), reduction="sum").item()
        assert alone.terms(single)[0].targets_T.tolist() == document[1:]
    assert loss.sums["targets"].item() == pytest.approx(expected, rel=1e-6)
    mean = loss.metrics["loss/ntp"]
    assert (mean.total / mean.count).item() == pytest.approx(expected / noised.counts["targets"], rel=1e-6)
    assert mean.count.item() == sum(len(document) - 1 for document in documents)
