"""The reference: diffusers' own pipeline in float32, with weights in memory only while their block runs.

Blocks are built on torch's meta device, take their tensors from the checkpoint just before they run and drop them
just after, so that a checkpoint of any size is run by the code that defines it, in the memory of one block.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from zimage_runtime.model.linears import EMBEDDINGS

from ..source.checkpoint import Checkpoint
from ..source.tensors import TensorSource
from ..source.weights import Weights
from ..synthetic.byte_tokenizer import chat_template

_BLOCK_CLASSES = {"ZImageTransformerBlock", "Qwen3DecoderLayer"}


class ReferencePipeline(ZImagePipeline):  # type: ignore[misc]
    """`ZImagePipeline` that computes on the CPU although its weights lie elsewhere."""

    @property
    def _execution_device(self) -> torch.device:
        return torch.device("cpu")


def reference_pipeline(checkpoint: Checkpoint) -> ReferencePipeline:
    """The pipeline of a checkpoint. Nothing but the VAE and a few small tensors is loaded yet."""
    pipeline = ReferencePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**asdict(checkpoint.config.scheduler)),
        vae=_vae(checkpoint),
        text_encoder=_text_encoder(checkpoint),
        tokenizer=_tokenizer(checkpoint),
        transformer=_transformer(checkpoint),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Components in single files may have no folder with their configuration; then it is derived from their shapes.


def _has_config(checkpoint: Checkpoint, part: str) -> bool:
    return (checkpoint.root / part / "config.json").is_file()


def _tokenizer(checkpoint: Checkpoint) -> Any:
    folder = checkpoint.tokenizer.parent
    if (folder / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(folder)
    return PreTrainedTokenizerFast(
        tokenizer_file=str(checkpoint.tokenizer), chat_template=chat_template(), pad_token="<|endoftext|>"
    )


def _vae(checkpoint: Checkpoint) -> nn.Module:
    if _has_config(checkpoint, "vae"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(checkpoint.root / "vae"))
    else:
        levels = len(checkpoint.config.vae.block_out_channels)
        vae = AutoencoderKL(
            **asdict(checkpoint.config.vae),
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    vae.load_state_dict({name: _tensor(checkpoint.vae.get(name)) for name in vae.state_dict()})
    return vae.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _transformer(checkpoint: Checkpoint) -> nn.Module:
    if _has_config(checkpoint, "transformer"):
        config = ZImageTransformer2DModel.load_config(checkpoint.root / "transformer")
    else:
        config = {**asdict(checkpoint.config.transformer), "n_kv_heads": checkpoint.config.transformer.n_heads}
    with torch.device("meta"):
        model = ZImageTransformer2DModel.from_config(config)
    return _streamed(model, checkpoint.transformer)


def _text_encoder(checkpoint: Checkpoint) -> nn.Module:
    if _has_config(checkpoint, "text_encoder"):
        config = AutoConfig.from_pretrained(checkpoint.root / "text_encoder")
    else:
        config = Qwen3Config(**asdict(checkpoint.config.text_encoder))
    with torch.device("meta"):
        model = Qwen3Model(config)
    model.rotary_emb = type(model.rotary_emb)(config)  # its tables are computed, not stored
    own = checkpoint.config.text_encoder
    vocabulary = (own.vocab_size, own.hidden_size)  # a file may have fewer rows than the folder's configuration
    model.embed_tokens = _RowEmbedding(checkpoint.text_encoder.get(EMBEDDINGS, vocabulary))
    return _streamed(model, checkpoint.text_encoder)


class _RowEmbedding(nn.Module):
    """An embedding that reads single rows of a table that may be larger than memory."""

    def __init__(self, table: TensorSource) -> None:
        super().__init__()
        self._table = table

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[…] → […, hidden_size]"""
        rows = self._table.picked_rows(ids.reshape(-1).tolist())
        return torch.from_numpy(rows).reshape(*ids.shape, -1)


def _streamed(model: nn.Module, weights: Weights) -> nn.Module:
    """Gives every block, and every other module that holds parameters, hooks that load and drop its weights."""
    model.eval().requires_grad_(False)
    for name, module in _units(model, ""):
        if module is model:
            _load(module, weights, name, recurse=False)
        else:
            module.register_forward_pre_hook(_loader(weights, name))
            module.register_forward_hook(_dropper)
    return model


def _units(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if type(module).__name__ in _BLOCK_CLASSES:
        yield name, module
        return
    if next(module.parameters(recurse=False), None) is not None:
        yield name, module
    for child_name, child in module.named_children():
        yield from _units(child, f"{name}.{child_name}" if name else child_name)


def _loader(weights: Weights, name: str) -> Callable[[nn.Module, Any], None]:
    def load(module: nn.Module, inputs: Any) -> None:
        _load(module, weights, name, recurse=True)

    return load


def _load(module: nn.Module, weights: Weights, name: str, *, recurse: bool) -> None:
    prefix = f"{name}." if name else ""
    names = [key for key, _ in module.named_parameters(recurse=recurse)]
    state = {key: _tensor(weights.get(prefix + key)) for key in names}
    module.load_state_dict(state, assign=True, strict=False)


def _dropper(module: nn.Module, inputs: Any, output: Any) -> None:
    module.to("meta")


def _tensor(source: TensorSource) -> torch.Tensor:
    return torch.from_numpy(source.read())
