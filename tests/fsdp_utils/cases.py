"""What one worker computes for the tests of this folder; the tests compare the files it leaves."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raydist.core.dist import Workers
from raydist.core.terms import CrossEntropyTerm, HeadTerm, PoissonTerm
from raydist.fsdp_utils.apply import reshard
from raydist.fsdp_utils.materialize import full_state, materialize
from raydist.fsdp_utils.mesh import make_mesh
from raydist.models.config import DecoderConfig
from raydist.models.decoder import Decoder
from raydist.models.hf import META_NAME, HfWeights, read_hf_config, save_hf
from raydist.models.init import initialize
from raydist.models.mask_spec import CausalMask
from raydist.training.step import clip_by_global_norm

SEED = 11
LENGTH = 12
NUM_ROWS = 8


def tiny_config(*, tied: bool, family: str = "llama", extras: bool = False) -> DecoderConfig:
    """Odd numbers of tokens, heads and hidden channels, which 2 workers do not divide."""
    extra_fields = {
        "time_input": True,
        "time_width": 6,
        "extra_heads": {"insert": 0, "rates": 3},
        "input_features": {"offset": 5},
    }
    return DecoderConfig(
        family=family,
        vocab_size=37,
        num_layers=2,
        width=16,
        hidden_width=23,
        num_heads=3,
        num_kv_heads=1,
        head_dim=4,
        tied_embeddings=tied,
        **(extra_fields if extras else {}),
    )


def tokens_of_rows() -> Tensor:
    """Fixed token ids ``[NUM_ROWS, LENGTH]``."""
    return (torch.arange(NUM_ROWS * LENGTH).view(NUM_ROWS, LENGTH) * 7919) % 37


def loss_mask_of_rows() -> Tensor:
    """Very uneven: row 0 carries no loss, row 7 on all positions, the others on one or two."""
    mask_BL = torch.zeros(NUM_ROWS, LENGTH, dtype=torch.bool)
    mask_BL[1, 3] = mask_BL[2, 5] = mask_BL[3, 0] = mask_BL[4, 11] = mask_BL[5, 2:4] = mask_BL[6, 1] = True
    mask_BL[7] = True
    return mask_BL


def backward_of_rows(decoder: Decoder, *, rows: slice) -> float:
    """One microbatch: loss sum over these rows divided by the count of all rows, and its backward."""
    tokens_BL, mask_BL = tokens_of_rows()[rows], loss_mask_of_rows()[rows]
    positions_T = mask_BL.view(-1).nonzero()[:, 0]
    targets_T = ((tokens_BL + 3) % 37).view(-1)[positions_T]
    terms: list[HeadTerm] = [CrossEntropyTerm(name="next", positions_T=positions_T, targets_T=targets_T)]
    inputs: dict[str, Any] = {}
    if decoder.config.has_extras:
        ones_TK = torch.ones(len(positions_T), 3)
        terms += [
            CrossEntropyTerm(name="insert", positions_T=positions_T, targets_T=(targets_T + 1) % 37, head="insert"),
            PoissonTerm(
                name="rates", positions_T=positions_T, exposure_TK=ones_TK, counts_TK=2 * ones_TK, head="rates"
            ),
        ]
        inputs = {"time_BL": tokens_BL[:, :1] / 37, "features": {"offset": tokens_BL % 5}}
    results = decoder(tokens_BL, torch.arange(LENGTH)[None], CausalMask(length=LENGTH), terms, **inputs)
    loss = torch.stack([result.loss_sum for result in results]).sum() / loss_mask_of_rows().sum()
    loss.backward()
    return loss.item()


@dataclass(frozen=True)
class Case:
    """One sharded model."""

    name: str
    tied: bool
    family: str = "llama"
    precision: str = "fp32"
    recompute: str = "none"
    reshard_after_forward: bool = True
    num_microbatches: int = 1
    extras: bool = False

    def config(self) -> DecoderConfig:
        return tiny_config(tied=self.tied, family=self.family, extras=self.extras)


CASES = (
    Case("tied", tied=True),
    Case("untied", tied=False),
    Case("qwen3", tied=True, family="qwen3"),
    Case("recompute", tied=False, recompute="block", num_microbatches=2),
    Case("accumulated", tied=True, num_microbatches=2),
    Case("gathered-once", tied=False, reshard_after_forward=False, num_microbatches=2),
    Case("bf16", tied=True, precision="bf16", num_microbatches=2),
    Case("extras", tied=True, recompute="block", num_microbatches=2, extras=True),
)


def compute(workers: Workers, folder: str) -> None:
    """Every case: initial weights, then weights seen by the model, then gradients, into ``folder``."""
    mesh = make_mesh(workers)
    for case in CASES:
        options: dict[str, Any] = {
            "precision": case.precision,
            "recompute": case.recompute,
            "reshard_after_forward": case.reshard_after_forward,
        }
        decoder = materialize(case.config(), mesh=mesh, device=workers.device, seed=SEED, **options)
        assert (decoder.head.weight is decoder.embedding.weight) == case.tied
        weights = full_state(decoder)
        assert bool(weights) == workers.is_first
        assert {str(parameter.dtype) for parameter in decoder.parameters()} == {"torch.float32"}
        rows_per_pass = NUM_ROWS // (workers.world_size * case.num_microbatches)
        loss = 0.0
        for microbatch in range(case.num_microbatches):
            first = (microbatch * workers.world_size + workers.rank) * rows_per_pass
            loss += backward_of_rows(decoder, rows=slice(first, first + rows_per_pass))
        reshard(decoder)
        losses = torch.tensor([loss])
        torch.distributed.all_reduce(losses)
        gradients = {name: parameter.grad.full_tensor() for name, parameter in decoder.named_parameters()}
        if workers.is_first:
            save_file(weights, os.path.join(folder, f"{case.name}-weights.safetensors"))
            save_file({"loss": losses, **gradients}, os.path.join(folder, f"{case.name}-gradients.safetensors"))
        check_clipping(decoder)
    check_loading(workers)
    check_growth(workers, folder)


def check_clipping(decoder: Decoder) -> None:
    """Sharded gradients have the norm of the whole ones, and are scaled as torch scales those."""
    for max_norm in (None, 1e6, 0.01):
        whole = [torch.empty(parameter.shape) for parameter in decoder.parameters()]
        for copy, parameter in zip(whole, decoder.parameters(), strict=True):
            copy.grad = parameter.grad.full_tensor().clone()
        norm = clip_by_global_norm(decoder, max_norm)
        expected = torch.nn.utils.clip_grad_norm_(whole, float("inf") if max_norm is None else max_norm)
        assert expected > 0.02, "0.01 has something to clip"
        torch.testing.assert_close(norm, expected)
        for copy, parameter in zip(whole, decoder.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad.full_tensor(), copy.grad)


class ArrayWeights:
    """Stored weights in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def check_loading(workers: Workers) -> None:
    """Loaded weights arrive whole, and a validation forward leaves nothing gathered behind for ``full_state``."""
    config = tiny_config(tied=False)
    stored = {name: torch.randn(p.shape) for name, p in Decoder(config).named_parameters()}
    for tensor in stored.values():
        torch.distributed.broadcast(tensor, src=0)
    decoder = materialize(
        config, mesh=make_mesh(workers), device=workers.device, seed=SEED, weights=ArrayWeights(stored)
    )
    with torch.no_grad():
        decoder(tokens_of_rows(), torch.arange(LENGTH)[None], CausalMask(length=LENGTH), [])
    found = full_state(decoder)
    assert bool(found) == workers.is_first
    if workers.is_first:
        assert list(found) == list(stored)
        assert all(torch.equal(found[name], stored[name]) for name in stored)


