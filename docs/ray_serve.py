"""Images over HTTP from as many replicas as a Ray cluster has GPUs for: `serve run ray_serve:app model=/models/BUNDLE`.

curl 'http://127.0.0.1:8000/?prompt=a+red+fox&seed=7' -o fox.png
"""

import asyncio
import io

from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from zimage_rt import Pipeline, ZImageRuntimeError, demo_bundle


@serve.deployment(ray_actor_options={"num_gpus": 1}, max_ongoing_requests=1, max_queued_requests=64)
class Images:
    def __init__(self, model: str | None = None, executor: str = "auto") -> None:
        self.pipeline = Pipeline.from_bundle(model or demo_bundle(), executor)

    def png(self, prompt: str, seed: int | None, steps: int | None) -> bytes:
        buffer = io.BytesIO()
        self.pipeline.generate(prompt, seed=seed, steps=steps).images[0].save(buffer, "PNG")
        return buffer.getvalue()

    async def __call__(self, request: Request) -> Response:
        asked = request.query_params
        try:
            seed, steps = (int(asked[name]) if name in asked else None for name in ("seed", "steps"))
            return Response(await asyncio.to_thread(self.png, asked["prompt"], seed, steps), media_type="image/png")
        except (ZImageRuntimeError, KeyError, ValueError) as error:
            return Response(f"cannot be generated: {error}", status_code=422)


def app(options: dict[str, str]) -> serve.Application:
    return Images.bind(options.get("model"))
