from raydist.config.registries import SAMPLERS
from raydist.evaluation.compare import compare_samplers, sampler_label
from tests.sampling.decoders import tiny_decoder, trained

PROMPTS = [[1, 2, 3], [4]]


def set_block(**fields):
    return SAMPLERS.parse({"name": "set_block", **fields})


def test_rows_add_up_what_the_samplers_did():
    decoder = tiny_decoder()
    configs = [
        SAMPLERS.parse("autoregressive"),
        *(
            set_block(block_size=4, unmasking={"name": "entropy_bounded", "gamma": gamma})
            for gamma in (0.0, 0.9, 100.0)
        ),
    ]
    rows = compare_samplers(decoder, PROMPTS, configs=configs, trained=trained(), max_new_tokens=12)
    assert [row.gamma for row in rows] == [None, 0.0, 0.9, 100.0]
    assert [row.num_tokens for row in rows] == [24] * 4
    assert rows[0].num_forwards == 24
    assert rows[1].num_forwards == 2 * (1 + 12)
    assert rows[3].num_forwards == 2 * (1 + 3)
    assert rows[1].num_forwards > rows[2].num_forwards > rows[3].num_forwards
    for config, row in zip(configs, rows, strict=True):
        sampler = config.build(trained())
        assert row.generations == sampler.generate(decoder, PROMPTS, max_new_tokens=12)
        assert row.tokens_per_forward == row.num_tokens / row.num_forwards
        assert row.seconds > 0


def test_labels_name_what_was_set():
    assert sampler_label(SAMPLERS.parse("autoregressive")) == "autoregressive"
    bounded = {"name": "entropy_bounded", "gamma": 0.6}
    config = set_block(unmasking=bounded, temperature=0.7)
    assert sampler_label(config) == "set_block, block_size 16, gamma 0.6, temperature 0.7"
    config = set_block(unmasking={**bounded, "proxy": "margin"})
    assert sampler_label(config) == "set_block, block_size 16, gamma 0.6, proxy margin"
    config = set_block(block_size=8, unmasking={"name": "top_k", "k": 2, "proxy": "entropy"})
    assert sampler_label(config) == "set_block, block_size 8, top_k k 2 proxy entropy"
    assert sampler_label(SAMPLERS.parse({"name": "masked", "block_size": 4})) == "masked, block_size 4, gamma 0.35"
