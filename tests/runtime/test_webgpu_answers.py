"""What the `webgpu` executor asks of an adapter: known answers, the verdict on fused attention, errors, one at a time.

Kernels are stand-ins. `executors/test_webgpu_executor` computes on an adapter.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from facts import assert_facts, raises_with
from stale_attention import stale_attention
from test_webgpu import LLVMPIPE, RADEON

from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.errors import CancelledError, DeviceLostError, ExecutorError
from zimage_runtime.executors.ort import attention_verdict, webgpu_answers
from zimage_runtime.executors.ort.attention_verdict import attention, judge, verdict_on
from zimage_runtime.executors.ort.cuda import CudaProvider, cuda_executor
from zimage_runtime.executors.ort.device import OrtDevice, checked, explained
from zimage_runtime.executors.ort.webgpu_library import Holdings, Turn
from zimage_runtime.executors.protocol import Conditioning, Denoiser, Session, Work
from zimage_runtime.executors.worker import Stop
from zimage_runtime.model.geometry import Rotary, image_geometry
from zimage_runtime.tiles.tiling import TiledDecoder, TiledEncoder


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Bundle:
    return Bundle.open(bundle)


# The verdict on fused attention


def nan(queries: FloatArray, *_: object) -> FloatArray:
    return np.full_like(queries, np.nan)


def refuses(*_: object) -> FloatArray:
    raise RuntimeError("MultiHeadAttention: no\nkernel")


def fp16(queries: FloatArray, keys: FloatArray, values: FloatArray, heads: int) -> FloatArray:
    return attention(queries, keys, values, heads).astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("kernel", [stale_attention, nan, refuses, fp16])
def test_a_wrong_kernel_is_found(kernel: attention_verdict.Attend, head_dim: int) -> None:
    verdict = judge(kernel, head_dim)
    assert not verdict.right
    assert len(verdict.text.splitlines()) == 1


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_a_right_kernel_is_found(head_dim: int) -> None:
    def flash(queries: FloatArray, keys: FloatArray, values: FloatArray, heads: int) -> FloatArray:
        asked.append(queries.shape)
        return attention(queries, keys, values, heads)

    asked: list[tuple[int, ...]] = []
    assert judge(flash, head_dim).right
    ((_, tokens, width),) = asked
    assert tokens >= 128
    assert width % head_dim == 0


def test_an_adapter_is_asked_once_and_a_software_adapter_never(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(*arguments: Any) -> FloatArray:
        asked.append(1)
        return attention(*arguments)

    verdict_on.cache_clear()
    monkeypatch.setattr(attention_verdict, "attend_on_webgpu", counted)
    assert not verdict_on(LLVMPIPE, 64).right
    assert asked == []
    assert verdict_on(RADEON, 64).right
    assert verdict_on(RADEON, 64).right
    assert asked == [1]
    verdict_on.cache_clear()


# Known answers


def test_a_known_answer_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    def on_cpu(model: bytes, feeds: Any) -> FloatArray:
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        values: FloatArray = session.run(["y"], dict(feeds))[0]
        return values

    known = webgpu_answers.ANSWERS["transformer"]
    monkeypatch.setattr(webgpu_answers, "run_on_webgpu", on_cpu)
    assert webgpu_answers.compare(known) is None
    monkeypatch.setattr(webgpu_answers, "run_on_webgpu", lambda *arguments: 1.001 * on_cpu(*arguments))
    assert_facts(str(webgpu_answers.compare(known)), known.what, "1.0e-03")
    monkeypatch.setattr(webgpu_answers, "run_on_webgpu", refuses)
    assert_facts(str(webgpu_answers.compare(known)), known.what, "no kernel")


@pytest.mark.parametrize("precision", Precision)
def test_weights_are_asked_for_as_a_bundle_has_them(precision: Precision) -> None:
    answers = webgpu_answers.answers_for(precision)
    assert (precision.value in answers) == (precision in (Precision.FP16, Precision.INT8, Precision.INT4))
    assert set(answers) <= set(webgpu_answers.ANSWERS)


# Outputs and errors


def test_outputs_are_looked_at() -> None:
    values: FloatArray = np.array([0, 0, 1e-30], np.float32)
    assert checked("denoiser", values) is values
    for wrong, fact in ((0 * values, "zeros"), (values + np.float32(np.inf), "finite"), (values * np.nan, "finite")):
        with raises_with(ExecutorError, "denoiser", fact, "--size"):
            checked("denoiser", wrong)
    unwritten = OrtDevice("cpu").empty((2, 3)).numpy()
    assert np.isnan(unwritten).all(), "what a run does not write is seen"


@pytest.mark.parametrize(
    ("text", "error", "fact"),
    [
        # as 0.4.0 words them
        ("WebGPU validation failed. [Invalid Buffer (unlabeled)] is invalid due to a previous error.", 0, "memory"),
        ("vkAllocateMemory failed with VK_ERROR_OUT_OF_DEVICE_MEMORY", 0, "memory"),
        ("vkQueueSubmit failed with VK_ERROR_DEVICE_LOST", 1, "lost"),
        ("ID3D12Device::CreateCommandQueue failed with DXGI_ERROR_DEVICE_REMOVED (0x887A0005)", 1, "lost"),
    ],
)
def test_errors_say_what_happened(text: str, error: int, fact: str) -> None:
    found = explained("denoiser failed", RuntimeError(text))
    assert isinstance(found, DeviceLostError) == bool(error)
    assert_facts(str(found), "denoiser failed", fact)


class Silent(CudaProvider):
    """The CPU in a provider's place whose runs may fail without an error."""

    checks_outputs = True


