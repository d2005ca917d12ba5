"""The CUDA executor with the CPU in the GPU's place: the programs for CUDA, in fp32, through its own bindings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from parity import Case, check_parity, draw, draw_with_diffusers, relative_error

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.errors import DeviceLostError, ExecutorError, MemoryLimitError
from zimage_runtime.executors.ort import cpu_plan as memory
from zimage_runtime.executors.ort import device as ort_cuda
from zimage_runtime.executors.ort.device import Device, OrtCudaExecutor, explained
from zimage_runtime.executors.ort.device_plan import plan_vram
from zimage_runtime.executors.ort.tile_kernels import NORMED_MODEL, PLAIN_MODEL, OrtTileKernels
from zimage_runtime.model.geometry import ImageGeometry
from zimage_runtime.model.programs import Program
from zimage_runtime.pipeline import NoticeEvent, Pipeline
from zimage_runtime.tiles.tiling import TiledDecoder, TiledEncoder

PLENTY = 1 << 40
ON_CPU = Device("cpu")


def executor(bundle: Path, budget: int = PLENTY) -> OrtCudaExecutor:
    return OrtCudaExecutor(Bundle.open(bundle), budget=budget, device=ON_CPU)


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Pipeline:
    return Pipeline(Bundle.open(bundle), executor(bundle))


@pytest.mark.parametrize(
    "case", [Case("a red fox", (80, 112), 8, 7), Case("雪地里的一只红狐狸", (64, 64), 4, 2**32 + 5)], ids=str
)
def test_draws_what_diffusers_draws(pipeline: Pipeline, diffusers_pipeline: Any, case: Case) -> None:
    assert pipeline.executor.name == "cuda"
    check_parity(draw(pipeline, case)[0], draw_with_diffusers(diffusers_pipeline, case))


def test_every_program_gives_what_the_cpus_gives(bundle: Path) -> None:
    from zimage_export.measure.self_check import fixed_inputs

    ours, reference = executor(bundle), Pipeline.from_bundle(bundle, "cpu").executor
    for program, feeds in fixed_inputs(Bundle.open(bundle).manifest.config).items():
        if program is Program.MODULATION:
            continue
        expected = reference.run(program, feeds)  # type: ignore[attr-defined]
        found = ours._run_once(program, feeds)
        assert set(found) == set(expected)
        for name, values in expected.items():
            assert relative_error(found[name], values) < 1e-5, (program, name)


def test_an_image_may_be_started_from(pipeline: Pipeline, bundle: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)
    from PIL import Image

    arguments = ("a fox", None, 4, 3, 1, 1, Image.fromarray(image), 0.6)
    found = np.asarray(pipeline.generate(*arguments).images[0], np.int16)
    expected = np.asarray(Pipeline.from_bundle(bundle, "cpu").generate(*arguments).images[0], np.int16)
    assert np.abs(found - expected).max() <= 1


class Spy:
    """Counts what crosses to the device and what a run is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.uploads: list[tuple[int, ...]] = []
        self.runs: list[tuple[Program, dict[str, int], bool]] = []
        upload, run_bound = Device.upload, OrtCudaExecutor.run_bound

        def uploaded(device: Device, values: Any) -> Any:
            self.uploads.append(values.shape)
            return upload(device, values)

        def bound(one: OrtCudaExecutor, program: Program, inputs: Any, outputs: Any, *, shrink: bool = False) -> None:
            self.runs.append((program, {name: value.data_ptr() for name, value in inputs.items()}, shrink))
            run_bound(one, program, inputs, outputs, shrink=shrink)

        monkeypatch.setattr(Device, "upload", uploaded)
        monkeypatch.setattr(OrtCudaExecutor, "run_bound", bound)


