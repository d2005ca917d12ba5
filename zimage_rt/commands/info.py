"""`zimage-rt info`: what a bundle contains, and whether it has changed since it was written."""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from zimage_runtime.command_line.progress import Progress
from zimage_runtime.errors import BundleError

if TYPE_CHECKING:
    from zimage_runtime.bundle.bundle import Bundle
    from zimage_runtime.bundle.controlnet import ControlNet
    from zimage_runtime.model.config import ModelConfig

_LABEL_WIDTH = 16


@click.command(short_help="Show what a bundle contains.")
@click.argument("bundle", type=click.Path())
@click.option("--verify", is_flag=True, help="Read every file and check that it has not changed since it was written.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of lines.")
def info(bundle: str, verify: bool, as_json: bool) -> None:
    """Show what BUNDLE contains: its source, dimensions, sizes, programs and measured distance to the checkpoint.

    BUNDLE is a directory, or the name of a bundle on the Hub, ORG/NAME, which is downloaded; or a ControlNet's folder.
    """
    from zimage_runtime.bundle.bundle import Bundle
    from zimage_runtime.bundle.controlnet import ControlNet, is_controlnet
    from zimage_runtime.bundle.hub import bundle_directory

    root = bundle_directory(bundle)
    opened = ControlNet.open(root) if is_controlnet(root) else Bundle.open(root)
    if not as_json:
        for line in _control_lines(opened) if isinstance(opened, ControlNet) else _lines(opened):
            click.echo(line)
    altered = _verify(opened) if verify else None
    if as_json:
        described = _control_document(opened) if isinstance(opened, ControlNet) else _document(opened)
        document = {**described, "verified": altered is None if verify else None}
        click.echo(json.dumps(document, indent=2))  # ASCII: stdout may be unable to encode a manifest's text
    if altered:
        raise altered
    if verify and not as_json:
        click.echo(f"all {len(opened.manifest.files)} files are unchanged")


def _verify(bundle: "Bundle | ControlNet") -> BundleError | None:
    """Hashes every file. Returns the error that names altered ones, so that a document can be printed first."""
    with Progress().task("verifying", bundle.size, in_bytes=True) as advance:
        try:
            bundle.verify(advance)
        except BundleError as error:
            return error
    return None


def _document(bundle: "Bundle") -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "path": str(bundle.root),
        "name": manifest.name,
        "source": vars(manifest.source),
        "precision": manifest.precision.value,
        "exporter": manifest.exporter,
        "config": manifest.config.to_json(),
        "variant": manifest.variant,
        "defaults": vars(manifest.defaults),
        "bytes": bundle.size,
        "files": len(manifest.files),
        "components": _sizes(bundle),
        "executors": sorted(manifest.executors),
        "programs": _programs(bundle),
        "rebalancing": sorted(manifest.rebalancing),
        "self_check": manifest.self_check,
        "parity": manifest.parity,
        "fingerprint": manifest.fingerprint,
    }


def _lines(bundle: "Bundle") -> Iterator[str]:
    manifest = bundle.manifest
    source, defaults = manifest.source, manifest.defaults
    yield _line("name", manifest.name)
    yield _line("source", source.name + (f", revision {source.revision}" if source.revision else ""))
    if manifest.variant:
        yield _line("variant", manifest.variant)
    yield _line("precision", manifest.precision.value)
    yield _line("exporter", manifest.exporter)
    for part, dimensions in _dimensions(manifest.config).items():
        yield _line(part, dimensions)
    guidance = "" if defaults.cfg_scale == 1 else f", cfg scale {defaults.cfg_scale:g}"
    yield _line("default", f"{defaults.width}x{defaults.height}, {defaults.steps} steps{guidance}")
    yield _line("size", f"{_readable(bundle.size)} in {len(manifest.files)} files")
    for component, size in _sizes(bundle).items():
        yield _line(f"  {component}", _readable(size))
    yield _line("executors", ", ".join(sorted(manifest.executors)) or "none: required programs are missing")
    for executor, programs in _programs(bundle).items():
        yield _line("  programs", f"{executor}: {', '.join(programs)}")
    if manifest.rebalancing:
        yield _line("rebalancing", f"factors of {' and '.join(sorted(manifest.rebalancing))} (a LoRA needs them)")
    yield from _measured(manifest.parity)
    yield _line("fingerprint", manifest.fingerprint)


