import jax
from attnpo_jax.models import attention, block_attention
from attnpo_jax.models.attention import Past, RowLayout, ScoreRule
from attnpo_jax.parallel import rules


class Attention:
    def __init__(self, layout: RowLayout, num_heads: int, past_length: int = 0):
        self._layout = layout
        self._blocks = block_attention.Blocks.of(layout, num_heads, past_length)

    def __call__(self, q_BLNH, k_BLKH, v_BLKH, rule: ScoreRule, past: Past | None = None):
        def dense(q, k, v, past, window, layout, blocks):
            r = ScoreRule(rule.scale, rule.softcap, window)
            return attention.attend(q, k, v, layout, rule=r, past=past)

        def in_blocks(q, k, v, past, window, layout, blocks):
            r = ScoreRule(rule.scale, rule.softcap, window)
            return block_attention.attend(q, k, v, blocks, rule=r, past=past)

        args = (q_BLNH, k_BLKH, v_BLKH, past, rule.window, self._layout, self._blocks)
        if rules._sizes():
            return dense(*args)
        return jax.lax.platform_dependent(*args, cpu=in_blocks, default=dense)
