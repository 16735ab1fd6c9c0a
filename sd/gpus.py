"""Which optimizations a kind of device can run at all: known from its compute capability, without torch and without it.

The registrations in sd/optimizations/ ask here, and so does whoever rents a GPU, before it is paid for. The numbers are
NVIDIA's, https://developer.nvidia.com/cuda-gpus: (7, 5) is a T4, (8, 0) an A100, (8, 9) an L4, (9, 0) an H100.
"""

Capability = tuple[int, int]

NONE: Capability = (0, 0)
"""Of a device that is no NVIDIA GPU."""

NVIDIA: Capability = (1, 0)
AMPERE: Capability = (8, 0)
"""From here on: bf16 by the tensor cores, and what the Triton kernels are written for."""

ADA: Capability = (8, 9)
"""From here on: float8 by the tensor cores."""

_TRITON = ("fused-norm", "fused-layernorm", "fused-geglu", "fused-upsample", "split-conv")
_GRAPHS = ("cuda-graph", "loop-graph", "cudnn-benchmark")

LEAST: dict[str, Capability] = {
    **dict.fromkeys(_TRITON, AMPERE),
    **dict.fromkeys(_GRAPHS, NVIDIA),
    "float8": ADA,
}
"""By the name of an optimization, what a GPU must have at least; a CPU runs none of these."""

OF_CPUS = frozenset(
    {
        *("cpu-linear", "cpu-attention", "cpu-norm", "cpu-bf16", "cpu-int8", "winograd"),
        *("int8-static", "prepacked", "page-out", "keep-memory"),
    }
)
"""Those that no GPU runs."""


def sm(capability: Capability) -> str:
    """As NVIDIA writes it: sm75."""
    return "sm{}{}".format(*capability)


def enough(name: str, capability: Capability) -> bool:
    """Whether a device of this capability can run the optimization, whatever else that needs."""
    if capability != NONE and name == "bf16":
        return capability >= AMPERE
    return capability >= LEAST.get(name, NONE) and (capability == NONE or name not in OF_CPUS)


def lacking(names: str, capability: Capability) -> dict[str, str]:
    """Of a list as --opt takes it: the optimizations named there that cannot run, each with what it needs instead."""
    found = (word.strip().partition("=")[0] for word in names.split(","))
    return {name: needed(name) for name in found if not enough(name, capability)}


def needed(name: str) -> str:
    """What an optimization that not every device runs needs, in words."""
    if name in OF_CPUS:
        return "a CPU"
    least = AMPERE if name == "bf16" else LEAST[name]
    return "an NVIDIA GPU" + (f" with {sm(least)} or newer" if least > NVIDIA else "")