def _control_document(net: "ControlNet") -> dict[str, Any]:
    from dataclasses import asdict

    manifest = net.manifest
    return {
        "path": str(net.root),
        "name": manifest.name,
        "source": vars(manifest.source),
        "precision": manifest.precision.value,
        "exporter": manifest.exporter,
        "config": asdict(manifest.config),
        "bytes": net.size,
        "files": len(manifest.files),
        "programs": _programs(net),
        "self_check": manifest.self_check,
        "parity": manifest.parity,
        "fingerprint": manifest.fingerprint,
    }


def _control_lines(net: "ControlNet") -> Iterator[str]:
    manifest, config = net.manifest, net.manifest.config
    yield _line("name", manifest.name)
    reads = "the control image, a mask and an image to inpaint" if config.inpaints else "the control image"
    yield _line("controlnet", f"version {config.version}, reads {reads}")
    yield _line("precision", manifest.precision.value)
    yield _line("exporter", manifest.exporter)
    yield _line("for a model of", f"width {config.dim}, {config.n_heads} heads")
    yield _line("hints after", f"layers {', '.join(map(str, config.places))}")
    yield _line("size", f"{_readable(net.size)} in {len(manifest.files)} files")
    for executor, programs in _programs(net).items():
        yield _line("  programs", f"{executor}: {', '.join(programs)}")
    yield from _measured(manifest.parity)
    yield _line("fingerprint", manifest.fingerprint)


def _measured(parity: Mapping[str, Any] | None) -> Iterator[str]:
    if parity is None:
        yield _line("parity", "not measured")
        return
    yield "parity"
    yield from _nested(parity, depth=1)


def _line(label: str, text: str) -> str:
    return f"{_printable(label):<{_LABEL_WIDTH}}  {_printable(text)}"


def _printable(text: str) -> str:
    """Text from a manifest without characters that control a terminal or break the line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _dimensions(config: "ModelConfig") -> dict[str, str]:
    encoder, transformer, vae, scheduler = config.text_encoder, config.transformer, config.vae, config.scheduler
    return {
        "text encoder": (
            f"{encoder.used_layers} of {encoder.num_hidden_layers} layers, width {encoder.hidden_size}, "
            f"{encoder.num_attention_heads} heads ({encoder.num_key_value_heads} for keys and values), "
            f"{encoder.vocab_size} tokens"
        ),
        "transformer": (
            f"{transformer.n_layers} layers and 2 x {transformer.n_refiner_layers} refiners, "
            f"width {transformer.dim}, {transformer.n_heads} heads"
        ),
        "vae": f"{vae.latent_channels} channels, {vae.scale} pixels per latent, widths {list(vae.block_out_channels)}",
        "scheduler": f"flow matching, shift {scheduler.shift:g}",
    }


def _sizes(bundle: "Bundle") -> dict[str, int]:
    """Bytes per folder; files beside the manifest are listed under their own names."""
    sizes: dict[str, int] = {}
    for path, record in bundle.manifest.files.items():
        folder = path.partition("/")[0]
        sizes[folder] = sizes.get(folder, 0) + record.size
    return sizes


def _programs(bundle: "Bundle | ControlNet") -> dict[str, list[str]]:
    """The programs that each executor has, by executor."""
    programs: dict[str, list[str]] = {}
    for program, records in bundle.manifest.programs.items():
        for executor in records:
            programs.setdefault(executor, []).append(program.value)
    return programs


def _nested(values: Mapping[str, Any], depth: int) -> Iterator[str]:
    """Numbers as `key: value`, indented by one level per object; their names are the exporter's."""
    for key, value in values.items():
        indent = "  " * depth + _printable(key)
        if isinstance(value, Mapping):
            yield f"{indent}:"
            yield from _nested(value, depth + 1)
        else:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            yield f"{indent}: {_printable(text)}"


def _readable(size: int) -> str:
    """A size in the decimal unit that fits it."""
    if size < 1000:
        return f"{size} B"
    amount = size / 1000
    for unit in ("kB", "MB"):
        if amount < 1000:
            return f"{amount:.2f} {unit}"
        amount /= 1000
    return f"{amount:.2f} GB"