ROTARY = Rotary(np.ones((1, 32, 16), np.float32), np.zeros((1, 32, 16), np.float32))
HIDDEN: FloatArray = np.ones((1, 8, 64), np.float32)
CONDITIONING = Conditioning(HIDDEN, np.ones(1, np.float32), ROTARY, ROTARY)


def run_stage(session: Session, call: str, denoiser: Denoiser) -> object:
    """Runs a stage by the name of its program, for an image of 32 x 32."""
    latents: FloatArray = np.ones((1, 16, 4, 4), np.float32)
    match call:
        case "text_encoder":
            return session.encode_text(HIDDEN, Rotary(ROTARY.cos[:, :8], ROTARY.sin[:, :8]))
        case "caption":
            return session.denoiser(CONDITIONING)
        case "denoiser":
            return denoiser(latents, 0)
        case "decoder":
            return session.decode(latents)
    return session.encode(np.ones((1, 3, 32, 32), np.float32))


@pytest.mark.parametrize(
    ("call", "tiled"),
    [
        *(("text_encoder", False), ("caption", False), ("denoiser", False), ("decoder", False), ("encoder", False)),
        *(("decoder", True), ("encoder", True)),
    ],
)
def test_no_stage_passes_zeros_on(call: str, tiled: bool, opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = cuda_executor(opened, budget=1 << 40, device=OrtDevice("cpu"))
    executor.provider = Silent(OrtDevice("cpu"), 1 << 40, True)
    geometry = image_geometry(32, 32, opened.manifest.config)
    plan = executor.plan(Work(geometry=geometry, tokens=8, encodes=True))
    plan = replace(plan, tiled=tiled, encodes_tiled=tiled)
    download = OrtDevice.download
    with executor.session(plan) as session:
        denoiser = session.denoiser(CONDITIONING)
        run_stage(session, call, denoiser)
        monkeypatch.setattr(OrtDevice, "download", lambda device, value: 0 * download(device, value))
        if tiled:  # zeros of tiles are not the image's
            monkeypatch.setattr(TiledDecoder, "__call__", lambda tiles, latents: np.zeros((1, 3, 32, 32), np.float32))
            zeros = np.zeros((1, 16, 4, 4), np.float32)
            monkeypatch.setattr(TiledEncoder, "__call__", lambda tiles, image: (zeros, zeros))
        with raises_with(ExecutorError, call, "zeros"):
            run_stage(session, call, denoiser)
    executor.close()


# Sharing


class LibrarySession:
    """What the library gives."""


def test_weights_are_counted_until_the_device_is_gone() -> None:
    holdings, ours, theirs = Holdings(), object(), object()
    sessions = [LibrarySession(), LibrarySession(), LibrarySession()]
    for session, owner, nbytes in zip(sessions, (ours, theirs, theirs), (1, 20, 300), strict=True):
        holdings.add(session, owner, nbytes)
    del session
    assert (holdings.of_others(ours), holdings.others(ours), holdings.others(theirs)) == (320, True, True)
    sessions.pop()
    assert (holdings.of_others(ours), holdings.stale) == (20, 300), "it is gone, and its memory is not"
    holdings.lose(4000)
    assert holdings.stale == 4300
    sessions.clear()
    assert (holdings.stale, holdings.any, holdings.others(ours)) == (0, False, False)
    holdings.lose(4000)
    assert holdings.stale == 0, "a device that holds nothing is gone"


def test_waiting_for_a_turn_can_be_cancelled() -> None:
    import threading

    turn, held, done, stop = Turn(), threading.Event(), threading.Event(), Stop()

    def hold() -> None:
        with turn.taken(), turn.taken():
            held.set()
            assert done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    stop.request()
    with pytest.raises(CancelledError), turn.taken(stop):
        pass
    done.set()
    thread.join()
    with turn.taken(Stop()):
        pass
