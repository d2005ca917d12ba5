"""The CUDA executor with the CPU in the GPU's place: the programs for CUDA, in fp32, through its own bindings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from facts import assert_facts, raises_with
from parity import Case, check_parity, draw, draw_with_diffusers, relative_error
from sessions import session

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.tensors import TensorFile
from zimage_runtime.errors import DeviceLostError, ExecutorError, MemoryLimitError
from zimage_runtime.executors.ort import cpu_plan as memory
from zimage_runtime.executors.ort.cuda import cuda_executor
from zimage_runtime.executors.ort.cuda_plan import plan_vram
from zimage_runtime.executors.ort.device import OrtDevice, explained
from zimage_runtime.executors.ort.device_executor import DeviceSession, OrtDeviceExecutor
from zimage_runtime.executors.ort.host_programs import HostPrograms
from zimage_runtime.executors.ort.tile_kernels import NORMED_MODEL, PLAIN_MODEL
from zimage_runtime.executors.overheads import ORT_CUDA
from zimage_runtime.executors.protocol import Work
from zimage_runtime.executors.worker import Stop
from zimage_runtime.model.geometry import ImageGeometry, image_geometry
from zimage_runtime.model.programs import Program
from zimage_runtime.pipeline import ImageEvent, NoticeEvent, Pipeline, Request
from zimage_runtime.tiles.tiling import TiledDecoder, TiledEncoder

PLENTY = 1 << 40
ON_CPU = OrtDevice("cpu")


def executor(bundle: Path, budget: int = PLENTY) -> OrtDeviceExecutor:
    return cuda_executor(Bundle.open(bundle), budget=budget, device=ON_CPU)


def pipeline_on(bundle: Path, budget: int = PLENTY) -> Pipeline:
    return Pipeline.on(Bundle.open(bundle), executor(bundle, budget))


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Pipeline:
    return pipeline_on(bundle)


@pytest.mark.parametrize(
    "case", [Case("a red fox", (80, 112), 8, 7), Case("雪地里的一只红狐狸", (64, 64), 4, 2**32 + 5)], ids=str
)
def test_generates_what_diffusers_generates(pipeline: Pipeline, diffusers_pipeline: Any, case: Case) -> None:
    assert pipeline.executor.name == "cuda"
    check_parity(draw(pipeline, case)[0], draw_with_diffusers(diffusers_pipeline, case))


def test_every_program_gives_what_the_cpus_gives(bundle: Path) -> None:
    from zimage_export.measure.self_check import fixed_inputs

    ours, reference = executor(bundle), HostPrograms(Bundle.open(bundle))
    for program, feeds in fixed_inputs(Bundle.open(bundle).manifest.config).items():
        if program is Program.MODULATION:
            continue
        expected = reference.run(program, feeds)
        found = ours.run_once(program, feeds, Stop())
        assert set(found) == set(expected)
        for name, values in expected.items():
            assert relative_error(found[name], values) < 1e-5, (program, name)


def test_an_image_may_be_started_from(pipeline: Pipeline, bundle: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)
    from PIL import Image

    request = Request("a fox", steps=4, seed=3, image=Image.fromarray(image), strength=0.6)
    found = np.asarray(last_image(pipeline, request), np.int16)
    expected = np.asarray(last_image(Pipeline.from_bundle(bundle, "cpu"), request), np.int16)
    assert np.abs(found - expected).max() <= 1


def last_image(pipeline: Pipeline, request: Request) -> Any:
    *_, event = pipeline.run(pipeline.prepare(request))
    assert isinstance(event, ImageEvent)
    return event.image


class Spy:
    """Counts what crosses to the device and what a run is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.uploads: list[tuple[int, ...]] = []
        self.runs: list[tuple[Program, dict[str, int], bool]] = []
        upload, run_bound = OrtDevice.upload, OrtDeviceExecutor.run_bound

        def uploaded(device: OrtDevice, values: Any) -> Any:
            self.uploads.append(values.shape)
            return upload(device, values)

        def bound(
            one: OrtDeviceExecutor, program: Program, inputs: Any, outputs: Any, stop: Stop, *, shrink: bool = False
        ) -> None:
            self.runs.append((program, {name: value.data_ptr() for name, value in inputs.items()}, shrink))
            run_bound(one, program, inputs, outputs, stop, shrink=shrink)

        monkeypatch.setattr(OrtDevice, "upload", uploaded)
        monkeypatch.setattr(OrtDeviceExecutor, "run_bound", bound)