def check_growth(workers: Workers, folder: str) -> None:
    """Foreign tied weights without rows for the last two tokens: every worker gets its rows, and the head has them too."""
    stored = tiny_config(tied=True).model_copy(update={"vocab_size": 35})
    foreign = Decoder(stored)
    initialize(foreign, SEED)
    source = os.path.join(folder, "foreign")
    if workers.is_first:
        save_hf(source, state=dict(foreign.named_parameters()), config=stored, tokenizer_json=None, token_ids={})
        os.remove(os.path.join(source, META_NAME))
    torch.distributed.barrier()
    config = read_hf_config(source).with_vocab(37)
    weights = HfWeights(source, config)
    decoder = materialize(config, mesh=make_mesh(workers), device=workers.device, seed=SEED + 1, weights=weights)
    assert decoder.head.weight is decoder.embedding.weight
    expected = {name: parameter.detach() for name, parameter in foreign.named_parameters()}
    rows = expected["embedding.weight"]
    expected["embedding.weight"] = torch.cat([rows, rows.mean(dim=0, keepdim=True).expand(2, -1)])
    plain = Decoder(config)
    plain.load_state_dict(expected, strict=False)
    every_row = slice(0, NUM_ROWS)
    assert abs(backward_of_rows(decoder, rows=every_row) - backward_of_rows(plain, rows=every_row)) < 1e-5
    found = full_state(decoder)
    if workers.is_first:
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def read(folder: str, case: Case, what: str) -> dict[str, Tensor]:
    """What :func:`compute` left."""
    return load_file(os.path.join(folder, f"{case.name}-{what}.safetensors"))
