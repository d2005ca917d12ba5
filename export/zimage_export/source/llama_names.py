"""The names that llama.cpp gives to a Qwen3 model's tensors, as transformers' names.

Source: llama.cpp's ``gguf-py/gguf/tensor_mapping.py``. Its rows are in transformers' order: only Llama's are permuted.
"""

import re
from collections.abc import Iterable

_ENDS = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(\w+)")


def from_llama(names: Iterable[str]) -> dict[str, str]:
    """transformers' name for each of llama.cpp's names; names that are not llama.cpp's are kept."""
    return {name: _renamed(name) for name in names}


def _renamed(name: str) -> str:
    match = _LAYER.fullmatch(name)
    if match and match[2] in _IN_LAYER:
        return f"layers.{match[1]}.{_IN_LAYER[match[2]]}.{match[3]}"
    return _ENDS.get(name, name)
