import pytest

from attnpo_jax.config import default_config
from attnpo_jax.plan.accelerators import PlanError
from attnpo_jax.plan.lengths import Batching, Lengths, judge_rows, train_batch


@pytest.fixture
def config():
    return default_config()  # 2048 tokens at most, in training and to the judge


@pytest.mark.parametrize(
    "row, response, expected",
    [
        (None, None, (1, 2047)),  # the most: prompt and response fill 2048, twice
        (3072, None, (1024, 1024)),  # as long as prompt and response may be together
        (900, None, (300, 300)),
        (900, 400, (100, 400)),
    ],
)
def test_prompt_and_responses_of_a_row(config, row, response, expected):
    lengths = Lengths.of(config, row, response)
    assert (lengths.prompt, lengths.response) == expected
    assert lengths.row == (row or 4095)


def test_judge_prompts_that_fit_keep_their_answers(config):
    lengths = Lengths.of(config, 900)
    # The template's 192 tokens and the prompt, then both answers in either order.
    assert (lengths.judge_prefix, lengths.judge_order) == (492, 492 + 600)
    assert lengths.judge_row == 492 + 2 * 600


def test_judge_prompts_that_do_not_fit_are_cut_as_the_judge_cuts_them(config):
    lengths = Lengths.of(config)
    # Two answers of 768 tokens, and all of the short prompt.
    assert (lengths.judge_prefix, lengths.judge_order) == (193, 193 + 2 * 768)


@pytest.mark.parametrize("row, response", [(4096, None), (2, None), (900, 450), (3072, 900)])
def test_lengths_the_config_would_not_let_through_are_refused(config, row, response):
    with pytest.raises(PlanError, match="accepted"):
        Lengths.of(config, row, response)


def test_batches_have_the_shapes_of_a_run(config):
    for size, wanted in ((32, (1, 32)), (16, (2, 16)), (8, (4, 8)), (2, (4, 8))):
        config.train.batch_size, config.train.microbatch_size = 32, size
        batching = Batching.training(config, row_shards=8)
        assert (batching.microbatches, batching.rows, batching.pairs) == (*wanted, 32)
    batch = train_batch(Lengths.of(config, 900), batching, num_sources=2)
    assert batch.tokens_BL.shape == (4, 8, 928)  # rounded up to 32
    assert batch.read_BM.shape == (4, 8, 608)
    assert batch.judge_BG22ST.shape == (4, 8, 1, 2, 2, 2, 320)
    assert batch.ready_BG2KT is None
    batch = train_batch(Lengths.of(config, 900), batching, num_sources=0, num_columns=3)
    assert batch.ready_BG2KT.shape == (4, 8, 1, 2, 3, 320)


def test_prepared_batches_keep_to_the_token_budget(config):
    lengths = Lengths.of(config, 900)
    # 4096 tokens hold two rows of 1696; four chips have a row each.
    assert Batching.preparing(config, lengths.judge_row, 1).rows == 2
    assert Batching.preparing(config, lengths.judge_row, 4).rows == 4
    assert judge_rows(lengths, 4)[0].shape == (4, 1696)
