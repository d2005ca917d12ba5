"""What Prometheus reads at /metrics: counted as it happens, written as text when asked."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass
class Metrics:
    """Counters since the server started."""

    jobs: Counter[tuple[str, str]] = field(default_factory=Counter)  # by API and how they ended
    refusals: Counter[int] = field(default_factory=Counter)  # by status
    stage_seconds: dict[str, float] = field(default_factory=dict)
    stage_counts: Counter[str] = field(default_factory=Counter)
    images: int = 0
    restarts: int = 0  # of the engine

    def stage(self, name: str, seconds: float) -> None:
        """A stage took that long."""
        self.stage_seconds[name] = self.stage_seconds.get(name, 0.0) + seconds
        self.stage_counts[name] += 1

    def text(self, gauges: Iterable[tuple[str, str, Mapping[str, float]]]) -> str:
        """Prometheus's text format. A gauge is a name, what it means, and values by labels, "" for none."""
        lines: list[str] = []

        def write(name: str, kind: str, meaning: str, values: Iterable[tuple[str, float]]) -> None:
            lines.extend((f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"))
            lines.extend(f"{name}{labels} {value:.15g}" for labels, value in values)

        write("zimage_images_total", "counter", "Images that were written.", [("", self.images)])
        write(
            "zimage_jobs_total",
            "counter",
            "Requests for images that are over.",
            [(f'{{api="{api}",state="{state}"}}', count) for (api, state), count in sorted(self.jobs.items())],
        )
        write(
            "zimage_refusals_total",
            "counter",
            "Requests that were answered with an error.",
            [(f'{{status="{status}"}}', count) for status, count in sorted(self.refusals.items())],
        )
        write(
            "zimage_engine_restarts_total", "counter", "Times that the engine was started again.", [("", self.restarts)]
        )
        lines.extend(
            (
                "# HELP zimage_stage_seconds Seconds by stage of an image.",
                "# TYPE zimage_stage_seconds summary",
            )
        )
        for stage, seconds in sorted(self.stage_seconds.items()):
            lines.append(f'zimage_stage_seconds_sum{{stage="{stage}"}} {seconds:.6f}')
            lines.append(f'zimage_stage_seconds_count{{stage="{stage}"}} {self.stage_counts[stage]}')
        for name, meaning, values in gauges:
            write(name, "gauge", meaning, values.items())
        return "\n".join(lines) + "\n"
