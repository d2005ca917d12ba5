"""One denoising step under a ControlNet on the CPU, against the step without, beside diffusers' own ratio; and memory.

The model has the published depth and a smaller width, so that shares of the work are the published model's: 34
blocks, and ControlNets of the published versions. Variants take turns, ours and diffusers', and a ratio is of two calls
in the same round. Velocities of both are compared. Memory is what a whole image takes in a process of its own, beside
what `zimage-rt plan` says.

    python benchmarks/control_step.py --work DIR
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    RESULTS,
    cli_child,
    describe,
    interleave,
    machine,
    markdown_table,
    measure_child,
    mib,
    open_session,
    physical_threads,
    prepared_bundle,
    ratio,
    relative_error,
    write_results,
)

from zimage_export.synthetic.checkpoint import FULL, SMALL, Scale
from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.tensors import DType, encode_header
from zimage_runtime.model.config import ModelConfig, TransformerConfig

WITHOUT, NONE = "without", "extended, none"
_PROMPT, _SEED, _SCALE = "a lighthouse on a cliff at dusk, oil painting", 7, 0.75
_WIDTH = 384

Calls = dict[str, Callable[[], FloatArray]]


@dataclass(frozen=True)
class Version:
    """A published version."""

    places: tuple[int, ...]
    channels: int
    refiner: str | None  # as diffusers names it


VERSIONS: Mapping[str, Version] = {
    "1.0": Version(tuple(range(0, 30, 5)), 16, None),
    "2.0": Version(tuple(range(0, 30, 2)), 33, "control_layers"),
    "2.1": Version(tuple(range(0, 30, 2)), 33, "control_noise_refiner"),
    "2.1-lite": Version((0, 10, 20), 33, "control_noise_refiner"),
}


def scale(width: int) -> Scale:
    """The published transformer, narrower, with a small text encoder and autoencoder."""
    heads = width // FULL.config.transformer.head_dim
    small = SMALL.config
    transformer = replace(
        FULL.config.transformer, dim=width, n_heads=heads, cap_feat_dim=small.transformer.cap_feat_dim
    )
    return Scale(ModelConfig(small.text_encoder, transformer, small.vae, small.scheduler))


def reference(version: Version, model: TransformerConfig) -> Any:
    """diffusers' ControlNet of random weights, all of which do something."""
    import torch
    from diffusers import ZImageControlNetModel

    torch.manual_seed(0)
    net = ZImageControlNetModel(
        control_layers_places=list(version.places),
        control_refiner_layers_places=list(range(model.n_refiner_layers)),
        control_in_dim=version.channels,
        add_control_noise_refiner=version.refiner,
        dim=model.dim,
        n_refiner_layers=model.n_refiner_layers,
        n_heads=model.n_heads,
        n_kv_heads=model.n_heads,
        norm_eps=model.norm_eps,
    )
    for name, values in net.named_parameters():
        if "_proj." in name and name.endswith(".weight"):  # zero, as training begins
            torch.nn.init.normal_(values, 0.0, values.shape[1] ** -0.5)
    return net.eval().requires_grad_(False)


def write_file(path: Path, net: Any) -> Path:
    """The same as a published file."""
    tensors = {name: value.numpy() for name, value in net.state_dict().items()}
    with path.open("wb") as file:
        file.write(encode_header({name: (DType.F32, value.shape) for name, value in tensors.items()}))
        for value in tensors.values():
            file.write(np.ascontiguousarray(value).tobytes())
    return path


def our_steps(bundle: Path, nets: Mapping[str, Path], size: int, control: FloatArray) -> tuple[Calls, FloatArray]:
    """A call for each variant that gives the velocity of the first step, and the prompt's hidden states."""
    from PIL import Image

    from zimage_runtime.pipeline import Pipeline, Request

    calls: Calls = {}
    for name in (WITHOUT, NONE, *nets):
        pipeline = Pipeline.from_bundle(bundle, "cpu")
        given: dict[str, Any] = {}
        if name in nets or name == NONE:
            net = nets[name] if name in nets else next(iter(nets.values()))
            given = {"control": Image.new("RGB", (size, size)), "controlnet": net, "control_scale": _SCALE}
        job = pipeline.prepare(Request(_PROMPT, size=(size, size), steps=8, seed=_SEED, **given))
        session = open_session(job)
        hidden = pipeline.hidden_states(session, job.ids)
        found = pipeline.control(job, session)
        if found is not None:
            latents = np.zeros_like(found.latents)
            latents[:, : control.shape[1]] = control
            steps = frozenset() if name == NONE else found.steps
            found = replace(found, latents=latents, steps=steps)
        denoiser = session.denoiser(pipeline.conditioning(job.geometry, job.schedule, hidden, None, found))
        noise = pipeline.initial_latents(job.geometry, job.seeds)
        calls[name] = functools.partial(denoiser, noise, 0)
    return calls, hidden


