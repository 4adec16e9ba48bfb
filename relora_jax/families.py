"""The families of models: LLaMA's decoder and what each adds to it. A new family is a row of the table."""

from typing import Any, NamedTuple


class Family(NamedTuple):
    """A family's class in transformers, its parts beyond LLaMA's, and its keys of config.json.

    `defaults`: transformers' values of keys that are missing. `fixed`: keys with a single supported value.
    """

    architecture: str
    defaults: dict[str, Any]
    fixed: dict[str, Any] = {}
    qkv_bias: bool = False  # q, k and v have biases
    qk_norm: bool = False  # an RMSNorm over each head of q and k, before the rotation

    @property
    def has_window(self) -> bool:
        """Whether transformers can limit the attention of a model to a sliding window."""
        return "sliding_window" in self.defaults

    @property
    def has_windowless_layers(self) -> bool:
        """Whether that window can be limited to some layers."""
        return "max_window_layers" in self.defaults


_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_QWEN = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        {"max_position_embeddings": 2048, **_IDS},
        fixed={"attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096, **_IDS},
    ),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN, qkv_bias=True),
    "qwen3": Family(
        "Qwen3ForCausalLM", {**_QWEN, "head_dim": 128}, fixed={"attention_bias": False}, qk_norm=True
    ),
}
