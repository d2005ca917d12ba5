"""What is left behind by its owner is freed, and nobody waits for a thread that has ended."""

import subprocess
import sys

import pytest

FREED_BY_GARBAGE_COLLECTION = """
import gc
from zimage_runtime.executors.worker import Worker


def session(worker):
    try:
        yield worker.call(lambda: "loaded")
    finally:
        worker.call(lambda: print("freed"))


class Owner:
    def __init__(self):
        self.worker = Worker("test")
        self.session = session(self.worker)
        self.cycle = self


gc.disable()
owner = Owner()
print(next(owner.session))
del owner
gc.collect()
print("collected")
"""

LEFT_AT_EXIT = """
import itertools
import zimage_rt

pipeline = zimage_rt.Pipeline.from_bundle(zimage_rt.demo_bundle(), executor="cpu")
events = pipeline.stream("a red fox", size=(64, 64), steps=3)
first = list(itertools.islice(events, 2))
print("left")
"""

LEFT_IN_A_CYCLE = LEFT_AT_EXIT.replace("print", "import gc; cycle = [events, pipeline]; cycle.append(cycle)\nprint") + (
    """
del events, pipeline, first, cycle
gc.collect()
print("collected")
"""
)


@pytest.mark.parametrize(
    ("program", "printed"),
    [
        (FREED_BY_GARBAGE_COLLECTION, ["loaded", "freed", "collected"]),
        pytest.param(LEFT_IN_A_CYCLE, ["left", "collected"], marks=pytest.mark.deep),
        pytest.param(LEFT_AT_EXIT, ["left"], marks=pytest.mark.deep),
    ],
)
def test_the_process_goes_on_and_ends(program: str, printed: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, printed), done.stderr