def their_steps(
    checkpoint: Path, nets: Mapping[str, Any], noise: FloatArray, hidden: FloatArray, control: FloatArray
) -> Calls:
    """The same with diffusers."""
    import torch
    from diffusers import ZImageControlNetModel, ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel.from_pretrained(checkpoint / "transformer").float().eval()
    latents, time_ = [torch.from_numpy(noise)[0].unsqueeze(1)], torch.zeros(1)
    caption = [torch.from_numpy(hidden)[0]]

    def step(net: Any = None) -> FloatArray:
        with torch.no_grad():
            samples = None
            if net is not None:
                rest = net.config.control_in_dim - control.shape[1]
                given = torch.from_numpy(np.pad(control, ((0, 0), (0, rest), (0, 0), (0, 0)))).unsqueeze(2)
                samples = net(latents, time_, caption, given, conditioning_scale=_SCALE)
            (out,) = transformer(latents, time_, caption, controlnet_block_samples=samples)[0]
        return -out.squeeze(1).numpy()[None]

    found: Calls = {WITHOUT: step}
    for name, net in nets.items():
        shared = ZImageControlNetModel.from_transformer(net, transformer)
        found[name] = functools.partial(step, shared)
    return found


def measure(options: argparse.Namespace, bundle: Path, checkpoint: Path, size: int) -> dict[str, Any]:
    """The rows of one size."""
    from zimage_export.controlnet import ControlOptions, export_controlnet
    from zimage_runtime.bundle.manifest import Precision
    from zimage_runtime.command_line.progress import Progress

    model = Bundle.open(bundle).manifest.config.transformer
    torch_nets = {name: reference(VERSIONS[name], model) for name in options.versions}
    nets = {}
    for name, net in torch_nets.items():
        file, places = write_file(options.work / f"{name}.safetensors", net), VERSIONS[name].places
        out = options.work / f"net-{name}"
        export_controlnet(file, out, ControlOptions(Precision.FP32, places, force=True), Progress(quiet=True))
        nets[name] = out
    rng = np.random.default_rng(1)
    control = rng.standard_normal((1, model.in_channels, size // 8, size // 8), np.float32)
    ours, hidden = our_steps(bundle, nets, size, control)
    from zimage_runtime.pipeline import Pipeline, Request

    pipeline = Pipeline.from_bundle(bundle, "cpu")
    job = pipeline.prepare(Request(_PROMPT, size=(size, size), steps=8, seed=_SEED))
    noise = pipeline.initial_latents(job.geometry, job.seeds)
    theirs = their_steps(checkpoint, torch_nets, noise, hidden, control)
    outputs = {name: call() for name, call in ours.items()}
    if not np.array_equal(outputs[NONE], outputs[WITHOUT]):
        raise RuntimeError("the extended program gives other bits without control")
    clock = time.process_time if options.cpu_time else time.perf_counter
    both = {("ours", name): call for name, call in ours.items()} | {("diffusers", n): c for n, c in theirs.items()}
    errors = {name: relative_error(outputs[name], call()) for name, call in theirs.items()}
    print(f"{size}: {len(both)} calls in {options.rounds} rounds", file=sys.stderr)
    seconds = interleave({"/".join(key): call for key, call in both.items()}, options.rounds, clock)
    print(f"{size}: timed", file=sys.stderr)
    rows = []
    for name in ours:
        row: dict[str, Any] = {"variant": name, "error": errors.get(name)}
        row["change"] = relative_error(outputs[name], outputs[WITHOUT])
        for system in ("ours", "diffusers"):
            if taken := seconds.get(f"{system}/{name}"):
                row[system] = {
                    "median_seconds": statistics.median(taken),
                    "of_without": vars(ratio(taken, seconds[f"{system}/{WITHOUT}"])),
                }
        rows.append(row)
    return {"size": f"{size}x{size}", "rows": rows, "memory": [memory(options, bundle, nets, size, v) for v in nets]}


def memory(options: argparse.Namespace, bundle: Path, nets: Mapping[str, Path], size: int, name: str) -> dict[str, Any]:
    """What an image takes, and what the plan says."""
    from PIL import Image

    given, out = options.work / "map.png", options.work / "out.png"
    Image.new("RGB", (size, size)).save(given)
    out.unlink(missing_ok=True)
    words = ["run", _PROMPT, "-m", str(bundle), "--size", f"{size}x{size}", "--steps", "2", "--seed", "1"]
    words += ["--executor", "cpu", "--control", str(given), "--controlnet", str(nets[name]), "-o", str(out), "--quiet"]
    peak, _ = measure_child(cli_child("zimage_rt.cli", *words))
    words = ["plan", str(bundle), "--size", f"{size}x{size}", "--executor", "cpu", "--tokens", "64", "--json"]
    _, planned = measure_child(cli_child("zimage_rt.cli", *words, "--controlnet", str(nets[name])))
    document = json.loads(planned)
    return {
        "variant": name,
        "planned_mib": mib(document["peak"]),
        "hints_mib": mib(document["hints"]),
        "anonymous_mib": mib(peak.anonymous),
        "resident_mib": mib(peak.resident),
    }


def to_markdown(document: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# A step under a ControlNet on the CPU",
        "",
        f"{describe(document['machine'])}.",
        f"Random weights in float32, 34 blocks of width {document['width']}; threads: {document['threads']}; seconds "
        f"of the {document['seconds_of']}; {document['rounds']} rounds.",
        "Seconds are of a machine that other work may share: compare ratios, which are medians over the rounds, to the "
        "step without control of the same system. The change is of the first step's velocity, relative to the one "
        "without; the distance is to diffusers' velocity.",
        f"Made by `{document['command']}`.",
    ]
    header = ["variant", "ours, s", "of the step without", "diffusers, s", "of the step without", "change", "distance"]
    for part in document["parts"]:
        rows = []
        for row in part["rows"]:
            cells = []
            for system in ("ours", "diffusers"):
                if found := row.get(system):
                    each = found["of_without"]
                    spread = f"{each['median']:.3f} ({each['least']:.2f}-{each['most']:.2f})"
                    cells += [f"{found['median_seconds']:.3f}", spread]
                else:
                    cells += ["-", "-"]
            error = "-" if row["error"] is None else f"{row['error']:.1e}"
            rows.append((row["variant"], *cells, f"{row['change']:.1e}", error))
        lines += ["", f"## {part['size']}", "", markdown_table(header, rows)]
        memory_header = ["variant", "planned", "of it hints", "anonymous", "resident"]
        keys = ("planned_mib", "hints_mib", "anonymous_mib", "resident_mib")
        rows = [(row["variant"], *(str(row[key]) for key in keys)) for row in part["memory"]]
        lines += ["", "Memory of a whole image, in MiB:", "", markdown_table(memory_header, rows)]
    return "\n".join(lines)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Makes the models, measures, and gives the document."""
    import torch

    from zimage_export.programs import add_programs

    torch.set_num_threads(physical_threads())
    options.work.mkdir(parents=True, exist_ok=True)
    checkpoint, bundle = prepared_bundle(options.work, f"control-{options.width}", scale(options.width))
    add_programs(Bundle.open(bundle), ("cpu",), lora=True)
    document: dict[str, Any] = {
        "machine": machine("numpy", "onnxruntime", "torch", "diffusers"),
        "command": _command(options),
        "width": options.width,
        "threads": physical_threads(),
        "rounds": options.rounds,
        "seconds_of": "processor" if options.cpu_time else "wall clock",
        "parts": [],
    }
    for size in options.sides:
        document["parts"].append(measure(options, bundle, checkpoint, size))
        print(f"{size} done", file=sys.stderr)
        if options.width == _WIDTH:
            write_results("control_step", document, to_markdown(document), options.out)
    return document


def _command(options: argparse.Namespace) -> str:
    """What was run, without this machine's paths."""
    words = ["python benchmarks/control_step.py --work DIR --sides", *options.sides, "--versions", *options.versions]
    words += ["--rounds", options.rounds]
    return " ".join(str(word) for word in [*words, *(["--cpu-time"] if options.cpu_time else [])])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, required=True, help="where checkpoint, bundle and ControlNets are kept: 5 GB"
    )
    parser.add_argument(
        "--width", type=int, default=_WIDTH, help="of the transformer; results are written for the default"
    )
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512], help="pixels")
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS), choices=list(VERSIONS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds, for a busy machine")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results are written")
    document = run(parser.parse_args())
    print(to_markdown(document))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
