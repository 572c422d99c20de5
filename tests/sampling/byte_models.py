"""Models and encoders for tests of decoding by bytes."""

import functools
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn

from data_loaders.byte_level_bpe import ByteLevelBpe
from data_loaders.tokenizer_sources import train_bpe
from raydist.core.token_ids import TokenIds
from raydist.models.config import DecoderConfig
from raydist.models.decoder import Decoder
from raydist.models.init import initialize
from raydist.models.mask_spec import CausalMask
from raydist.sampling.text_bytes.covers import Covers, TokenLaw
from raydist.sampling.text_bytes.reader import ByteModel
from raydist.sampling.text_bytes.segmentation import Segmentation, Tail

TOY_TOKENS = ["a", "b", "bb", "abb", "aa"]
TOY_EOS, TOY_BOS = 5, 6
TOY_LENGTH = 7


def toy_encoder():
    """A 5-token BPE over {a, b}."""
    vocabulary = {token: index for index, token in enumerate(TOY_TOKENS)}
    inner = HfTokenizer(BPE(vocab=vocabulary, merges=[("b", "b"), ("a", "bb"), ("a", "a")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<eos>", "<bos>"])
    return inner


def markov_source(*, seed=0):
    """Every string of length 7 over {a, b} with its probability under an order-2 Markov source."""
    generator = torch.Generator().manual_seed(seed)
    next_is_b = (0.1 + 0.8 * torch.rand(2, 2, generator=generator, dtype=torch.float64)).tolist()
    law = {}
    for letters in itertools.product("ab", repeat=TOY_LENGTH):
        state, probability = (0, 0), 1.0
        for letter in letters:
            p = next_is_b[state[0]][state[1]]
            probability *= p if letter == "b" else 1 - p
            state = (state[1], int(letter == "b"))
        law["".join(letters)] = probability
    return law


def prefix_probability(law, text):
    return math.fsum(p for string, p in law.items() if string.startswith(text))


def token_conditionals(law):
    """The token model of a text law: prefix of ids -> log-probabilities over 5 tokens, eos and bos."""
    encoder, mass = toy_encoder(), {}
    for string, probability in law.items():
        ids = (*encoder.encode(string).ids, TOY_EOS)
        for stop in range(len(ids) + 1):
            mass[ids[:stop]] = mass.get(ids[:stop], 0.0) + probability

    @functools.cache
    def conditional(prefix):
        if prefix not in mass:
            return torch.full((7,), -math.log(7), dtype=torch.float64)
        return torch.tensor([mass.get((*prefix, v), 0.0) / mass[prefix] for v in range(7)], dtype=torch.float64).log()

    return conditional


class ConditionalsModel(nn.Module):
    """Speaks the decoder's inference interface and answers with given conditionals of what the mask shows.

    ``conditional(ids)`` gets the tokens after the first one. Tokens and positions travel through the cache as keys.
    """

    def __init__(self, conditional):
        super().__init__()
        self.conditional = conditional
        self.config = SimpleNamespace(max_positions=10_000)
        self.register_parameter("device_marker", nn.Parameter(torch.zeros(())))
        self.num_forwards = 0

    def head(self, hidden):
        return hidden.clone()

    def hidden(self, tokens_BL, positions_BL, mask, cache=None):
        self.num_forwards += 1
        shown, places = tokens_BL, positions_BL.expand_as(tokens_BL)
        if cache is not None:
            keys, values = cache.extend(0, shown[:, None, :, None].double(), places[:, None, :, None].double())
            shown, places = keys[:, 0, :, 0].long(), values[:, 0, :, 0].long()
        seen_BLW = mask.dense()[:, 0].expand(len(shown), -1, -1)
        return torch.stack(
            [
                torch.stack([self._answer(shown[b], places[b], seen) for seen in seen_BLW[b]])
                for b in range(len(tokens_BL))
            ]
        )

    def _answer(self, shown, places, seen):
        visible = sorted(zip(places[seen].tolist(), shown[seen].tolist(), strict=True))
        assert [place for place, _ in visible] == list(range(len(visible)))
        return self.conditional(tuple(token for _, token in visible[1:]))


def toy_model(law, *, exact=True, conditional=None):
    """A byte model of the toy source; its context is the bos token."""
    return ByteModel(
        model=ConditionalsModel(conditional or token_conditionals(law)).eval(),
        segmentation=Segmentation(ByteLevelBpe(toy_encoder().to_str().encode())),
        ids=TokenIds(vocab_size=7, bos=TOY_BOS, eos=TOY_EOS, mask=None, pad=None),
        stop_ids=(TOY_EOS,),
        exact=exact,
    )


@functools.cache
def python_bpe(vocab_size=420):
    """A real byte-level BPE trained on some Python source with a few accents."""
    source = Path(functools.__file__).read_text()[:12_000]
    return train_bpe([source, "déjà vu, naïve café: ñandú 中文 中国 \u2014 \u2014 été\n" * 8], vocab_size=vocab_size)


def decoder_for(tokenizer, *, seed=0, dtype=torch.float64, max_positions=4096):
    """A tiny random decoder with sharp predictions for a tokenizer's vocabulary."""
    config = DecoderConfig(
        family="llama",
        vocab_size=tokenizer.vocab_size,
        num_layers=2,
        width=16,
        hidden_width=24,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_positions=max_positions,
    )
    decoder = Decoder(config)
    initialize(decoder, seed)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.startswith("blocks") and parameter.ndim == 2:
                parameter.mul_(20.0)
            if name == "head.weight":
                parameter.mul_(1.5 / 4 / parameter.std())
    return decoder.to(dtype).eval()


@functools.cache
def segmentation_of(tokenizer):
    return Segmentation(tokenizer.byte_level())


def byte_model(tokenizer, *, decoder=None, exact=True):
    ids = tokenizer.special_ids
    return ByteModel(
        model=decoder or decoder_for(tokenizer),
        segmentation=segmentation_of(tokenizer),
        ids=TokenIds(vocab_size=tokenizer.vocab_size, bos=ids.bos, eos=ids.eos, mask=ids.mask, pad=ids.pad),
        stop_ids=(ids.eos,),
        exact=exact,
    )


def uncached_law(model, sequence, *, context):
    """The law after a sequence of vocabulary indices, from one plain forward over everything."""
    ids_S = model.segmentation.vocabulary.ids_S
    tokens = torch.tensor([[*context, *ids_S[list(sequence)].tolist()]])
    length = tokens.shape[1]
    with torch.no_grad():
        hidden = model.model.hidden(tokens, torch.arange(length)[None], CausalMask(length=length))
        log_probs = torch.log_softmax(model.model.head(hidden)[0, -1].double(), dim=-1).numpy()
    return TokenLaw(log_probs[ids_S], float(torch.tensor(log_probs[list(model.stop_ids)]).logsumexp(0)))


def read_slowly(model, text, *, context):
    """Covers after reading a text byte by byte from its very beginning, every law from an uncached forward.

    Returns the covers, the log-mass after each byte and the law of the next symbol at each place.
    """
    covers = Covers(model.segmentation, tail=Tail(), exact=model.exact)
    masses, laws = [], []
    for place in range(len(text) + 1):
        masses.append(covers.log_mass())
        covers.grow([uncached_law(model, cover.tokens, context=context) for cover in covers.closed])
        laws.append(covers.next_symbols())
        if place < len(text):
            covers.advance(text[place])
    return covers, masses, laws
