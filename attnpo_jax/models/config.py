"""The shape of a decoder, and what a run adds to it."""

import dataclasses
from typing import Any, Literal

PROJECTIONS = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "output",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}
"""Hugging Face's name of a projection -> the decoder's."""

LORA_GROUPS = {
    "all": tuple(PROJECTIONS),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
"""Names for several projections at once, by what adapters are asked for on."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3's stretch of the rotary frequencies for contexts longer than those pre-trained on."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class LinearRopeScaling:
    """All rotary frequencies divided by one factor: positions squeezed into the trained range."""

    factor: float


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (see `models.lora`)."""

    rank: int  # R, the width between their two factors
    alpha: float  # what they add is scaled by alpha / rank
    targets: tuple[str, ...]  # names of the decoder's projections that have one


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that the decoder's parameters and forward pass depend on.

    Names of the fields that Hugging Face has too are Hugging Face's, but for `num_layers`,
    `num_heads` and `num_kv_heads`. The defaults of the others are those of a Llama. Instances are
    hashable, so a jitted function may close over one. Dropout rates are left out: nothing here
    drops anything, in training either.

    Attributes:
      attention_bias: biases on query, key, value and output projections.
      qkv_bias: biases on query, key and value alone.
      mlp_bias: biases on the three feed-forward projections.
      activation: of the gate; `gelu_pytorch_tanh` is GELU's tanh approximation.
      norm_style: how an RMS norm applies its weight. `llama`: after rounding to the activations'
        dtype; `olmo2`: before rounding; `gemma`: before rounding, and one is added to the weight.
      pre_norms: norms on what goes into attention and feed-forward.
      post_norms: norms on what they give back to the residual stream.
      qk_norm: norms on queries and keys before rotation: over each head, or over the whole
        projection at once.
      embedding_scale: what token embeddings are multiplied with.
      query_pre_attn_scalar: scores are multiplied with its power -1/2; None for `head_dim`.
      attn_logit_softcapping: bound c of the scores, c * tanh(score / c).
      final_logit_softcapping: the same for the logits over the vocabulary.
      layer_windows: for each layer, how many positions up to and with its own a token sees, or None
        for all; None in place of the tuple where no layer has a window.
      local_rope_theta: rotary base of the layers that have a window, unscaled, where it is another
        than `rope_theta`.
      nope_layers: layers without rotary positions.
      lora: adapters on projections, which a run may add; no `config.json` has them.
      int8: whether projections are held as int8 (see `models.int8`), again by a run's choice.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    model_type: str = "llama"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | LinearRopeScaling | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    qkv_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    norm_style: Literal["llama", "olmo2", "gemma"] = "llama"
    pre_norms: bool = True
    post_norms: bool = False
    qk_norm: Literal["head", "projection"] | None = None
    embedding_scale: float | None = None
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    layer_windows: tuple[int | None, ...] | None = None
    local_rope_theta: float | None = None
    nope_layers: tuple[int, ...] = ()
    lora: LoraConfig | None = None
    int8: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, found {self.head_dim}")
        if self.layer_windows is not None and len(self.layer_windows) != self.num_layers:
            raise ValueError(
                f"layer_windows has {len(self.layer_windows)} entries for {self.num_layers} layers"
            )

    @property
    def positions(self) -> int:
        """How many positions the model was made for, those that a scaled rope adds included.

        `max_position_embeddings` counts them already but for linear scaling, and there in Gemma 3
        too.
        """
        scaling = self.rope_scaling
        if isinstance(scaling, LinearRopeScaling) and not self.model_type.startswith("gemma3"):
            return int(self.max_position_embeddings * scaling.factor)
        return self.max_position_embeddings

    def facts(self) -> dict[str, Any]:
        """What the model itself is, as JSON: all fields but those that a run adds."""
        facts = dataclasses.asdict(self)
        del facts["lora"], facts["int8"]
        return facts
