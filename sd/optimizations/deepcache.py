"""The deep levels of the UNet at every N-th step only (Ma et al. 2023, "DeepCache")."""

from collections.abc import Hashable, Sequence

from torch import Tensor

from sd.controlnet import ControlNet
from sd.guidance import Call
from sd.optimizations.base import Patch, Stage, at_least, keep, optimization
from sd.optimizations.staged_unet import StagedUNet
from sd.unet import with_residuals


class DeepFeatures:
    """Runs the deep levels only at every `interval`-th step (Ma et al. 2023, "DeepCache").

    In between it runs the `SHALLOW` outermost blocks on each side, which see the new latents, and gives them what the
    deep levels made of earlier ones. So do residuals of ControlNets: those of the deep levels come with these, and in
    between there are those of the outermost blocks.
    """

    SHALLOW = 1

    def __init__(self, interval: int, call: Call):
        self.interval = interval
        self.call = call
        self.between = (
            False  # kept here, and not asked of the call: compiled code is made anew for each number of a step
        )
        self.features: dict[Hashable, Tensor] = {}  # by the shape of the latents

    def start(self, context: Tensor) -> None:
        """A call of the UNet begins."""
        self.between = self.call.step % self.interval != 0

    def reuses(self, call: Call) -> bool:
        """Whether a call takes what an earlier one has left."""
        return self.between and not call.anew

    def __call__(self, unet: StagedUNet, x: Tensor, emb: Tensor, context: Tensor, *residuals: Tensor) -> Tensor:
        """Latents x to the last output block's features."""
        shape, border = tuple(x.shape), len(unet.output_blocks) - self.SHALLOW
        skips: list[Tensor] = []
        x = unet.down(x, emb, context, skips, 0, self.SHALLOW)
        if not (self.reuses(self.call) and shape in self.features):
            keep(self.features, shape, self._deep(unet, x, emb, context, list(skips), border, residuals))
        if residuals:
            skips = [skip + more for skip, more in zip(skips, residuals[: self.SHALLOW], strict=True)]
        return unet.up(self.features[shape], emb, context, skips, border, len(unet.output_blocks))

    def _deep(
        self,
        unet: StagedUNet,
        x: Tensor,
        emb: Tensor,
        context: Tensor,
        skips: list[Tensor],
        border: int,
        residuals: Sequence[Tensor],
    ) -> Tensor:
        x = unet.down(x, emb, context, skips, self.SHALLOW, len(unet.input_blocks))
        x = unet.middle_block(x, emb, context)
        if residuals:
            x, skips = with_residuals(x, skips, residuals)
        return unet.up(x, emb, context, skips, 0, border)


class ShallowControlNet(ControlNet):
    """In the steps in between it finds what the outermost block is given, alone: nobody asks for the rest."""

    kernel = "the outermost block alone in between"
    deep: DeepFeatures

    def forward(self, x: Tensor, t: Tensor, context: Tensor, hint: Tensor) -> list[Tensor]:
        if not self.deep.reuses(self.deep.call):
            return super().forward(x, t, context, hint)
        x = self.input_blocks[0](x[:, : self.in_channels], self.time_embed(t, x), context) + hint
        return [self.zero_convs[0](x)]


def shallow_control(patch: Patch, interval: int = 3) -> None:
    """A ControlNet as deep as the UNet is in each step."""
    deep = DeepFeatures(interval, patch.call)
    patch.swap(patch.unet, ShallowControlNet, deep=deep)
    patch.before_predict(deep.start)
    patch.key(deep.reuses)


@optimization(
    "deepcache",
    stage=Stage.REUSE,
    exact=False,
    summary="deep levels of the UNet at every N-th step only",
    value=at_least(1),
    hint="N",
    beside=shallow_control,
)
def deepcache(patch: Patch, interval: int = 3) -> None:
    """The deep levels of the UNet at every N-th step only; in between, their last features serve again. Approximate.

    Helps: a step in between costs a tenth. Hurts: detail, the more the fewer steps there are.
    """
    deep = DeepFeatures(interval, patch.call)
    patch.swap(patch.unet, StagedUNet, deep=deep)
    patch.before_predict(deep.start)
    patch.key(deep.reuses)
