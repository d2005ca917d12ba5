"""The samplers and schedulers by the names that users type, which are ComfyUI's, and A1111's names for them."""

from enum import StrEnum


class SamplerName(StrEnum):
    """How the flow's differential equation is solved."""

    EULER = "euler"
    HEUN = "heun"
    DPMPP_2M = "dpmpp_2m"
    UNIPC = "unipc"
    LCM = "lcm"
    EULER_ANCESTRAL = "euler_ancestral"
    RES_MULTISTEP = "res_multistep"

    @property
    def label(self) -> str:
        """A1111's name."""
        return _SAMPLER_LABELS[self]

    @property
    def adds_noise(self) -> bool:
        """Whether new noise is added after each step, so that more steps do not approach one image."""
        return self in (SamplerName.LCM, SamplerName.EULER_ANCESTRAL)


class SchedulerName(StrEnum):
    """How the sigmas of a schedule are chosen."""

    MODEL = "model"
    SIMPLE = "simple"
    SGM_UNIFORM = "sgm_uniform"
    BETA = "beta"

    @property
    def label(self) -> str | None:
        """A1111's name; None for the model's own, which A1111 does not name."""
        return _SCHEDULER_LABELS.get(self)


_SAMPLER_LABELS = {
    SamplerName.EULER: "Euler",
    SamplerName.HEUN: "Heun",
    SamplerName.DPMPP_2M: "DPM++ 2M",
    SamplerName.UNIPC: "UniPC",
    SamplerName.LCM: "LCM",
    SamplerName.EULER_ANCESTRAL: "Euler a",
    SamplerName.RES_MULTISTEP: "Res Multistep",
}

_SCHEDULER_LABELS = {
    SchedulerName.SIMPLE: "Simple",
    SchedulerName.SGM_UNIFORM: "SGM Uniform",
    SchedulerName.BETA: "Beta",
}