def test_only_latents_cross_between_steps(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    pipeline = Pipeline(Bundle.open(bundle), executor(bundle))
    pipeline.generate("a fox", (64, 48), 3, 1, count=2)
    config = pipeline.bundle.manifest.config.transformer
    steps = [inputs for program, inputs, _ in spy.runs if program is Program.DENOISER]
    assert len(steps) == 6
    for name in ("caption", "image_cos", "image_sin", "caption_cos", "caption_sin"):
        assert len({inputs[name] for inputs in steps}) == 1, f"{name} moved between steps"
    assert [step["modulation"] for step in steps[:3]] == [step["modulation"] for step in steps[3:]]
    assert len({step["modulation"] for step in steps}) == 3
    # tables once a prompt, latents once a step
    assert spy.uploads.count((1, 16, 6, 8)) == 6
    assert spy.uploads.count((config.modulated_blocks, 4, config.dim)) == 3
    assert len(spy.uploads) == 5 + 2 * 3 + 6
    # the arena gives back a schedule's activations at its end
    assert [shrink for program, _, shrink in spy.runs if program is Program.DENOISER] == [False, False, True] * 2


def test_what_a_step_returns_is_the_callers_own(pipeline: Pipeline) -> None:
    request = pipeline.request("a fox", (32, 32), 2, 0)
    hidden = pipeline.encode_prompt(pipeline.token_ids("a fox"))
    denoiser = pipeline.executor.prepare(pipeline.conditioning(request.geometry, request.schedule, hidden))
    latents = pipeline.initial_latents(request.geometry, (0,))
    kept = latents.copy()
    first = denoiser(latents, 0)
    copy = first.copy()
    pipeline.executor.release()  # as happens between images that do not fit together
    second = denoiser(latents, 1)
    np.testing.assert_array_equal(first, copy)
    np.testing.assert_array_equal(latents, kept)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(denoiser(latents, 0), first)


def test_stages_are_loaded_in_turn_where_they_do_not_fit_together(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Bundle.open(bundle)
    loaded: list[set[Program]] = []
    session = OrtCudaExecutor._session

    def watched(one: OrtCudaExecutor, program: Program) -> Any:
        loaded.append(set(one._sessions) | {program})
        return session(one, program)

    monkeypatch.setattr(OrtCudaExecutor, "_session", watched)
    probe = Pipeline(opened, executor(bundle)).request("a fox", (64, 64), 1, 0)
    roomy = plan_vram(opened.manifest, probe.geometry, 32, PLENTY)
    assert roomy.keep_all
    for budget, most in ((roomy.peak - 1, 1), (PLENTY, 4)):
        loaded.clear()
        pipeline = Pipeline(opened, executor(bundle, budget))
        pipeline.generate("a fox", (64, 64), 1, 0)
        assert max(map(len, loaded)) == most
        kept = pipeline.executor.loaded  # type: ignore[attr-defined]
        assert (len(kept) > 1) == (most > 1)
        pipeline.generate("a fox", (64, 64), 1, 1)
        assert len(loaded) == (4 if most > 1 else 8), "what fits is loaded once"
        pipeline.release()
        assert not pipeline.executor.loaded  # type: ignore[attr-defined]


def tight_budget(bundle: Bundle, geometry: ImageGeometry, *programs: Program) -> int:
    """Enough for all stages but the decoder (or those named) as a whole."""
    stages = plan_vram(bundle.manifest, geometry, 32, PLENTY, encodes=True).stages
    return ort_cuda.CONTEXT + min(stages[program].total for program in programs or (Program.DECODER,)) - 1


@pytest.mark.deep
def test_an_image_that_the_gpu_has_no_room_for_is_decoded_in_tiles(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    opened = Bundle.open(bundle)
    roomy = Pipeline(opened, executor(bundle))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3)).astype(np.uint8))
    arguments = ("a fox", None, 2, 0, 1, 1, image, 0.5)
    geometry = roomy.request(*arguments).geometry
    tight = Pipeline(opened, executor(bundle, tight_budget(opened, geometry, Program.DECODER, Program.ENCODER)))
    runs: list[str] = []
    run = Device.run

    def counted(device: Device, session: Any, binding: Any, output: str) -> Any:
        runs.append(output)
        return run(device, session, binding, output)

    monkeypatch.setattr(Device, "run", counted)
    events = list(tight.stream(*arguments))
    assert isinstance(events[0], NoticeEvent)
    assert "encoded and decoded in tiles" in events[0].text
    assert len(runs) > 50  # of tiles
    assert not tight.executor.loaded & {Program.DECODER, Program.ENCODER}  # type: ignore[attr-defined]
    expected = np.asarray(roomy.generate(*arguments).images[0], np.int16)
    assert np.abs(np.asarray(events[-1].image, np.int16) - expected).max() <= 1  # type: ignore[union-attr]


