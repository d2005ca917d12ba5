"""A checkpoint, opened lazily: configurations at once, tensors on demand.

It is a directory in diffusers layout. Components may come from single files instead (see `single_files`); where all of
them do, no directory is needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from zimage_runtime.bundle.rebalancing import SharedHeads
from zimage_runtime.bundle.tensors import DType
from zimage_runtime.errors import ConfigError
from zimage_runtime.model.config import PARTS, ModelConfig
from zimage_runtime.model.programs import COMPONENTS

from ..errors import CheckpointError
from .contents import read_json, set_name
from .foreign import wrong_text_encoder
from .forms.unserved import refuse_quantized_config
from .shapes import check_depth, check_published_depth, infer_config, text_width, with_depth
from .single_files import NO_FILES, SingleFiles
from .tokenizer_file import named_tokenizer, published_tokenizer
from .variant import DEFAULTS, Decision, Variant, decide, said_by_metadata, said_by_name, said_by_shift
from .weights import Weights

DEMO = Path(__file__).parents[3] / "demo_model" / "tiny"
"""The checkpoint of the demo model: in the repository, beside the packages, and not in an installed one."""

_PIPELINES = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")
_OMNI = "ZImageOmniPipeline"

_CLASSES = {
    "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
    "transformer": ("ZImageTransformer2DModel",),
    "vae": ("AutoencoderKL",),
}


def demo_checkpoint() -> Path:
    """The demo model's checkpoint: of the repository that this code is part of, or that the process was started in.

    Raises `CheckpointError` elsewhere.
    """
    found = next((place for place in (DEMO, Path(*DEMO.parts[-2:])) if place.is_dir()), None)
    if found is None:
        raise CheckpointError(
            f"{DEMO.name}: the demo model's checkpoint is in the repository of zimage-rt, not in the installed "
            f"package; clone the repository and run this there, or give the path of its {'/'.join(DEMO.parts[-2:])}"
        )
    return found


@dataclass(frozen=True)
class OpenOptions:
    """What the user says about a checkpoint that its files do not."""

    variant: Variant | None = None
    allow_pruned: bool = False  # fewer layers than published, at the published width


@dataclass(frozen=True)
class Checkpoint:
    """A published model: its configuration, its tensors by component, and its tokenizer."""

    root: Path
    name: str  # what to call it: the transformer's single file, or else the directory's name
    config: ModelConfig
    text_encoder: Weights
    transformer: Weights
    vae: Weights
    tokenizer: Path  # tokenizer.json
    variant: Decision

    @classmethod
    def open(cls, path: str | Path, files: SingleFiles = NO_FILES, options: OpenOptions | None = None) -> Self:
        """Opens a directory in diffusers layout, with the components that have a file of their own in `files`.

        Such a component's folder may be missing; where it has a ``config.json``, that one counts. With a file for
        every component, `path` need not be a checkpoint; a ``tokenizer.json`` there, or in a directory there, counts.
        ``"tiny"`` is the demo model (``"./tiny"`` a directory of that name).
        Raises `CheckpointError` for anything that is missing or wrong.
        """
        root = demo_checkpoint() if path == DEMO.name else Path(path)
        options = options or OpenOptions()
        if not files.complete:
            _check_layout(root, files)
        weights = {part: Weights.in_file(part, file) for part in COMPONENTS if (file := files.get(part))}
        parts, where = _read_parts(root, files, weights, options)
        variant = _decide_variant(root, files, weights, parts["scheduler"], options)
        parts["scheduler"] = _with_shift(parts["scheduler"], variant.variant, options)
        config = _checked_config(parts, where, weights)
        tokenizer = _find_tokenizer(root, files)
        weights |= {part: Weights.in_folder(root / part) for part in COMPONENTS if part not in weights}
        return cls(
            root=root,
            name=set_name(files.transformer) if files.transformer else root.resolve().name,
            config=config,
            text_encoder=weights["text_encoder"].without_prefix("model."),
            transformer=weights["transformer"],
            vae=weights["vae"],
            tokenizer=tokenizer,
            variant=variant,
        )

    @property
    def vae_type(self) -> DType:
        """The element type that the VAE is published in."""
        return self.vae.get("decoder.conv_in.weight").dtype

    @property
    def timestep_type(self) -> DType:
        """The element type that the timestep embedder is published in."""
        return self.transformer.get("t_embedder.mlp.0.weight").dtype

    def heads(self, component: str) -> SharedHeads:
        """Which heads of a component share keys and values."""
        return SharedHeads.of(self.config, component)

    def weights(self, component: str) -> Weights:
        """The tensors of `text_encoder`, `transformer` or `vae`."""
        return {"text_encoder": self.text_encoder, "transformer": self.transformer, "vae": self.vae}[component]


def _check_layout(root: Path, files: SingleFiles) -> None:
    if not root.is_dir():
        problem = "is a file" if root.is_file() else "no such file or directory"
        raise CheckpointError(f"{root}: {problem}; give a checkpoint in diffusers layout")
    index = root / "model_index.json"
    if not index.is_file():
        raise CheckpointError(f"{root}: not a checkpoint in diffusers layout (it has no model_index.json)")
    data = read_json(index)
    kind = data.get("_class_name")
    if kind == _OMNI:
        raise CheckpointError(f"{index}: {_OMNI}: Z-Image Omni and Edit, which also read images, are not supported")
    if kind not in _PIPELINES:
        raise CheckpointError(f"{index}: {kind!r} is not supported; a Z-Image checkpoint says {_PIPELINES[0]!r}")
    for part, classes in _CLASSES.items():
        declared = data.get(part)
        name = declared[1] if isinstance(declared, list) and len(declared) == 2 else declared
        if name not in classes and not files.get(part):
            raise CheckpointError(f"{index}: {part} {name!r} is not supported; expected {' or '.join(classes)}")


def _read_parts(
    root: Path, files: SingleFiles, weights: Mapping[str, Weights], options: OpenOptions
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The four configurations and where each came from. `weights` are those of single files."""
    parts: dict[str, dict[str, Any]] = {}
    where: dict[str, str] = {}
    for part in PARTS:
        path = root / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        where[part] = str(path)
        single = weights.get(part)
        if single is not None and not path.is_file():
            where[part] = str(single.where)
            parts[part] = infer_config(part, single.shapes(), single.where, single.metadata)
            if not options.allow_pruned:
                check_published_depth(part, parts[part], single.where)
        elif part == "scheduler" and files.complete and not path.is_file():
            parts[part] = {}  # the variant's
        else:
            parts[part] = read_json(path)
            if single is None:
                refuse_quantized_config(parts[part], path)
            else:
                parts[part] = _adapted(part, parts[part], single, options)
    return parts, where


