"""What the worker's thread does for a request: it decodes what that brings along, draws, and reports."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from sd.checkpoints.errors import CheckpointError
from sd.pictures.drawing import draw_batch, is_out_of_memory, release
from sd.pictures.loras import PromptLoras
from sd.pictures.model import facts_of
from sd.pictures.parameters import UserError
from sd.pictures.plan import Job
from sd.pictures.png import to_png
from sd.pictures.vocabulary import near, unknown_words
from sd.service.metrics import Metrics
from sd.service.offers import Offers, Switcher
from sd.service.orders import Order
from sd.service.worker import Event, FailedError, Report, Work

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from sd.pipeline import OnStep, StableDiffusion
    from sd.previews import Previews

log = logging.getLogger(__name__)


class Drawer:
    """Draws orders with one pipeline, which nobody else uses.

    facts: what each PNG says of model and machine. offers: what requests may choose. lose: is told when the weights
    are no longer what they were.
    """

    def __init__(
        self,
        pipe: "StableDiffusion",
        facts: Mapping[str, object],
        metrics: Metrics,
        offers: Offers,
        lose: Callable[[str], None] = lambda message: None,
    ):
        self.pipe = pipe
        self.facts = facts
        self.metrics = metrics
        self.offers = offers
        self.lose = lose
        self.switcher = Switcher(pipe)
        self._loras = PromptLoras(pipe, offers.lora_dir)
        self._previews: Previews | None = None
        self._cut: list[str] = []
        self._unknown: dict[str, list[str]] = {}
        pipe.tokenizer.on_cut = lambda length, most, text: self._cut.append(text)

    def work_for(self, order: Order) -> Work:
        """Every step and every picture is reported, the latter as PNG bytes with parameters.

        One picture at a time, so that each is what its seed draws alone, and memory is that of one.
        """

        def work(report: Report) -> None:
            self._in_memory(lambda: self._switch(order.opt))
            files = self._in_memory(lambda: {one.name: one.decode() for one in order.uploads})
            for number, job in enumerate(order.jobs, start=1):
                place = {"picture": number, "pictures": len(order.jobs)}
                image = self._in_memory(lambda job=job, place=place: self._draw(order, job, files, report, place))
                self.metrics.drawn(self.pipe.times)
                report({"event": "picture", **place, **self._picture(job, image)})

        return work

    def _picture(self, job: Job, image: "Image.Image") -> Event:
        """cut: what of the prompts the model did not read. unknown: words it has not learned, each with some near."""
        parameters = {**image.info, **self._facts(), **self._loras.recorded(job)}
        cut = {"cut": list(dict.fromkeys(self._cut))} if self._cut else {}
        unknown = {"unknown": self._unknown} if self._unknown else {}
        told = {**cut, **unknown}
        return {"png": to_png(image, parameters), "parameters": parameters, "times": dict(self.pipe.times), **told}

    def _switch(self, opt: Sequence[str]) -> None:
        try:
            if not self.switcher.runs(opt):
                self._loras.take_out()  # once the UNet is quantized, they could not be
            self.switcher.use(opt)
        except CheckpointError as error:
            raise self._lost(error) from error
        except ValueError as error:
            raise FailedError(422, f"opt: {error}") from None

    def _merge(self, job: Job) -> None:
        """The LoRAs that the prompt names."""
        try:
            self._loras.use(job)
        except (UserError, ValueError) as error:
            log.error("a LoRA cannot be merged: %s", error)
            message = "a LoRA that the prompt names cannot be used with this model; the server's log says why"
            raise FailedError(422, message) from None

    def _facts(self) -> Mapping[str, object]:
        """What runs is what is recorded: requests may choose optimizations."""
        return {**self.facts, **facts_of(self.pipe)} if self.offers.opts else self.facts

    def _draw(
        self, order: Order, job: Job, files: "Mapping[str, Image.Image]", report: Report, place: Event
    ) -> "Image.Image":
        self.pipe.times.clear()
        self._cut.clear()
        try:
            self._merge(job)
            (image,) = draw_batch(self.pipe, [job], files, [order.origin], self._on_step(order, report, place))
            self._unknown = near(self.pipe, unknown_words(self.pipe, [job]))
            return image
        except CheckpointError as error:
            raise self._lost(error) from error

    def _lost(self, error: CheckpointError) -> FailedError:
        self.lose(str(error))
        return FailedError(503, "the server has lost its weights, and ends")

    def _on_step(self, order: Order, report: Report, place: Event) -> "OnStep":
        def on_step(step: int, steps: int, latents: "Tensor") -> None:
            due = order.preview and step % order.preview == 0
            seen = {"preview": to_png(self._preview_of(latents), {})} if due else {}
            report({"event": "step", **place, "step": step, "steps": steps, **seen})

        return on_step

    def _preview_of(self, latents: "Tensor") -> "Image.Image":
        if self._previews is None:  # fitted for the first who asks
            from sd.previews import Previews

            self._previews = Previews(self.pipe)
        return self._previews(latents)[0]

    def _in_memory(self, action: Callable[[], object]) -> object:
        """What the action returns. Raises FailedError when out of memory."""
        try:
            return action()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        release(self.pipe.device)  # out here, where the error no longer holds the picture's tensors
        raise FailedError(503, "out of memory: ask for a smaller height and width")
