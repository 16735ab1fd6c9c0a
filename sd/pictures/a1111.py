"""A picture's parameters as AUTOMATIC1111's web UI writes and reads them: the prompt, then a line of names and values.

a red fox, (blue:1.2) hat
Negative prompt: blurry
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 5, Size: 512x768, Clip skip: 2
"""

import re
from collections.abc import Mapping
from pathlib import PurePath

from sd import prompts, samplers

SAMPLER_NAMES = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "plms": "PLMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "lms": "LMS",
    "deis": "DEIS",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
    "tcd": "TCD",
}
SCHEDULE_NAMES = {
    "leading": "DDIM",
    "linspace": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "sgm_uniform": "SGM Uniform",
    "beta": "Beta",
    "align_your_steps": "Align Your Steps",
}
NAMES = {
    "Steps": "steps",
    "Sampler": "sampler",
    "Schedule type": "schedule",
    "CFG scale": "cfg_scale",
    "Seed": "seed",
    "Clip skip": "clip_skip",
    "Eta": "eta",
    "Hires upscale": "hires",
}
"""Theirs and ours, where the values are the same."""


def written(parameters: Mapping[str, object]) -> str:
    """The text of a picture. Brackets and backslashes that are characters to us are escaped."""
    syntax = str(parameters.get("prompt_syntax") or "weights")
    lines = [_prompt(str(parameters.get("prompt", "")), syntax)]
    if negative := parameters.get("negative_prompt"):
        lines.append(f"Negative prompt: {_prompt(str(negative), syntax)}")
    shown = {name: parameters[ours] for name, ours in NAMES.items() if parameters.get(ours) is not None}
    if "sampler" in parameters:
        shown["Sampler"] = SAMPLER_NAMES.get(str(parameters["sampler"]), parameters["sampler"])
        schedule = str(parameters.get("schedule") or samplers.schedule_of(str(parameters["sampler"]), None))
        shown["Schedule type"] = SCHEDULE_NAMES.get(schedule, schedule)
    if "width" in parameters and "height" in parameters:
        shown["Size"] = f"{parameters['width']}x{parameters['height']}"
    if parameters.get("checkpoint"):
        shown["Model"] = PurePath(str(parameters["checkpoint"])).stem
    strength = parameters.get("hires_strength") if parameters.get("hires") else parameters.get("strength")
    if strength is not None:
        shown["Denoising strength"] = strength
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in shown.items()))
    return "\n".join(lines).replace("\0", "")


def _quoted(value: str) -> str:
    """As they write values with separators in them: JSON's way."""
    return value if not re.search(r'[,:\n"]', value) else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _prompt(text: str, syntax: str) -> str:
    """In their syntax."""
    if syntax == "a1111":
        return text
    pieces = prompts.parse(text, syntax)
    return "".join(" BREAK " if piece is prompts.BREAK else _piece(*piece) for piece in pieces)


def _piece(text: str, weight: float) -> str:
    text = re.sub(r"([()\[\]\\])", r"\\\1", text)
    text = re.sub(r"\bBREAK\b", "break", text)  # a word here, which the text encoder reads in small letters anyway
    return text if weight == 1 else f"({text}:{weight:g})"


_ITEM = re.compile(r'\s*(\w[\w \-/]*?):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


def read(text: str) -> tuple[dict[str, object], dict[str, str]]:
    """Our parameters, and by their names what of theirs we have not. Numbers are read; nothing else is checked."""
    *head, last = text.strip().split("\n")
    said = {name: value.strip() for name, value in _ITEM.findall(last)}
    prompt, _, negative = "\n".join(head).partition("\nNegative prompt:") if head else ("", "", "")
    if head and head[0].startswith("Negative prompt:"):
        prompt, negative = "", "\n".join(head).removeprefix("Negative prompt:")
    found: dict[str, object] = {"prompt": prompt.strip(), "prompt_syntax": "a1111"}
    if negative.strip():
        found["negative_prompt"] = negative.strip()
    for theirs, ours in NAMES.items():
        if theirs in said:
            found[ours] = _number(said.pop(theirs))
    if size := re.fullmatch(r"(\d+)x(\d+)", said.get("Size", "")):
        found |= {"width": int(size[1]), "height": int(size[2])}
        del said["Size"]
    if "hires" in found and "Denoising strength" in said:
        found["hires_strength"] = _number(said.pop("Denoising strength"))
    if found.get("schedule") == "Automatic":
        del found["schedule"]
    return found, said


def _number(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