def _adapted(part: str, config: dict[str, Any], single: Weights, options: OpenOptions) -> dict[str, Any]:
    """A folder's configuration for a file in its place: the same model, but for what differs between makers."""
    shapes = single.shapes()
    vocabulary = shapes.get("embed_tokens.weight", ())
    if part == "text_encoder" and len(vocabulary) == 2:  # some leave out the rows that no token has
        config = {**config, "vocab_size": vocabulary[0]}
    return with_depth(part, config, shapes) if options.allow_pruned else config


def _decide_variant(
    root: Path,
    files: SingleFiles,
    weights: Mapping[str, Weights],
    scheduler: Mapping[str, Any],
    options: OpenOptions,
) -> Decision:
    of_weights = []
    if files.transformer is not None:
        of_weights = said_by_metadata(weights["transformer"].metadata)
        of_weights += said_by_name(set_name(files.transformer), "file name")
    config = root / "scheduler" / "scheduler_config.json"
    of_folder = said_by_shift(scheduler.get("shift", DEFAULTS[Variant.TURBO].shift), config) if scheduler else []
    decision = decide(of_weights, of_folder, options.variant, files.transformer or root)
    return decision if files.transformer else Decision(decision.variant)


def _with_shift(scheduler: dict[str, Any], variant: Variant, options: OpenOptions) -> dict[str, Any]:
    """The scheduler with the variant's shift, unless it has one of its own."""
    published = [defaults.shift for defaults in DEFAULTS.values()]
    if scheduler.get("shift") is None or (options.variant is not None and scheduler["shift"] in published):
        return {**scheduler, "shift": DEFAULTS[variant].shift}
    return scheduler


def _checked_config(
    parts: Mapping[str, dict[str, Any]], where: Mapping[str, str], weights: Mapping[str, Weights]
) -> ModelConfig:
    reads = parts["transformer"].get("cap_feat_dim")
    if "text_encoder" in weights and isinstance(reads, int):
        found = weights["text_encoder"]
        if (width := text_width(found.shapes())) != reads:
            raise wrong_text_encoder(width, reads, found.where)
    try:
        config = ModelConfig.read(parts, where)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    for part, single in weights.items():
        check_depth(part, single.shapes(), single.where, config)
    return config


def _find_tokenizer(root: Path, files: SingleFiles) -> Path:
    if files.tokenizer is not None:
        return named_tokenizer(files.tokenizer)
    tokenizer = root / "tokenizer" / "tokenizer.json"
    places = [tokenizer, root / tokenizer.name] if files.complete else [tokenizer]
    if files.complete and root.suffix == tokenizer.suffix:
        places.append(root)
    found = next((place for place in places if place.is_file()), None)
    if found:
        return found
    if files.complete:
        return published_tokenizer(root)
    raise CheckpointError(f"{tokenizer}: missing from the checkpoint; download or copy it again")
