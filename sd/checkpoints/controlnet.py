"""Files of ControlNets: which layout one has, and what our tensors are called in it.

    original   control_model.input_blocks.1.0.in_layers.2.weight, zero_convs, input_hint_block, middle_block_out; also
               without control_model., and with a whole checkpoint beside
    diffusers  down_blocks.0.resnets.0.conv1.weight, controlnet_down_blocks, controlnet_cond_embedding; no config.json
               is needed

With a tensor called `difference`, what the UNet has too is stored as the difference to SD 1.5's weights.
"""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from sd.checkpoints.diffusers_names import WAY_DOWN, names_by_path, their_paths
from sd.checkpoints.errors import CheckpointError, some
from sd.checkpoints.layouts import BY_TEXT_WIDTH

DIFFERENCE = "difference"

_OTHERS = (
    (r"(control_model\.)?label_emb\.|add_embedding\.", "a ControlNet for Stable Diffusion XL"),
    (r"(pos_embed_input|controlnet_x_embedder|controlnet_blocks)\.", "a ControlNet for Stable Diffusion 3 or Flux"),
    (r"lora_controlnet$", "a Control-LoRA"),
    (r"lllite_", "a ControlNet-LLLite"),
    (r"(adapter\.)?body\.\d+\.", "a T2I-Adapter"),
    (r"(ip_adapter|image_proj)\b", "an IP-Adapter"),
    (r".*(lora_(unet|te|up|down|A|B)|\.lora\.|hada_w1|lokr_w)", "a LoRA: name it with --lora"),
)
_LAYOUTS = {
    r"control_model\.": lambda net: {name: f"control_model.{name}" for name in net.state_dict()},
    r"(zero_convs|input_hint_block)\.": lambda net: {name: name for name in net.state_dict()},
    r"controlnet_(down_blocks|mid_block|cond_embedding)\.": lambda net: _diffusers_names(net),
}
_NEEDED = "a ControlNet for this model is needed"
_TEXT = "attn2.to_k.weight"


def names_in(tensors: Mapping[str, Tensor], net: nn.Module) -> dict[str, str]:
    """Our name of each of the ControlNet's tensors -> the file's, whether it is there or not.

    Raises CheckpointError for a file of another kind, which is named, and for one beside another kind of UNet.
    """
    for pattern, kind in _OTHERS:
        if any(map(re.compile(pattern).match, tensors)):
            raise CheckpointError(f"this is {kind}; {_NEEDED}")
    for pattern, names_of in _LAYOUTS.items():
        if any(map(re.compile(pattern).match, tensors)):
            names = names_of(net)
            _check_width(tensors, names, net)
            return names
    if any(name.startswith("model.diffusion_model.") for name in tensors):
        raise CheckpointError(f"this is a checkpoint: name it with --ckpt; {_NEEDED}")
    raise CheckpointError(f"holds no ControlNet: {some(tensors) or 'it is empty'}")


def _check_width(tensors: Mapping[str, Tensor], names: Mapping[str, str], net: nn.Module) -> None:
    """Of the text that it attends to: by it, families are told."""
    own = next(((name, t.shape[1]) for name, t in net.state_dict().items() if name.endswith(_TEXT)), None)
    found = own and tensors.get(names[own[0]])
    if found is not None and found.ndim == 2 and found.shape[1] != own[1]:
        family = BY_TEXT_WIDTH.get(found.shape[1], "another model")
        raise CheckpointError(f"a ControlNet for {family}: its text is {found.shape[1]} wide, the model's {own[1]}")


def _diffusers_names(net: nn.Module) -> dict[str, str]:
    hint = [name for name, module in net.input_hint_block.named_children() if isinstance(module, nn.Conv2d)]
    inner = [f"blocks.{i}" for i in range(len(hint) - 2)]
    ends = zip(hint, ["conv_in", *inner, "conv_out"], strict=True)
    others = WAY_DOWN | {f"input_hint_block.{ours}": f"controlnet_cond_embedding.{theirs}" for ours, theirs in ends}
    others |= {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(len(net.zero_convs))}
    others["middle_block_out.0"] = "controlnet_mid_block"
    return names_by_path(net, lambda paths: their_paths(net, paths, others))
