"""The exact posterior of a small joint law along a probability path, and the exact law of a flow sampler that reads it."""

import itertools
import math
from types import SimpleNamespace

import torch
from torch import nn

from raydist.config.registries import PATHS
from raydist.core.token_ids import TokenIds

MASK_SOURCE = {"name": "mixture", "source": {"name": "mask"}}
UNIFORM_SOURCE = {"name": "mixture", "source": {"name": "uniform"}}


def ids_of(num_symbols, *, with_mask):
    """Symbols are 0 .. K - 1; the mask id, if any, is K."""
    mask = num_symbols if with_mask else None
    return TokenIds(vocab_size=num_symbols + int(with_mask), bos=None, eos=None, mask=mask, pad=None)


def path_of(config, num_symbols):
    """A path and the ids it lives on; only the mask source has a mask id."""
    ids = ids_of(
        num_symbols,
        with_mask=config.get("source", {"name": "mask"})["name"] == "mask" and "metric" not in config["name"],
    )
    return PATHS.parse(config).build(ids), ids


def token_table(path, num_symbols, time):
    """``p_t(v | y)`` of every symbol y, ``[K, V]``."""
    symbols = torch.arange(num_symbols)
    return path.probabilities(symbols, torch.full((num_symbols,), float(time), dtype=torch.float64))


def posteriors(law, path, states_BN, time):
    """``p_{1|t}(x1_i | x_t)``, ``[B, N, K]``, by summing over all clean sequences."""
    num_symbols, length = law.shape[0], law.ndim
    clean_SN = torch.tensor(list(itertools.product(range(num_symbols), repeat=length)))
    table_KV = token_table(path, num_symbols, time)
    likelihood_BS = torch.ones(len(states_BN), len(clean_SN), dtype=torch.float64)
    for i in range(length):
        likelihood_BS = likelihood_BS * table_KV[clean_SN[:, i]][:, states_BN[:, i]].T
    weights_BS = likelihood_BS * law.flatten()
    one_hot_SNK = nn.functional.one_hot(clean_SN, num_symbols).double()
    joint_BNK = torch.einsum("bs,snk->bnk", weights_BS, one_hot_SNK)
    return joint_BNK / joint_BNK.sum(-1, keepdim=True)


class FlowOracle(nn.Module):
    """Speaks the decoder's inference interface; the law's variables stand in columns ``offset ..`` of each row."""

    def __init__(self, law, path, *, vocab_size, offset=1, time_input=None, shift=False):
        super().__init__()
        self.law, self.path, self.vocab_size, self.offset, self.shift = law, path, vocab_size, offset, shift
        self.config = SimpleNamespace(
            max_positions=law.ndim + offset,
            time_input=(path.absorbing_id is None) if time_input is None else time_input,
        )
        self.register_parameter("device_marker", nn.Parameter(torch.zeros(())))
        self.rows_run, self.times = [], []

    def hidden(self, tokens_BL, positions_BL, mask, time_BL=None):
        self.rows_run.append(len(tokens_BL))
        assert (time_BL is not None) == self.config.time_input
        time = 0.5 if time_BL is None else float(time_BL[0, 0])
        self.times.append(time)
        variables = slice(self.offset, self.offset + self.law.ndim)
        logits_BNK = posteriors(self.law, self.path, tokens_BL[:, variables], time).log()
        logits_BLV = torch.zeros(*tokens_BL.shape, self.vocab_size, dtype=torch.float64)
        logits_BLV[:, variables, self.law.shape[0] :] = -torch.inf
        logits_BLV[:, variables, : self.law.shape[0]] = logits_BNK
        return logits_BLV.roll(-1, dims=1) if self.shift else logits_BLV

    def head_logits(self, hidden):
        return hidden.clone()


def chain_law(law, path, *, times, kernel, vocab_size):
    """The law after all steps of a chain in which positions move independently given the state.

    ``kernel(time, stop)`` gives the law ``[K, V, V]`` of the next token given x1 and the current token (last axis: next).
    """
    length, num_symbols = law.ndim, law.shape[0]
    states_SN = torch.tensor(list(itertools.product(range(vocab_size), repeat=length)))
    source_V = token_table(path, num_symbols, 0.0)[0]
    now_S = torch.stack([source_V[states_SN[:, i]] for i in range(length)]).prod(dim=0)
    for start, stop in itertools.pairwise(times):
        posterior_SNK = posteriors(law, path, states_SN, start).nan_to_num(0.0)
        kernel_KVV = kernel(start, stop)
        moves_SNV = torch.stack(
            [torch.einsum("sk,ksv->sv", posterior_SNK[:, i], kernel_KVV[:, states_SN[:, i]]) for i in range(length)],
            dim=1,
        )
        joint = moves_SNV[:, 0]
        for i in range(1, length):
            joint = (joint[:, :, None] * moves_SNV[:, i, None, :]).flatten(1)
        now_S = now_S @ joint
    return now_S.reshape((vocab_size,) * length)[(slice(num_symbols),) * length]


def generator_matrix(law, path, time, *, vocab_size):
    """Rates of the whole sequence, ``[S, S]`` from row to column: one position moves at a time, given the posterior."""
    states_SN = torch.tensor(list(itertools.product(range(vocab_size), repeat=law.ndim)))
    posterior_SNK = posteriors(law, path, states_SN, time).nan_to_num(0.0)
    clean_K, times_K = torch.arange(law.shape[0]), torch.full((law.shape[0],), float(time), dtype=torch.float64)
    strides = [vocab_size ** (law.ndim - 1 - i) for i in range(law.ndim)]
    rates_SS = torch.zeros(len(states_SN), len(states_SN), dtype=torch.float64)
    for i, stride in enumerate(strides):
        for token in range(vocab_size):
            velocity_KV = path.velocity(clean_K, torch.full_like(clean_K, token), times_K)
            here_S = (states_SN[:, i] == token).nonzero()[:, 0]
            outflow_SV = posterior_SNK[here_S, i] @ velocity_KV
            for value in range(vocab_size):
                rates_SS[here_S, here_S + (value - token) * stride] += outflow_SV[:, value]
    return rates_SS


def euler_kernel(path, num_symbols, *, corrector=lambda time: 0.0):
    """Always-valid Euler steps from the path's dense velocities; the last step gives x1."""

    def kernel(start, stop):
        vocab_size = path.vocab_size
        clean_KV = torch.arange(num_symbols)[:, None].expand(-1, vocab_size)
        current_KV = torch.arange(vocab_size)[None].expand(num_symbols, -1)
        if stop >= 1.0:
            return nn.functional.one_hot(clean_KV, vocab_size).double()
        time_KV = torch.full(clean_KV.shape, start, dtype=torch.float64)
        rates = path.velocity(clean_KV, current_KV, time_KV)
        if corrector(start) > 0.0:
            rates = rates + corrector(start) * path.preserving_velocity(clean_KV, current_KV, time_KV)
        rates = rates.scatter(-1, current_KV[..., None], 0.0)
        total = rates.sum(-1, keepdim=True)
        leave = -torch.expm1(-(stop - start) * total)
        moves = torch.where(total > 0, leave * rates / total, 0.0)
        return moves.scatter_add(-1, current_KV[..., None], 1 - moves.sum(-1, keepdim=True))

    return kernel


def too_unlikely(statistic, dof):
    """Beyond about four standard deviations of the chi-square law."""
    return statistic > dof + 4 * math.sqrt(2 * dof)
