"""Which executor runs a request, and why: the one that was asked for or, for `auto`, the best that can.

A named executor never falls back to another one. `auto` goes from what cannot open here, or cannot hold a request, to
the next in the registry's order, and says so.
"""

from dataclasses import dataclass, field, replace

from ..bundle.bundle import Bundle
from ..errors import ExecutorError, MemoryLimitError, RequestError, ZImageRuntimeError
from .protocol import Executor, Hardware, Options, Plan, Unavailable, Work
from .registry import AUTO, CPU, EXECUTORS, executor_kind

_HINT = "; `zimage-rt doctor` shows how to get what is missing, and --executor cpu works everywhere"


@dataclass(frozen=True)
class Chosen:
    """The executor for one request, its plan, and what the user should know about the choice."""

    executor: Executor
    plan: Plan
    why: str | None = None  # it was chosen, where the choice was ours
    unexpected: bool = False  # a GPU is here, but not what runs the request


@dataclass
class ExecutorChoice:
    """The executor of a pipeline. At most one stays open."""

    bundle: Bundle
    asked: str = AUTO
    options: Options = field(default_factory=Options)
    current: Executor | None = None
    _reasons: dict[str, Unavailable] = field(default_factory=dict)  # why executors cannot run the bundle here at all
    _failed: set[str] = field(default_factory=set)  # those that should run it here, but did not open

    @classmethod
    def of(cls, bundle: Bundle, executor: Executor) -> "ExecutorChoice":
        """An executor that is already open."""
        return cls(bundle, executor.name, current=executor)

    def open(self) -> Executor:
        """Opens the executor that was named, or the best that opens.

        Raises `RequestError` for one that is unknown or cannot run here, and for a budget of VRAM without a GPU.
        """
        if self.current is not None:
            return self.current
        if self.asked != AUTO:
            self._open_named()
        else:
            self._open_best()
        assert self.current is not None
        return self.current

    def _open_named(self) -> None:
        kind = executor_kind(self.asked)
        if unavailable := kind.why_unavailable(self.bundle, self.options.device):
            hint = _HINT if unavailable.of_machine else ""
            raise RequestError(f"executor {self.asked!r} cannot run here: {unavailable.reason}{hint}")
        self.current = kind.open(self.bundle, self.options)

    def _open_best(self) -> None:
        for name in EXECUTORS:
            if executor := self._try(name):
                self.current = executor
                return
        raise RequestError(f"no executor can run this bundle here: {self.why}")

    def _try(self, name: str) -> Executor | None:
        """Opens an executor; None where it cannot run the bundle, which is not tried a second time."""
        if name in self._reasons:
            return None
        kind = executor_kind(name)
        device = self.options.device
        unavailable = kind.why_not_automatic(device) or kind.why_unavailable(self.bundle, device)
        if unavailable is None:
            try:
                return kind.open(self.bundle, self._options_for(name))
            except ExecutorError as error:
                unavailable = Unavailable(str(error))
                self._failed.add(name)
        self._reasons[name] = unavailable
        return None

    def _options_for(self, name: str) -> Options:
        """A budget of VRAM is for GPUs: with `auto`, it does not keep the CPU from what no GPU can hold."""
        if executor_kind(name).on_gpu:
            return self.options
        without_gpus = all(other in self._reasons for other in EXECUTORS if executor_kind(other).on_gpu)
        if self.options.vram is not None and without_gpus:
            raise RequestError(f"vram is a budget for executors on a GPU; the {name} executor has none ({self.why})")
        return replace(self.options, vram=None, device=0)

    def _misses_a_gpu(self, name: str) -> bool:
        """Whether the processor is used although there is a GPU: something can be repaired."""
        return not executor_kind(name).on_gpu and any(not reason.of_machine for reason in self._reasons.values())

    @property
    def why(self) -> str:
        """Why better executors are not used; empty where the best one is."""
        found = {r.reason if r.of_machine else f"no {name}: {r.reason}": None for name, r in self._reasons.items()}
        return "; ".join(found)

    def plan(self, work: Work) -> Chosen:
        """The executor for a request, and its plan. Raises `RequestError` where no executor can hold it."""
        if self.asked != AUTO:
            executor = self.open()
            return Chosen(executor, _planned(executor, work))
        passed: list[str] = []
        failure: ZImageRuntimeError | None = None
        for name in EXECUTORS:
            mine = self.current is not None and self.current.name == name
            executor_or_none = self.current if mine else self._try(name)
            if executor_or_none is None:
                continue
            executor = executor_or_none
            try:
                plan = _planned(executor, work)
            except (MemoryLimitError, RequestError) as error:
                failure = error
                passed.append(f"{name} cannot run this request ({error})")
                executor.close()
                if mine:
                    self.current = None
                continue
            if not mine:
                self.close()
                self.current = executor
            why = "; ".join([*passed, self.why] if self.why else passed)
            unexpected = bool(passed or self._failed) or self._misses_a_gpu(name)
            return Chosen(executor, plan, _said(executor, why), unexpected)
        if failure is None:
            raise RequestError(f"no executor can run this bundle here: {self.why}")
        raise failure

    def close(self) -> None:
        """Closes the executor that is open."""
        if self.current is not None:
            self.current.close()
            self.current = None


def _planned(executor: Executor, work: Work) -> Plan:
    """The executor's plan. Raises `RequestError` for LoRA or control where it runs no program that takes them."""
    if work.branches is not None and not executor.takes_lora:
        raise RequestError(
            f"the {executor.name} executor takes no LoRA at run time; use --executor cpu, or merge them into a bundle "
            "with `zimage-export build --lora`"
        )
    if work.control is not None and not executor.takes_control:
        raise _takes_no_control(executor.name)
    return executor.plan(work)


def predicted(name: str, bundle: Bundle, work: Work, hardware: Hardware) -> Plan:
    """The plan of an executor for another machine. Raises `RequestError` for control where it takes none."""
    kind = executor_kind(name)
    if work.control is not None and not kind.takes_control:
        raise _takes_no_control(name)
    return kind.predict(bundle, work, hardware)


def _takes_no_control(name: str) -> RequestError:
    return RequestError(f"the {name} executor takes no ControlNet (control); use --executor cuda, webgpu or cpu")


def _said(executor: Executor, why: str) -> str:
    where = "the CPU" if executor.name == CPU else f"{executor.name} on {executor.device_name}"
    return f"Using {where}" + (f" ({why})" if why else "")
