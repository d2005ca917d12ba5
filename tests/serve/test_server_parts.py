"""Parts of the server by themselves: turns, what is kept, names, numbers."""

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_tools import Capture, call_rt
from facts import has_fact, raises_with
from hypothesis import given
from hypothesis import strategies as st

from zimage_rt.serve.fair_queue import FairQueue
from zimage_rt.serve.gallery import Gallery, new_name
from zimage_rt.serve.guard import host_name
from zimage_rt.serve.jobs import EventName, Job, State
from zimage_rt.serve.metrics import Metrics
from zimage_rt.serve.orders import Order, Stepped, Wanted
from zimage_rt.serve.pictures import from_base64
from zimage_rt.serve.runs import partial_steps
from zimage_rt.serve.settings import Keep
from zimage_runtime.errors import RequestError
from zimage_runtime.images.formats import ImageFormat


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers()), max_size=30))
def test_clients_take_turns(given_items: list[tuple[str, int]]) -> None:
    """No client waits for a second one of another's before its own first; each one's own keep their order."""
    queue: FairQueue[tuple[str, int, int]] = FairQueue()
    for at, (lane, number) in enumerate(given_items):
        queue.put(lane, (lane, at, number))
    foreseen = list(queue)
    taken = []
    while (item := queue.take()) is not None:
        taken.append(item)
    assert taken == foreseen
    assert sorted(at for _, at, _ in taken) == list(range(len(given_items)))
    for lane in "abc":
        own = [at for name, at, _ in taken if name == lane]
        assert own == sorted(own)
    for end in range(len(taken)):
        served = {lane: sum(name == lane for name, *_ in taken[:end]) for lane in "abc"}
        waiting = {name for name, *_ in taken[end:]}
        for lane in waiting:
            assert all(served[other] <= served[lane] + 1 for other in "abc")


def test_a_client_that_comes_later_is_next_but_one() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in ("a1", "a2", "a3"):
        queue.put("a", name)
    assert queue.take() == "a1"
    queue.put("b", "b1")
    queue.put_first("a", "a1")
    assert list(queue) == ["a1", "b1", "a2", "a3"]
    assert queue.remove("a2")
    assert not queue.remove("a2")
    assert len(queue) == 3


def image_file(folder: Path, days: float, kind: ImageFormat = ImageFormat.PNG) -> str:
    name = new_name(time.time() - days * 24 * 60 * 60, 0, f"{int(days * 100):032x}", kind)
    (folder / name).write_bytes(b"image")
    return name


def test_what_is_kept(tmp_path: Path) -> None:
    names = [image_file(tmp_path, days) for days in (0, 1, 2, 3, 4)]
    assert Gallery(tmp_path, Keep()).prune() == 0
    assert Gallery(tmp_path, Keep(days=3)).prune(pinned={names[3]}) == 1
    gallery = Gallery(tmp_path, Keep(count=2))
    assert gallery.names() == names[:4]
    assert gallery.prune() == 2
    assert gallery.names() == names[:2]


def test_a_file_without_metadata_is_listed_without_settings(tmp_path: Path) -> None:
    image_file(tmp_path, 1)
    (picture,), more = Gallery(tmp_path, Keep()).listed(None, 5)
    assert picture.settings is None
    assert not more
    assert picture.document()["width"] is None


@pytest.mark.parametrize("text", ["0", "-1", "3w", "d", "1.5", ""])
def test_keep_is_a_number_of_images_or_days(capsys: Capture, text: str) -> None:
    outcome = call_rt(capsys, "serve", "--keep", text)
    assert outcome.status == 2
    assert has_fact(outcome.err, "30d")


def test_without_the_extra_the_command_says_how_to_get_it(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("zimage_rt.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    outcome = call_rt(capsys, "serve")
    assert outcome.status == 1
    assert "pip install 'zimage-rt[serve]'" in outcome.err


@pytest.mark.parametrize(
    ("steps", "partials", "expected"),
    [(8, 0, set()), (8, 1, {4}), (8, 3, {2, 4, 6}), (4, 3, {1, 2, 3}), (2, 3, {1}), (1, 3, set())],
)
def test_partial_images_are_spread_over_the_steps(steps: int, partials: int, expected: set[int]) -> None:
    assert partial_steps(steps, partials) == expected


@given(st.text(max_size=40))
def test_a_host_header_is_a_name_or_nothing(text: str) -> None:
    found = host_name(text)
    assert found is None or (found and not set(found) & set("/?#@"))


@pytest.mark.parametrize(
    "text", ["data:image/png,AAAA", "data:image/png;base64,", "http://127.0.0.1/a.png", "ä", "AAA"]
)
def test_text_that_is_no_base64(text: str) -> None:
    with raises_with(RequestError, "the image"):
        from_base64(text, "the image")


@pytest.mark.parametrize("text", ["aGk=", "data:image/png;base64,aGk=", "data:;base64,aG\nk=", " aGk=\n"])
def test_base64_of_clients(text: str) -> None:
    assert from_base64(text, "") == b"hi"


def test_metrics_are_what_prometheus_reads() -> None:
    metrics = Metrics()
    metrics.stage("step", 0.5)
    metrics.stage("step", 1.0)
    metrics.jobs["openai", "done"] += 2
    lines = metrics.text([("gauge", "A meaning.", {'{a="b"}': 3.0})]).splitlines()
    assert 'zimage_stage_seconds_sum{stage="step"} 1.500000' in lines
    assert 'zimage_stage_seconds_count{stage="step"} 2' in lines
    assert 'zimage_jobs_total{api="openai",state="done"} 2' in lines
    assert 'gauge{a="b"} 3' in lines
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names)), "a metric is stated once"


def test_readers_of_a_job_keep_no_queue_of_their_own() -> None:
    """However slow they are: partial images are kept while a reader needs them, and then forgotten."""

    async def run() -> None:
        job = Job(Order(id="1", wanted=Wanted(prompt="a", image=b"large")), "client", "lane", "openai")
        with job.pinned():
            for step in range(1, 4):
                job.publish(EventName.STEP, Stepped("1", 0, step, 3, 0.1, b"preview", b"partial"))
            job.end(State.DONE)
            seen = [event async for event in job.follow()]
            assert [event.what.partial for event in seen[:-1]] == [b"partial"] * 3
            assert [event.what.preview for event in seen[:-1]] == [None, None, b"preview"]
        assert [event.what.partial for event in job.events[:-1]] == [None] * 3
        assert job.order.wanted.image is None
        assert seen[-1].name is EventName.DONE

    asyncio.run(run())


def test_the_web_process_loads_no_inference_library(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from zimage_rt.demo import demo_bundle\n"
        "from zimage_rt.serve.server import make_app\n"
        "from zimage_rt.serve.limits import Limits\n"
        "from zimage_rt.serve.service import Service\n"
        "from zimage_rt.serve.settings import EngineSettings, Settings\n"
        "engine = EngineSettings(bundle=demo_bundle(), output_dir=Path(sys.argv[1]))\n"
        "make_app(Service.of(Settings(engine=engine, limits=Limits())))\n"
        "print(sorted({'onnxruntime', 'torch', 'tokenizers', 'tensorrt_rtx'} & set(sys.modules)))\n"
    )
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