def test_only_latents_cross_between_steps(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    pipeline = Pipeline.on(Bundle.open(bundle), executor(bundle))
    pipeline.generate("a fox", size=(64, 48), steps=3, seed=1, count=2)
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


def test_both_conditionings_stay_on_the_device(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caption tokens and rotary tables of each prompt, and one modulation table for both."""
    spy = Spy(monkeypatch)
    pipeline = Pipeline.on(Bundle.open(bundle), executor(bundle))
    options: dict[str, Any] = {
        "size": (64, 48),
        "steps": 3,
        "seed": 1,
        "cfg_scale": 4.0,
        "negative": "a long list of faults " * 4,
    }
    guided = pipeline.generate("a fox", **options).images[0]
    config = pipeline.bundle.manifest.config.transformer
    steps = [inputs for program, inputs, _ in spy.runs if program is Program.DENOISER]
    assert len(steps) == 6
    for name in ("caption", "image_cos", "image_sin", "caption_cos", "caption_sin"):
        assert [step[name] for step in steps] == [steps[0][name], steps[1][name]] * 3
        assert steps[0][name] != steps[1][name]
    assert [step["modulation"] for step in steps[::2]] == [step["modulation"] for step in steps[1::2]]
    assert spy.uploads.count((config.modulated_blocks, 4, config.dim)) == 3
    assert len(spy.uploads) == 2 * 5 + 2 * 3 + 6
    with Pipeline.from_bundle(bundle, "cpu") as cpu:
        expected = np.asarray(cpu.generate("a fox", **options).images[0])
    assert np.abs(np.asarray(guided, np.int16) - expected).max() <= 1


def test_what_a_step_returns_is_the_callers_own(pipeline: Pipeline) -> None:
    request = pipeline.prepare(Request("a fox", size=(32, 32), steps=2, seed=0))
    hidden = pipeline.hidden_states(session(pipeline), tuple(pipeline.token_ids("a fox")))
    denoiser = session(pipeline).denoiser(pipeline.conditioning(request.geometry, request.schedule, hidden))
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
    load = OrtDeviceExecutor._session

    def watched(one: OrtDeviceExecutor, program: Program, stop: Stop) -> Any:
        loaded.append(set(one._sessions) | {program})
        return load(one, program, stop)

    monkeypatch.setattr(OrtDeviceExecutor, "_session", watched)
    probe = Pipeline.on(opened, executor(bundle)).prepare(Request("a fox", size=(64, 64), steps=1, seed=0))
    roomy = plan_vram(opened.manifest, Work(geometry=probe.geometry, tokens=32, steps=1), PLENTY)
    assert roomy.keep_all
    for budget, most in ((roomy.peak - 1, 1), (PLENTY, 4)):
        loaded.clear()
        pipeline = Pipeline.on(opened, executor(bundle, budget))
        pipeline.generate("a fox", size=(64, 64), steps=1, seed=0)
        assert max(map(len, loaded)) == most
        kept = pipeline.executor.loaded  # type: ignore[attr-defined]
        assert (len(kept) > 1) == (most > 1)
        pipeline.generate("a fox", size=(64, 64), steps=1, seed=1)
        assert len(loaded) == (4 if most > 1 else 7), "what fits is loaded once, and a prompt is encoded once"
        pipeline.release()
        assert not pipeline.executor.loaded  # type: ignore[attr-defined]


def tight_budget(bundle: Bundle, geometry: ImageGeometry, *programs: Program) -> int:
    """Enough for all stages but the decoder (or those named) as a whole."""
    stages = plan_vram(bundle.manifest, Work(geometry=geometry, tokens=32, encodes=True), PLENTY).stages
    return ORT_CUDA.nbytes + min(stages[program].total for program in programs or (Program.DECODER,)) - 1


@pytest.mark.deep
def test_an_image_that_the_gpu_has_no_room_for_is_decoded_in_tiles(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    opened = Bundle.open(bundle)
    roomy = Pipeline.on(opened, executor(bundle))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3)).astype(np.uint8))
    request = Request("a fox", steps=2, seed=0, image=image, strength=0.5)
    geometry = roomy.prepare(request).geometry
    tight = Pipeline.on(opened, executor(bundle, tight_budget(opened, geometry, Program.DECODER, Program.ENCODER)))
    runs: list[str] = []
    run = OrtDevice.run

    def counted(device: OrtDevice, session: Any, binding: Any, output: str, stop: Stop) -> Any:
        runs.append(output)
        return run(device, session, binding, output, stop)

    monkeypatch.setattr(OrtDevice, "run", counted)
    events = list(tight.run(tight.prepare(request)))
    assert isinstance(events[0], NoticeEvent)
    assert_facts(events[0].text, "encoded", "decoded", "tiles")
    assert len(runs) > 50  # of tiles
    assert not tight.executor.loaded & {Program.DECODER, Program.ENCODER}  # type: ignore[attr-defined]
    expected = np.asarray(last_image(roomy, request), np.int16)
    assert np.abs(np.asarray(events[-1].image, np.int16) - expected).max() <= 1  # type: ignore[union-attr]


@pytest.mark.parametrize("values", [1, 5000, 1 << 20])
def test_tiles_on_the_device_are_the_whole_image(pipeline: Pipeline, values: int) -> None:
    """Against the decoder and encoder programs, with tiles of a row, of several, and of everything."""
    bundle, config = pipeline.bundle, pipeline.bundle.manifest.config.vae
    weights, opened = TensorFile(bundle.file(bundle.manifest.weights["vae"])), session(pipeline)
    assert isinstance(opened, DeviceSession)
    made = opened.tile_kernels()
    kernels = replace(made, tile_values=values)
    latents = np.random.default_rng(1).standard_normal((2, 16, 6, 10), dtype=np.float32)
    image = np.random.default_rng(2).uniform(-1, 1, (1, 3, 32, 48)).astype(np.float32)
    found = TiledDecoder(config, weights, kernels)(latents)
    np.testing.assert_allclose(found, session(pipeline).decode(latents), atol=1e-4)
    for one, other in zip(TiledEncoder(config, weights, kernels)(image), session(pipeline).encode(image), strict=True):
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
    pipeline = Pipeline.on(opened, executor(bundle))
    pipeline.run(pipeline.prepare(Request("a fox", size=(512, 512), steps=1, seed=0)))
    geometry = pipeline.prepare(Request("a fox", size=(512, 512), steps=1, seed=0)).geometry
    tight = Pipeline.on(opened, executor(bundle, tight_budget(opened, geometry)))
    with raises_with(MemoryLimitError, "512x512", "GPU", "tiles", "--size"):
        tight.run(tight.prepare(Request("a fox", size=(512, 512), steps=1, seed=0)))


def test_host_memory_is_looked_at_where_it_is(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1)
    pipeline = Pipeline.on(Bundle.open(bundle), executor(bundle))
    pipeline.run(
        pipeline.prepare(Request("a fox", size=(64, 64), steps=1, seed=0))
    )  # what the CPU executor would need does not matter


def test_the_gpu_provider_gets_the_budget(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    one = cuda_executor(Bundle.open(bundle), budget=8 << 30)
    opened = one.session(one.plan(Work(geometry=image_geometry(64, 64, one.bundle.manifest.config), tokens=2)))
    with raises_with(ExecutorError, "CUDA", "`zimage-rt doctor`"), opened as session:
        session.encode_text(np.zeros((1, 2, 64), np.float32), one_rotary())
    ((path, providers, enable_fallback),) = given
    assert path.endswith("text_encoder.cuda.onnx")
    assert enable_fallback == 0
    assert providers[0] == (
        "CUDAExecutionProvider",
        {
            "device_id": "0",
            "arena_extend_strategy": "kSameAsRequested",
            "gpu_mem_limit": str((8 << 30) - ORT_CUDA.nbytes),
            "cudnn_conv_algo_search": "HEURISTIC",
            "use_tf32": "0",
        },
    )


def test_a_schedule_of_many_steps_is_planned_for(pipeline: Pipeline) -> None:
    """Its modulation table stays on the GPU."""
    few, many = (pipeline.prepare(Request("a fox", size=(64, 64), steps=steps, seed=0)).plan for steps in (4, 40))
    assert many.peak > few.peak


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
    assert_facts(str(error), "denoiser", "GPU", "out of memory", "--size")


@pytest.mark.parametrize("text", LOST)
def test_a_lost_gpu_differs_from_other_failures(text: str) -> None:
    error = explained("denoiser failed", RuntimeError(text))
    assert isinstance(error, DeviceLostError)
    assert_facts(str(error), "denoiser", "GPU")
    assert not isinstance(explained("denoiser failed", RuntimeError("Invalid argument")), DeviceLostError)


def test_a_failure_in_mid_image_is_one_error(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline.on(Bundle.open(bundle), executor(bundle))
    events = pipeline.stream("a fox", size=(32, 32), steps=3, seed=0)
    next(events)
    next(events)
    session = pipeline.executor._sessions[Program.DENOISER]  # type: ignore[attr-defined]

    def broken(binding: Any, options: Any) -> None:
        raise RuntimeError(NO_MEMORY[0])

    monkeypatch.setattr(session, "run_with_iobinding", broken)
    with raises_with(ExecutorError, "denoiser", "GPU", "out of memory", "--size"):
        next(events)


def test_a_provider_without_an_arena_to_shrink_is_asked_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime refuses such a run before it starts, with this very text (``inference_session.cc``)."""
    one = executor(bundle)
    one._shrinks = "gpu:0"  # as on a GPU; the CPU provider refuses it, for it knows of no such arena
    embeddings, rotary = np.ones((1, 2, 64), np.float32), one_rotary()
    found = session(Pipeline.on(one.bundle, one)).encode_text(embeddings, rotary)
    assert one._shrinks is None
    np.testing.assert_array_equal(found, session(pipeline_on(bundle)).encode_text(embeddings, rotary))
