"""Configurations: both generations of them are read, and a wrong value is named with its file and its key."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from facts import raises_with

from zimage_export.synthetic.checkpoint import SMALL
from zimage_runtime.errors import ConfigError
from zimage_runtime.model.config import PARTS, ModelConfig

Parts = dict[str, Any]
FILES = {part: f"/models/x/{part}/config.json" for part in PARTS}


@pytest.fixture
def parts(checkpoint: Path) -> Parts:
    names = {part: "scheduler_config.json" if part == "scheduler" else "config.json" for part in PARTS}
    return {part: json.loads((checkpoint / part / name).read_text("utf-8")) for part, name in names.items()}


def test_what_is_written_is_read(parts: Parts) -> None:
    config = ModelConfig.read(parts, FILES)
    assert config == SMALL.config
    assert ModelConfig.read(config.to_json(), FILES) == config
    assert ModelConfig.read(json.loads(json.dumps(config.to_json())), FILES) == config


def test_derived_widths() -> None:
    config = SMALL.config
    assert (config.transformer.head_dim, config.transformer.ffn_dim, config.transformer.patch_dim) == (32, 256, 64)
    assert (config.transformer.adaln_dim, config.transformer.modulated_blocks) == (96, 5)
    assert (config.text_encoder.used_layers, config.vae.scale) == (3, 8)


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_rope_theta_of_either_generation(parts: Parts, key: str) -> None:
    text = parts["text_encoder"]
    del text["rope_theta"]
    text[key] = {"rope_type": "default", "rope_theta": 12345.0}
    assert ModelConfig.read(parts, FILES).text_encoder.rope_theta == 12345.0


def test_a_null_is_as_good_as_nothing(parts: Parts) -> None:
    parts["text_encoder"]["rope_scaling"] = None
    parts["transformer"]["siglip_feat_dim"] = None
    parts["scheduler"]["shift_terminal"] = None
    assert ModelConfig.read(parts, FILES) == SMALL.config


def remove(part: str, key: str) -> Callable[[Parts], object]:
    return lambda parts: parts[part].pop(key)


def change(part: str, key: str, value: object) -> Callable[[Parts], object]:
    return lambda parts: parts[part].update({key: value})


WRONG = [
    ("transformer", "dim", remove("transformer", "dim")),
    ("transformer", "n_layers", change("transformer", "n_layers", 0)),
    ("transformer", "n_layers", change("transformer", "n_layers", 2.5)),
    ("transformer", "n_layers", change("transformer", "n_layers", True)),
    ("transformer", "n_heads", change("transformer", "n_heads", 5)),
    ("transformer", "axes_dims", change("transformer", "axes_dims", [8, 12])),
    ("transformer", "axes_dims", change("transformer", "axes_dims", [8, 12, 14])),
    ("transformer", "axes_dims", change("transformer", "axes_dims", [7, 12, 13])),
    ("transformer", "axes_lens", change("transformer", "axes_lens", [1536, 512, -1])),
    ("transformer", "n_kv_heads", change("transformer", "n_kv_heads", 1)),
    ("transformer", "qk_norm", change("transformer", "qk_norm", False)),
    ("transformer", "siglip_feat_dim", change("transformer", "siglip_feat_dim", 1152)),
    ("transformer", "all_patch_size", change("transformer", "all_patch_size", [4])),
    ("transformer", "norm_eps", change("transformer", "norm_eps", float("nan"))),
    ("transformer", "t_scale", change("transformer", "t_scale", "1000")),
    ("transformer", "cap_feat_dim", change("transformer", "cap_feat_dim", 128)),
    ("transformer", "in_channels", change("transformer", "in_channels", 4)),
    ("text_encoder", "model_type", change("text_encoder", "model_type", "llama")),
    ("text_encoder", "num_hidden_layers", change("text_encoder", "num_hidden_layers", 1)),
    ("text_encoder", "head_dim", change("text_encoder", "head_dim", 33)),
    ("text_encoder", "num_key_value_heads", change("text_encoder", "num_key_value_heads", 3)),
    ("text_encoder", "rope_theta", remove("text_encoder", "rope_theta")),
    ("text_encoder", "rope_type", change("text_encoder", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6})),
    ("text_encoder", "attention_bias", change("text_encoder", "attention_bias", True)),
    ("vae", "block_out_channels", change("vae", "block_out_channels", [])),
    ("vae", "norm_num_groups", change("vae", "norm_num_groups", 7)),
    ("vae", "scaling_factor", change("vae", "scaling_factor", 0)),
    ("vae", "use_quant_conv", change("vae", "use_quant_conv", True)),
    ("vae", "down_block_types", change("vae", "down_block_types", ["AttnDownBlock2D"] * 4)),
    ("vae", "act_fn", change("vae", "act_fn", "gelu")),
    ("scheduler", "shift", change("scheduler", "shift", -3)),
    ("scheduler", "shift", change("scheduler", "shift", 10**400)),
    ("scheduler", "use_dynamic_shifting", change("scheduler", "use_dynamic_shifting", True)),
    ("scheduler", "use_karras_sigmas", change("scheduler", "use_karras_sigmas", True)),
    ("scheduler", "shift_terminal", change("scheduler", "shift_terminal", 0.02)),
]


@pytest.mark.parametrize(("part", "key", "damage"), WRONG, ids=[f"{i}-{p}.{k}" for i, (p, k, _) in enumerate(WRONG)])
def test_a_wrong_value_is_named(part: str, key: str, damage: Callable[[Parts], object], parts: Parts) -> None:
    broken = copy.deepcopy(parts)
    damage(broken)
    with pytest.raises(ConfigError) as caught:
        ModelConfig.read(broken, FILES)
    assert str(caught.value).startswith(f"{FILES[part]}: ")
    assert key in str(caught.value)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_what_is_no_object(part: str, data: object, parts: Parts) -> None:
    with raises_with(ConfigError, f"{FILES[part]}:", "JSON object"):
        ModelConfig.read({**parts, part: data}, FILES)
