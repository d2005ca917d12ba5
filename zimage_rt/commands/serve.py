"""`zimage-rt serve`: the APIs that clients already speak, and a page."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zimage_runtime.command_line.console import SizeType
from zimage_runtime.command_line.option_groups import GroupedCommand
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.errors import RequestError, ZImageRuntimeError

from .execution_options import NAMES as EXECUTION_NAMES
from .execution_options import execution_options
from .serve_options import KeepType, api_keys, is_loopback

if TYPE_CHECKING:
    from ..serve.settings import Keep

GROUPS = {
    "Common options": ("model", "host", "port", "output_dir", "keep", "lora_dir", "controlnet"),
    "Access": ("api_key_file", "allow_host", "allow_origin"),
    "Limits": ("max_queue", "max_pixels", "max_steps", "as_asked"),
    "Execution": EXECUTION_NAMES,
}


@click.command(cls=GroupedCommand, groups=GROUPS, short_help="Serve images over HTTP: OpenAI's API, A1111's, a page.")
@click.option(
    "-m", "--model", type=click.Path(), help="The bundle: a directory, or its Hub id.  [default: the demo bundle]"
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Where to listen. Others than loopback need a key."
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=7860,
    show_default=True,
    help="If taken, the next free one is used.",
)
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where images are kept.  [default: a temporary folder, removed at the end]",
)
@click.option(
    "--keep",
    type=KeepType(),
    help="Keep the newest N images, or with Nd those of N days.  [default: all in --output-dir, otherwise 200]",
)
@click.option(
    "--lora-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder of LoRA that requests may name.",
)
@click.option(
    "--controlnet",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A ControlNet that requests may use: its folder, which `zimage-export controlnet` makes.",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A file of keys, one a line: clients send one as bearer token or as password.",
)
@click.option("--allow-host", multiple=True, metavar="NAME", help="Another name of this server; may be given again.")
@click.option(
    "--allow-origin",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of another site call the API, like https://chat.example.org; may be given again.",
)
@click.option(
    "--max-queue", type=click.IntRange(1, 10_000), help="Requests that may wait; more are refused.  [default: 64]"
)
@click.option("--max-pixels", type=SizeType(), help="The largest image, by its area.  [default: 3840x2160]")
@click.option("--max-steps", type=click.IntRange(1, 1000), help="The most steps of an image.  [default: 50]")
@click.option(
    "--as-asked",
    is_flag=True,
    help="Over A1111's API, give a Turbo model any steps, CFG and sampler that clients ask for.",
)
@execution_options
def serve(
    model: str | None,
    host: str,
    port: int,
    output_dir: Path | None,
    keep: "Keep | None",
    lora_dir: Path | None,
    controlnet: Path | None,
    api_key_file: Path | None,
    allow_host: tuple[str, ...],
    allow_origin: tuple[str, ...],
    max_queue: int | None,
    max_pixels: tuple[int, int] | None,
    max_steps: int | None,
    as_asked: bool,
    executor: str,
    device: int,
    vram: int | None,
    low_memory: bool,
    trust_engines: bool,
) -> None:
    """Serve a bundle over HTTP until Ctrl-C.

    Prints the address. OpenAI's Images API is at /v1, A1111's at /sdapi/v1, a page at /, and what else there is at
    /docs. The first Ctrl-C lets the image at work finish; the second one does not.
    """
    try:
        from ..serve.server import address_of, bind, serve
    except ModuleNotFoundError as error:
        raise RequestError(f"{error.name} is missing: pip install 'zimage-rt[serve]'") from None
    from zimage_runtime.bundle.hub import bundle_directory

    from ..demo import demo_bundle
    from ..serve.limits import Limits
    from ..serve.refusals import UnavailableError
    from ..serve.settings import EngineSettings, Keep, Settings

    keys = api_keys(api_key_file) if api_key_file is not None else ()
    if not keys and not is_loopback(host):
        raise RequestError(f"--host {host}: others can reach it, so give a key with --api-key-file")
    progress = Progress()
    bundle = bundle_directory(model, progress) if model is not None else demo_bundle()
    given = {
        "max_queue": max_queue,
        "max_pixels": None if max_pixels is None else max_pixels[0] * max_pixels[1],
        "max_steps": max_steps,
    }
    limits = Limits(**{name: value for name, value in given.items() if value is not None})
    with _folder(output_dir) as folder, bind(host, port) as bound:
        settings = Settings(
            engine=EngineSettings(
                bundle=Path(bundle).absolute(),
                output_dir=folder,
                executor=executor,
                device=device,
                vram=vram,
                low_memory=low_memory,
                trust_engines=trust_engines,
                takes_loras=lora_dir is not None,
                controlnet=None if controlnet is None else controlnet.absolute(),
            ),
            limits=limits,
            keep=keep or (Keep() if output_dir is not None else Keep(count=200)),
            lora_dir=None if lora_dir is None else lora_dir.absolute(),
            keys=keys,
            host_names=allow_host,
            origins=allow_origin,
            as_asked=as_asked,
        )
        address = address_of(bound, host)
        try:
            serve(settings, bound, lambda: click.echo(address))
        except UnavailableError as error:
            raise ZImageRuntimeError(str(error)) from None


@contextlib.contextmanager
def _folder(output_dir: Path | None) -> Iterator[Path]:
    """The folder of images."""
    if output_dir is None:
        with tempfile.TemporaryDirectory(prefix="zimage-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    yield output_dir.absolute()
