"""The samplers by name."""

from collections.abc import Callable, Mapping

from ..model.sampling_names import SamplerName
from ..model.schedule import Schedule
from .multistep import Dpmpp2M, ResMultistep
from .one_step import Euler, EulerAncestral, Heun, Lcm
from .solver import Noise, Solver
from .unipc import UniPc

_SOLVERS: Mapping[SamplerName, Callable[[Schedule, Noise], Solver]] = {
    SamplerName.EULER: Euler,
    SamplerName.HEUN: Heun,
    SamplerName.DPMPP_2M: Dpmpp2M,
    SamplerName.UNIPC: UniPc,
    SamplerName.LCM: Lcm,
    SamplerName.EULER_ANCESTRAL: EulerAncestral,
    SamplerName.RES_MULTISTEP: ResMultistep,
}


def make_solver(name: SamplerName, schedule: Schedule, noise: Noise) -> Solver:
    """A solver for one batch. `noise` gives what it adds after a step, where it adds any."""
    return _SOLVERS[name](schedule, noise)
