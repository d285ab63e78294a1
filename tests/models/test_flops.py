import dataclasses

import pytest

from attnpo_jax.models import flops
from attnpo_jax.models.config import ModelConfig

# Small enough to count by hand. Per token and layer: key and value 2 * (2*2*1*2) = 16, query and
# output 2 * (2*2*2*2) = 32, feed-forward 2 * (3*2*3) = 36; per look 2 * (2*2*2) = 16; head
# 2*2*5 = 20.
TINY = ModelConfig(
    vocab_size=5,
    hidden_size=2,
    intermediate_size=3,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
)


def test_costs_of_the_parts_by_hand():
    assert flops.Costs.of(TINY) == flops.Costs(16, 16, 68, 16, 20, windows=(None, None))


@pytest.mark.parametrize(
    ("start", "tokens", "window", "seen"),
    [
        (0, 3, None, 1 + 2 + 3),
        (4, 2, None, 5 + 6),
        (7, 0, None, 0),
        (2, 1, None, 3),
        (0, 4, 2, 1 + 2 + 2 + 2),
        (1, 3, 3, 2 + 3 + 3),
        (9, 2, 3, 3 + 3),
        (1, 1, 3, 2),
    ],
)
def test_a_token_sees_itself_and_what_is_before_it(start, tokens, window, seen):
    assert flops.seen_from(start, tokens, window) == seen


def test_response_logps_by_hand():
    # Prompt p0 p1, chosen c0 c1, rejected r0 r1 r2. c1 and r2 predict nothing; left are p0 p1 c0 r0
    # r1, which see 1, 2, 3, 3, 4 tokens. Read are p1 c0 r0 r1.
    first_layer = 5 * (16 + 68) + (1 + 2 + 3 + 3 + 4) * 16
    last_layer = 5 * 16 + 4 * 68 + (2 + 3 + 3 + 4) * 16
    assert flops.response_logps(TINY, 2, (2, 3)) == first_layer + last_layer + 4 * 20


def test_a_window_is_counted_in_its_own_layer_alone():
    # The pair above, the first layer with a window of 2: p0 p1 c0 r0 r1 see 1, 2, 2, 2, 2 there.
    model = dataclasses.replace(TINY, layer_windows=(2, None))
    first_layer = 5 * (16 + 68) + (1 + 2 + 2 + 2 + 2) * 16
    last_layer = 5 * 16 + 4 * 68 + (2 + 3 + 3 + 4) * 16
    assert flops.response_logps(model, 2, (2, 3)) == first_layer + last_layer + 4 * 20


def test_responses_of_one_token_need_the_prompt_alone():
    # Only the prompt's last hidden state is read: a plain causal pass over 3 tokens.
    first_layer = 3 * (16 + 68) + (1 + 2 + 3) * 16
    last_layer = 3 * 16 + 68 + 3 * 16
    assert flops.response_logps(TINY, 3, (1, 1)) == first_layer + last_layer + 20


def test_training_takes_a_backward_pass_of_twice_the_forward():
    assert flops.training(TINY, 2, (2, 3)) == 3 * flops.response_logps(TINY, 2, (2, 3))


def test_judge_row_by_hand():
    # Common x, prefix x y, orders x y a and x y b c. Run are y a b c, which see 2, 3, 3, 4; read
    # are a and c.
    first_layer = 4 * (16 + 68) + (2 + 3 + 3 + 4) * 16
    last_layer = 4 * 16 + 2 * 68 + (3 + 4) * 16
    assert flops.judge_row(TINY, 1, 2, (3, 4)) == first_layer + last_layer + 2 * 20


def test_without_a_verdict_the_last_layer_takes_keys_and_the_scores_of_what_is_read():
    # As above; a key is half of 16, a query 2 * (2*2*2) = 16, a score half a look.
    row = 4 * 8 + 2 * 16 + (3 + 4) * 8
    assert flops.judge_row(TINY, 1, 2, (3, 4), last_layer=0) == row
    first_layer = 4 * (16 + 68) + (2 + 3 + 3 + 4) * 16
    assert flops.judge_row(TINY, 1, 2, (3, 4), last_layer=1) == first_layer + row


def test_what_judge_prompts_share_needs_no_more_than_keys_and_values_in_the_last_layer():
    assert flops.keys_and_values(TINY, 2) == 2 * (16 + 68) + (1 + 2) * 16 + 2 * 16


def test_moving_tokens_into_the_common_beginning_moves_their_cost():
    whole = flops.judge_row(TINY, 0, 5, (9, 11))
    assert flops.keys_and_values(TINY, 3) + flops.judge_row(TINY, 3, 5, (9, 11)) == whole


def test_a_token_of_the_embedded_model_takes_twice_its_layer_parameters():
    model = ModelConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        tie_word_embeddings=True,
    )
    costs = flops.Costs.of(model)
    # 134,515,008 parameters, less the embedding's 28,311,552 and 61 norms of 576.
    parameters = 134_515_008 - 28_311_552 - 61 * 576
    assert costs.layers * (costs.key_value + costs.rest) == 2 * parameters


@pytest.mark.parametrize("windows", [None, (4, None, 4)])
def test_decoding_a_response_takes_what_its_log_probs_take(windows):
    model = dataclasses.replace(TINY, num_layers=3, layer_windows=windows)
    prompt, response = 9, 7
    apart = flops.keys_and_values(model, prompt - 1) + flops.decoded(model, prompt - 1, response)
    assert apart == flops.response_logps(model, prompt, [response])
    steps = sum(flops.decoded(model, prompt - 1 + k, 1) for k in range(response))
    assert steps == flops.decoded(model, prompt - 1, response)
