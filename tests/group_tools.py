"""Groups of requests in tests: their images, and those of the same requests alone."""

from collections.abc import Iterable, Sequence

from zimage_runtime.events import ImageEvent, Request
from zimage_runtime.group import GroupEvent, JobGroup
from zimage_runtime.pipeline import Pipeline


def grouped(pipeline: Pipeline, requests: Sequence[Request]) -> JobGroup:
    return pipeline.group([pipeline.prepare(request) for request in requests])


def images(events: Iterable[GroupEvent]) -> dict[int, bytes]:
    return {one.index: one.event.image.tobytes() for one in events if isinstance(one.event, ImageEvent)}


def singles(pipeline: Pipeline, requests: Sequence[Request]) -> dict[int, bytes]:
    found = {}
    for index, request in enumerate(requests):
        (image,) = [e for e in pipeline.run(pipeline.prepare(request)) if isinstance(e, ImageEvent)]
        found[index] = image.image.tobytes()
    return found


def in_groups(pipeline: Pipeline, requests: Sequence[Request]) -> tuple[dict[int, bytes], list[int]]:
    """The images of all requests, in as many groups as it takes, and the groups' sizes."""
    found: dict[int, bytes] = {}
    sizes: list[int] = []
    while len(found) < len(requests):
        group = grouped(pipeline, requests[len(found) :])
        done = len(found)
        found |= {done + index: image for index, image in images(pipeline.run_group(group)).items()}
        sizes.append(len(group.jobs))
    return found, sizes
