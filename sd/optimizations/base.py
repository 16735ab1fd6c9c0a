"""What an optimization is, and the recorder through which it changes a pipeline.

An optimization is a function of a `Patch`, with its registration right above it:

    @optimization("deepcache", stage=Stage.REUSE, exact=False, summary="...", value=at_least(1), hint="N")
    def deepcache(patch, interval=3): ...

Whatever it changes goes through the patch's verbs. So all of it can be undone and explained, and an optimization that
would throw away what another one did is refused, both named. The models and the pipeline know nothing of this file.
"""

import functools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from sd.checkpoints.stamps import Stamp
from sd.guidance import Call
from sd.model_loader import read_weights
from sd.models import build

if TYPE_CHECKING:
    from sd.pipeline import StableDiffusion


P, T = ParamSpec("P"), TypeVar("T")


class OptimizationError(ValueError):
    """An optimization that is unknown, cannot run here, or not beside another; the message is for the user."""


class Stage(IntEnum):
    """When an optimization is applied: by stage, and within a stage by name. Later ones build on earlier ones."""

    PRECISION = 1  # the weights' type
    QUANTIZATION = 2  # of plain layers
    LAYOUT = 3  # of weights and activations in memory
    ATTENTION = 4  # the function that attends
    LAYERS = 5  # single layers by other kernels
    BLOCKS = 6  # blocks of layers, which call these
    REUSE = 7  # what is computed once and used again, of whatever layers there are now
    PREPACKING = 8  # the layers that nothing has taken so far
    CALLS = 9  # calls of modules wrapped: from here on no class changes
    COMPILATION = 10
    CAPTURE = 11  # one call of a network as a graph
    GUIDANCE = 12  # which calls there are
    NOISE = 13
    LOOP = 14  # all calls as one graph
    MEMORY = 15  # around everything


# ---- what an optimization needs


@dataclass(frozen=True)
class Need:
    """text: as a list shows it. why_not(pipe): empty where it is met, else what is missing there."""

    text: str
    why_not: Callable[["StableDiffusion"], str]


def _unless(met: Callable[["StableDiffusion"], bool]) -> Callable[["StableDiffusion"], str]:
    return lambda pipe: "" if met(pipe) else f"this is {here(pipe)}"


def capability(pipe: "StableDiffusion") -> tuple[int, int]:
    """(9, 0) on an H100, (0, 0) on what is no NVIDIA GPU."""
    return torch.cuda.get_device_capability(pipe.device) if pipe.device.type == "cuda" else (0, 0)


def here(pipe: "StableDiffusion") -> str:
    """The pipeline's device and dtype, to say in errors."""
    device = pipe.device.type
    if device == "cuda":
        major, minor = capability(pipe)
        device = f"{torch.cuda.get_device_name(pipe.device)} (sm{major}{minor})"
    return f"{device} in {str(pipe.dtype).removeprefix('torch.')}"


def _on_cpu_in_fp32(pipe: "StableDiffusion") -> bool:
    return pipe.device.type == "cpu" and pipe.dtype == torch.float32


ANYTHING = Need("any device", lambda pipe: "")
CPU = Need("a CPU", _unless(lambda pipe: pipe.device.type == "cpu"))
CPU_FP32 = Need("a CPU, in fp32", _unless(_on_cpu_in_fp32))
NVIDIA = Need("an NVIDIA GPU", _unless(lambda pipe: pipe.device.type == "cuda"))


# ---- registration


@dataclass(frozen=True)
class Optimization:
    """One switch. exact: it stays in the pipeline's dtype, and no further from the plain model in fp32 than 1.5 times
    what the plain model in that dtype is (in fp32: within a relative 1e-4).

    name: as --opt takes it. function(patch[, value]) applies it. value: reads what follows `name=`, raising ValueError;
    None if it takes none. hint: how a value looks. conflicts: names that cannot stand beside it. dtype: the pipeline's
    afterwards, if it changes that. beside: what it does to a ControlNet, where that is not the same function with the
    ControlNet in the UNet's place (beside.py); text says why it is nothing.
    """

    name: str
    function: Callable[..., None]
    stage: Stage
    exact: bool
    summary: str
    needs: Need = ANYTHING
    conflicts: tuple[str, ...] = ()
    value: Callable[[str], Any] | None = None
    hint: str = ""
    dtype: torch.dtype | None = None
    beside: Callable[..., None] | str | None = None

    @property
    def doc(self) -> str:
        return self.function.__doc__ or ""