@pytest.mark.parametrize("values", [1, 5000, 1 << 20])
def test_tiles_on_the_device_are_the_whole_image(pipeline: Pipeline, values: int) -> None:
    """Against the decoder and encoder programs, with tiles of a row, of several, and of everything."""
    weights, config = pipeline._vae_weights(), pipeline.bundle.manifest.config.vae
    made = pipeline.executor.tile_kernels()
    assert isinstance(made, OrtTileKernels)
    kernels = replace(made, tile_values=values)
    latents = np.random.default_rng(1).standard_normal((2, 16, 6, 10), dtype=np.float32)
    image = np.random.default_rng(2).uniform(-1, 1, (1, 3, 32, 48)).astype(np.float32)
    found = TiledDecoder(config, weights, kernels)(latents)
    np.testing.assert_allclose(found, pipeline.executor.decode(latents), atol=1e-4)
    for one, other in zip(TiledEncoder(config, weights, kernels)(image), pipeline.executor.encode(image), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_the_tiles_programs_are_onnx() -> None:
    """Written by hand: `onnx` reads them, checks them, and writes them again as they are."""
    for data, operators in ((PLAIN_MODEL, "Conv"), (NORMED_MODEL, "Mul Add Sigmoid Mul Pad Conv")):
        model = onnx.load_from_string(data)
        onnx.checker.check_model(model, full_check=True)
        assert [node.op_type for node in model.graph.node] == operators.split()
        assert model.SerializeToString() == data


def test_tiles_need_the_hosts_memory(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 20)
    opened = Bundle.open(bundle)
    pipeline = Pipeline(opened, executor(bundle))
    pipeline.run(pipeline.request("a fox", (512, 512), 1, 0))
    geometry = pipeline.request("a fox", (512, 512), 1, 0).geometry
    tight = Pipeline(opened, executor(bundle, tight_budget(opened, geometry)))
    with pytest.raises(MemoryLimitError, match=r"512x512 .* in tiles it needs"):
        tight.run(tight.request("a fox", (512, 512), 1, 0))


def test_host_memory_is_looked_at_where_it_is(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1)
    pipeline = Pipeline(Bundle.open(bundle), executor(bundle))
    pipeline.run(pipeline.request("a fox", (64, 64), 1, 0))  # what the CPU executor would need does not matter


def test_the_gpu_provider_is_told_the_budget(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    given: list[Any] = []

    class Session:
        def __init__(
            self, path: str, options: Any, providers: Any, enable_fallback: int, disabled_optimizers: list[str]
        ) -> None:
            given.append((path, providers, enable_fallback))

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    one = OrtCudaExecutor(Bundle.open(bundle), budget=8 << 30)
    with pytest.raises(ExecutorError, match=r"could not start CUDA.*zimage-rt doctor"):
        one.encode_text(np.zeros((1, 2, 64), np.float32), one_rotary())
    ((path, providers, enable_fallback),) = given
    assert path.endswith("text_encoder.cuda.onnx")
    assert enable_fallback == 0
    assert providers[0] == (
        "CUDAExecutionProvider",
        {
            "device_id": "0",
            "arena_extend_strategy": "kSameAsRequested",
            "gpu_mem_limit": str((8 << 30) - ort_cuda.CONTEXT),
            "cudnn_conv_algo_search": "HEURISTIC",
            "use_tf32": "0",
        },
    )


def one_rotary() -> Any:
    from zimage_runtime.model.geometry import Rotary

    return Rotary(np.ones((1, 2, 16), np.float32), np.zeros((1, 2, 16), np.float32))


# As ONNX Runtime words them: cuda_call.cc, bfc_arena.cc and cuDNN's status names
NO_MEMORY = [
    "CUDA failure 2: out of memory ; GPU=0 ; file=cuda_allocator.cc ; line=86 ; expr=cudaMalloc(&p, size);",
    "bfc_arena.cc:359 AllocateRawInternal Available memory of 12582912 is smaller than requested bytes of 50331648",
    "bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 1073741824",
    "CUDNN failure 4000: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED ; GPU=0",
    "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
]
LOST = [
    "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; expr=cudaStreamSynchronize(stream)",
    "CUDA failure 719: unspecified launch failure ; GPU=0",
    "CUDA failure 214: uncorrectable ECC error encountered ; GPU=0",
    "CUDA failure 999: unknown error ; GPU=0",
]


@pytest.mark.parametrize("text", NO_MEMORY)
def test_out_of_memory_says_what_to_do(text: str) -> None:
    error = explained("denoiser failed", RuntimeError(text))
    assert not isinstance(error, DeviceLostError)
    assert "denoiser failed: the GPU is out of memory" in str(error)
    assert "--size" in str(error)


@pytest.mark.parametrize("text", LOST)
def test_a_lost_gpu_is_told_from_other_failures(text: str) -> None:
    error = explained("denoiser failed", RuntimeError(text))
    assert isinstance(error, DeviceLostError)
    assert "\n" not in str(error)
    assert not isinstance(explained("denoiser failed", RuntimeError("Invalid argument")), DeviceLostError)


def test_a_failure_in_mid_image_is_one_error(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(Bundle.open(bundle), executor(bundle))
    events = pipeline.stream("a fox", (32, 32), 3, 0)
    next(events)
    next(events)
    session = pipeline.executor._sessions[Program.DENOISER]  # type: ignore[attr-defined]

    def broken(binding: Any, options: Any) -> None:
        raise RuntimeError(NO_MEMORY[0])

    monkeypatch.setattr(session, "run_with_iobinding", broken)
    with pytest.raises(ExecutorError, match="out of memory"):
        next(events)


def test_a_provider_without_an_arena_to_shrink_is_asked_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime refuses such a run before it starts, with this very text (``inference_session.cc``)."""
    one = executor(bundle)
    one._shrinks = True  # as on a GPU; the CPU provider refuses it, for it knows of no gpu:0
    embeddings, rotary = np.ones((1, 2, 64), np.float32), one_rotary()
    found = one.encode_text(embeddings, rotary)
    assert not one._shrinks
    np.testing.assert_array_equal(found, executor(bundle).encode_text(embeddings, rotary))