def optimization(name: str, **options: Any) -> Callable[[Callable[..., None]], Optimization]:
    """Make the function below an `Optimization`, which the registry finds in its file."""
    return lambda function: Optimization(name, function, **options)


def in_the_weights_mode(function: Callable[Concatenate["StableDiffusion", P], T]) -> Callable[..., T]:
    """Run a function of a pipeline outside of inference mode, unless the pipeline was made in it.

    Tensors that are made in inference mode do not tell when they are written to.
    """

    @functools.wraps(function)
    def wrapped(pipe: "StableDiffusion", *args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(next(pipe.unet.parameters()).is_inference()), torch.no_grad():
            return function(pipe, *args, **kwargs)

    return wrapped


def at_least(minimum: int) -> Callable[[str], int]:
    """A reader of whole numbers from minimum on."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise ValueError(f"a whole number from {minimum} on")
        return int(text)

    return read


def one_of(*choices: str) -> Callable[[str], str]:
    """A reader of one of these words."""

    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return text

    return read


# ---- what layers can do beside forward, if their class says how


def without_bias(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(layer(x) less its bias, the bias), for a kernel that adds it in passing.

    A layer whose class has a method `without_bias(x)` does it its own way; of one that has not, the bias is in the
    result already, and None is returned for it.
    """
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return layer(x), None
    if type(layer) is nn.Conv2d:
        return layer._conv_forward(x, layer.weight, None), layer.bias
    if type(layer) is nn.Linear:
        return nn.functional.linear(x, layer.weight), layer.bias
    if hasattr(layer, "without_bias"):
        return layer.without_bias(x), layer.bias
    return layer(x), None


def product_of(layer: nn.Module) -> Callable[[Tensor, Tensor], Tensor] | None:
    """product(x, weight) as a Linear layer computes it: its class's `product`, if a switch gave it one; or None."""
    return nn.functional.linear if type(layer) is nn.Linear else getattr(type(layer), "product", None)


def added(conv: nn.Module, x: Tensor, shift: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """conv(x) + shift [B or 1, C] + residual [B, C, H, W]; at once where its class has a method `added` for that."""
    called_otherwise = conv._forward_hooks or conv._forward_pre_hooks or "forward" in vars(conv)
    if hasattr(conv, "added") and not called_otherwise:
        return conv.added(x, shift, residual)
    y = conv(x)
    y = y if shift is None else y + shift[:, :, None, None]
    return y if residual is None else y + residual


def each(function: Callable[[Tensor], Tensor], answer: Tensor | Sequence[Tensor]) -> Any:
    """function of a network's answer: of a UNet's tensor, or of all that a ControlNet has found."""
    return function(answer) if isinstance(answer, Tensor) else [function(one) for one in answer]


class ConditionalHalf:
    """half(context [2B, S, C]) -> the conditional half, the same object for the same one, as what is kept by the text
    wants it; None for a context that has no halves."""

    def __init__(self):
        self.context: Tensor | None = None
        self.half: Tensor | None = None

    def __call__(self, context: Tensor) -> Tensor | None:
        if context.shape[0] % 2 == 1:
            return None
        if context is not self.context:
            self.context, self.half = context, context.chunk(2)[1]
        return self.half


def keep(places: dict[Hashable, Tensor], key: Hashable, value: Tensor) -> None:
    """Copy to places[key], whose memory stays where it is: there captured graphs read what others of them have left."""
    place = places.get(key)
    if place is not None and (place.shape, place.dtype) == (value.shape, value.dtype):
        place.copy_(value)
        return
    # Not in inference mode: it is written to again, by calls in any mode.
    with torch.inference_mode(False):
        places[key] = value.clone()


# ---- the recorder


Refresh = Callable[[Tensor], None]
"""Called with the context [B, S, C] before each call of the UNet."""

SEAMS = {
    "generate": ("pipe", "generate"),
    "encode": ("pipe", "encode_prompts"),
    "sample": ("pipe", "sample"),
    "text": ("clip", "forward"),
    "predict": ("unet", "forward"),
    "decode": ("vae", "decode"),
}
"""The places of a pipeline that `Patch.around` wraps: whose method it is."""


@dataclass
class Converted:
    """Parameters of one model that a switch replaced. back(): undoes it without a file, where nothing was lost."""

    part: str
    names: tuple[str, ...]
    back: Callable[[], None] | None
    from_file: bool
    before: Stamp | None = None
    after: Stamp | None = None


@dataclass
class Before:
    """An object's class and attributes before a switch touched it, and the attributes that it has set since."""

    owner: Any
    kind: type
    attributes: dict[str, Any]
    names: set[str] = field(default_factory=set)

    def restore(self) -> None:
        owner, attributes = self.owner, vars(self.owner)
        owner.__class__ = self.kind
        # A swapped class keeps things in its module; of the pipeline itself only what was set is taken back.
        for name in list(attributes) if isinstance(owner, nn.Module) else self.names:
            if name not in self.attributes:
                attributes.pop(name, None)
        for name in self.names & self.attributes.keys():
            attributes[name] = self.attributes[name]


class Record:
    """All that was done to one pipeline: a patch a switch, in the order of application."""

    def __init__(self, pipe: "StableDiffusion"):
        self.pipe = pipe
        self.clip, self.unet, self.vae = pipe.clip, pipe.unet, pipe.vae
        self.patches: list[Patch] = []
        self._hook: Any = None

    def patch(self, name: str) -> "Patch":
        """What the next switch may do. From the first on, what is derived is refreshed before each call of the UNet."""
        if self._hook is None:
            # A function, since a method's object would be copied with the UNet.
            before = lambda unet, inputs, named: self._before_call(unet, inputs, named)  # noqa: E731
            self._hook = self.unet.register_forward_pre_hook(before, with_kwargs=True)
        self.patches.append(self.new_patch(name))
        return self.patches[-1]

    def new_patch(self, name: str) -> "Patch":
        return Patch(self, name)

    def _before_call(self, unet: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
        if unet is not self.unet:  # whose modules and derived weights it would use
            raise OptimizationError(
                "this UNet is a copy of an optimized one: undo the optimizations, copy, apply again"
            )
        self.refresh(inputs[2] if len(inputs) > 2 else named["context"])

    def parts(self) -> dict[str, nn.Module]:
        return {"clip": self.clip, "unet": self.unet, "vae": self.vae}

    def refresh(self, context: Tensor) -> None:
        """Bring all that is derived from weights or text up to date: for whoever runs the UNet without calling it."""
        # Not in inference mode: what is kept is written to again, by calls in any mode.
        with torch.inference_mode(False), torch.no_grad():
            more = [other(context) for patch in self.patches for other in patch.contexts]
            for each in (context, *(other for other in more if other is not None)):
                for patch in self.patches:
                    for refresh in patch.refreshers:
                        refresh(each)

    def key(self) -> tuple:
        """What a captured call of the UNet must tell apart, as it is now."""
        return tuple(key(self.pipe.call) for patch in self.patches for key in patch.keys)

    def class_by(self, module: nn.Module) -> str | None:
        """The switch that gave a module its class."""
        return next((patch.name for patch in reversed(self.patches) if id(module) in patch.swapped), None)

    def attribute_by(self, owner: Any, name: str) -> str | None:
        """The switch that set an attribute, or wrapped a call."""
        befores = ((patch.name, patch.before.get(id(owner))) for patch in reversed(self.patches))
        return next((switch for switch, before in befores if before and name in before.names), None)

    def stamp(self, one: Converted) -> Stamp:
        parameters = dict(self.parts()[one.part].named_parameters())
        return Stamp(parameters[name] for name in one.names if name in parameters)

    def undo(self, patches: "list[Patch] | None" = None) -> None:
        """Take these patches back, which must be the last ones; without any, all: then the pipeline is the plain one.

        Raises OptimizationError, with nothing changed, where weights are lost.
        """
        undone = list(self.patches if patches is None else patches)
        files = self._weights_of_file(undone)
        for patch in reversed(undone):
            patch.take_back(files)
            self.patches.remove(patch)
        for part, weights in files.items():
            assign(self.parts()[part], weights)
            self.pipe.note_loaded([f"{part}.{name}" for name in weights])
        self.pipe.loras.again(self.pipe, {f"{part}.{name}" for part, weights in files.items() for name in weights})
        if not self.patches and self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _weights_of_file(self, patches: "list[Patch]") -> dict[str, dict[str, Tensor]]:
        """Of each part, the converted weights as the checkpoint's file has them, but for those that `back` brings."""
        wanted: dict[str, set[str]] = {}
        for switch, one in ((patch.name, one) for patch in patches for one in patch.converted):
            if one.before == self.stamp(one):  # it failed before it replaced them
                one.back = lambda: None
            elif one.from_file and (one.back is None or one.after == self.stamp(one)):
                wanted.setdefault(one.part, set()).update(one.names)
            elif one.back is None:
                raise OptimizationError(
                    f"{switch} cannot be undone: no file holds the weights as they were before; "
                    "load the pipeline afresh"
                )
        pipe = self.pipe
        return {
            part: read_weights(pipe.source, pipe.config, part, names, pipe.device) for part, names in wanted.items()
        }


def record_of(owner: object) -> Record | None:
    """What was done to a pipeline, or to a ControlNet; or None."""
    return vars(owner).get("record")


def assign(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put these in the place of parameters: by name, as in the model's state_dict."""
    for path, weight in weights.items():
        module, _, name = path.rpartition(".")
        setattr(model.get_submodule(module), name, nn.Parameter(weight, requires_grad=False))


class Patch:
    """What one optimization may do to a pipeline."""

    def __init__(self, record: Record, name: str):
        self.record = record
        self.name = name
        self.pipe = record.pipe
        self.clip, self.unet, self.vae = record.clip, record.unet, record.vae
        self.again: Callable[[Patch], None] | str | None = None  # the same for a ControlNet, or why it is nothing
        self.call: Call = self.pipe.call
        self.changes = 0
        self.before: dict[int, Before] = {}  # by id of the owner
        self.swapped: set[int] = set()
        self.replaced: list[tuple[nn.Module, str, nn.Module]] = []
        self.converted: list[Converted] = []
        self.refreshers: list[Refresh] = []
        self.contexts: list[Callable[[Tensor], Tensor | None]] = []
        self.keys: list[Callable[[Call], object]] = []
        self.seams: list[str] = []
        self.labels: dict[int, str] = {}  # for `explain`, by id of the module: what computes there
        self.notes: dict[int, str] = {}  # and when

    # What a switch may do.

    def modules(self, kind: type[nn.Module], *models: nn.Module) -> list[Any]:
        """The modules of just this class, by default of all three networks: those that no other switch has taken."""
        models = models or (self.clip, self.unet, self.vae)
        return [m for model in models for m in model.modules() if type(m) is kind]

    def swap(self, module: nn.Module, kind: type[nn.Module], **attributes: Any) -> None:
        """Give a module the forward of `kind`, which keeps the parameters under their names, and attributes of its own.

        Raises OptimizationError where another switch wrapped it, or gave it a class on which `kind` does not build.
        """
        other = self.record.class_by(module)
        if other and not issubclass(kind, type(module)):
            raise self._would_undo(other, module)
        if wrapped_by := self.record.attribute_by(module, "forward"):
            raise self._would_undo(wrapped_by, module)
        self.touch(module)
        if type(module) is not kind:
            module.__class__ = kind
            self.swapped.add(id(module))
        self.changes += 1
        for name, value in attributes.items():
            self.set(module, name, value)

    def set(self, owner: Any, name: str, value: Any, label: str = "") -> None:
        """An attribute of a module or of the pipeline. label: what `explain` calls the function that attends.

        Raises OptimizationError where another switch set it.
        """
        other = self.record.attribute_by(owner, name)
        if other not in (None, self.name):
            raise self._would_undo(other, owner)
        self._set(owner, name, value)
        if label:
            self.labels[id(owner)] = label

    def around(self, place: str | nn.Module, wrapper: Callable[[Callable], Callable]) -> None:
        """Replace the call at a seam (see SEAMS), or a module's forward, by wrapper(the call that it was)."""
        if isinstance(place, str):
            owner, method = getattr(self, SEAMS[place][0]), SEAMS[place][1]
            self.seams.append(place)
        else:
            owner, method = place, "forward"
        self._set(owner, method, wrapper(getattr(owner, method)))

    def replace(self, model: nn.Module, path: str, module: nn.Module) -> None:
        """Put another module in the place of one, whose weights are given up: they come back from the file."""
        plain = model.get_submodule(path)
        if other := next(filter(None, (self.record.class_by(part) for part in plain.modules())), None):
            raise self._would_undo(other, plain)
        self.converts(model, [f"{path}.{name}" for name, _ in plain.named_parameters()])
        self.replaced.append((model, path, plain))
        model.set_submodule(path, module)
        self.swapped.update(id(part) for part in module.modules())
        plain.to("meta")

    def converts(self, model: nn.Module, names: Collection[str] | None = None, back: Callable | None = None) -> None:
        """Say that the parameters of a model (names: these of them) are about to be replaced by others.

        Undone, they are read from the checkpoint's file again. back() is called in place of that where there is no
        file, or where they were written to since; without it, what was written is lost, and no file is an error.
        """
        names = tuple(names if names is not None else dict(model.named_parameters()))
        if not names:
            return
        part = next(name for name, one in self.record.parts().items() if one is model)
        self.converted.append(Converted(part, names, back, self._are_the_files(part, names)))
        self.converted[-1].before = self.record.stamp(self.converted[-1])
        self.changes += 1

    def _are_the_files(self, part: str, names: Collection[str]) -> bool:
        """What another switch has converted comes from the file again, if it was the file's then."""
        earlier = {
            f"{one.part}.{n}" for p in self.record.patches for one in p.converted if one.from_file for n in one.names
        }
        return self.pipe.as_loaded({f"{part}.{name}" for name in names} - earlier)

    def before_predict(self, refresh: Refresh) -> None:
        """Have refresh(context) run before each call of the UNet, outside of what is compiled or captured.

        That is where what is derived from weights or text is brought up to date, in memory that stays where it is.
        """
        self.refreshers.append(refresh)
        self.changes += 1

    def also_predicts(self, context: Callable[[Tensor], Tensor | None]) -> None:
        """context(the context that the UNet is called with) -> another one that it is called with inside, or None."""
        self.contexts.append(context)

    def within(self, *modules: nn.Module) -> None:
        """Say that what these compute is done by the module around them, which has another class now."""
        self.labels |= {id(module): "by the module around it" for module in modules}

    def seldom(self, when: str, *modules: nn.Module) -> None:
        """Say that these compute "once a prompt" or so, and not at every call."""
        self.notes |= {id(module): when for module in modules}

    def key(self, key: Callable[[Call], object]) -> None:
        """key(call) is what a captured graph of the UNet must tell apart."""
        self.keys.append(key)

    # What it is told.

    @property
    def share(self) -> float:
        """Of what is meant for the UNet, as a budget of memory, the part for this network."""
        return 1.0

    def twin(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The plain network on the meta device, and what it is called with: both halves, at the trained size."""
        config = self.pipe.config
        side = config.image_size // config.vae.downsampling
        x = torch.empty(2, config.unet.in_channels, side, side, device="meta")
        context = torch.empty(2, config.text.max_length, config.unet.context_dim, device="meta")
        return build(config)[1], (x, torch.empty(2, dtype=torch.int64, device="meta"), context)

    # How it is recorded and taken back.

    def touch(self, owner: Any) -> Before:
        """Note how an object is, before something else than this patch changes it too."""
        if id(owner) not in self.before:
            self.before[id(owner)] = Before(owner, type(owner), dict(vars(owner)))
        return self.before[id(owner)]

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self.touch(owner).names.add(name)
        setattr(owner, name, value)
        self.changes += 1

    def finish(self) -> None:
        """It is applied: from now on, weights that somebody writes to are told from those that were converted."""
        for one in self.converted:
            one.after = self.record.stamp(one)

    def take_back(self, files: dict[str, dict[str, Tensor]]) -> None:
        """files: the weights of each part that will be read from the checkpoint, so that they need no way back."""
        for model, path, plain in reversed(self.replaced):
            model.set_submodule(path, plain)
        for one in reversed(self.converted):
            if not set(one.names) <= files.get(one.part, {}).keys():
                one.back()
        for before in self.before.values():
            before.restore()

    def _would_undo(self, other: str, owner: Any) -> OptimizationError:
        return OptimizationError(f"{self.name} would undo {other} in {self.path(owner)}: they cannot be combined")

    def path(self, owner: Any) -> str:
        """The name of a module, as `unet.out.2`, to say in errors."""
        for part, model in self.record.parts().items():
            for name, module in model.named_modules(prefix=part):
                if module is owner:
                    return name
        return "the pipeline"
