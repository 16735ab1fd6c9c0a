"""The page: its files in one, and its form, out of the table of picture parameters.

So the page asks for what the command line takes, with the same defaults, and loads nothing but itself.
"""

import html
from collections.abc import Iterable, Mapping
from pathlib import Path

from sd.config import Config
from sd.pictures.parameters import PARAMETERS, Choice, Parameter, Switch, Whole
from sd.service.offers import Offers
from sd.service.orders import Limits, defaults_within

FOLDER = Path(__file__).with_name("page")
SCRIPTS = ("dom", "settings", "init", "mask", "request", "stage", "compare", "history", "main")
"""Of page/, in the order in which they stand in the one script of the page."""

FRONT = ("steps", "cfg_scale", "sampler", "schedule")
"""With the prompts, the size and the seed; all others are under "More settings"."""

SIDES = ("height", "width")
SHAPES = {"Square": (1, 1), "Portrait": (3, 4), "Landscape": (4, 3), "Tall": (9, 16), "Wide": (16, 9)}
"""Width to height of the sizes to choose from, about as many pixels as the model's own."""

EXAMPLES = {
    "prompt": "a blue fox on a yellow background",
    "negative_prompt": "blurry",
    "seed": "random",
    "outpaint": "64,0,64,0",
}
EXACT = 2**53 - 1
"""The largest whole number that JavaScript's hold."""


def assembled() -> str:
    """page.html with its style and its scripts within."""
    page, style = ((FOLDER / f"page.{ending}").read_text(encoding="utf-8") for ending in ("html", "css"))
    scripts = [(FOLDER / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    return page.replace("/* style */", style).replace("/* scripts */", "\n".join(scripts))


def page_with_form(page: str, limits: Limits, config: Config, offers: Offers = Offers()) -> str:  # noqa: B008 (frozen)
    """The page with its places for fields filled, the limits, the model's own size and what is offered in them."""
    for name, filled in _places(limits, config, offers).items():
        page = page.replace(f"<!-- {name} -->", filled)
    return page


def _places(limits: Limits, config: Config, offers: Offers) -> dict[str, str]:
    asked = [one for one in PARAMETERS.values() if one.portable or _of_init_image(one)]
    fields = {one.name: _field(one, limits, config) for one in asked}
    over = [name for name in fields if _of_init_image(PARAMETERS[name])]
    more = [name for name in fields if name not in ("prompt", "negative_prompt", "seed", *SIDES, *FRONT, *over)]
    return {
        "prompt": fields["prompt"],
        "negative": fields["negative_prompt"],
        "sizes": _sizes(limits, config),
        "sides": _row(fields[name] for name in reversed(SIDES)),
        "seed": fields["seed"],
        "front": _row(fields[name] for name in FRONT),
        "over": _row(fields[name] for name in over),
        "more": _row(fields[name] for name in more),
        "loras": _options(offers.loras()),
        "opts": _options(offers.opts),
    }


def _of_init_image(parameter: Parameter) -> bool:
    return any(PARAMETERS[name].file for name in parameter.beside)


def _row(fields: Iterable[str]) -> str:
    return "\n".join(['<div class="row">', *fields, "</div>"])


def _options(names: Iterable[str]) -> str:
    return "".join(f"<option>{html.escape(name)}</option>" for name in names)


# ---- a field


def _field(parameter: Parameter, limits: Limits, config: Config) -> str:
    label = html.escape(parameter.label or parameter.name.replace("_", " ").capitalize())
    if isinstance(parameter.check, Switch):
        return f'<label class="check"><input name="{parameter.name}" type="checkbox"> {label}</label>'
    return f"<label {_written({'title': parameter.described()})}>{label} {_control(parameter, limits, config)}</label>"


def _control(parameter: Parameter, limits: Limits, config: Config) -> str:
    if isinstance(parameter.check, Choice):
        return _select(parameter)
    if parameter.check.kind is str:
        return _text(parameter, limits)
    attributes = _number(parameter, limits, config)
    required = " required" if attributes["value"] is not None else ""
    return f"<input {_written(attributes)}{required}>"


def _text(parameter: Parameter, limits: Limits) -> str:
    name = parameter.name
    attributes = {"name": name, "maxlength": limits.of(name), "placeholder": EXAMPLES.get(name)}
    if name == "prompt":
        return f"<textarea {_written({'id': name, **attributes, 'rows': 3})} required></textarea>"
    return f"<input {_written({**attributes, 'type': 'text', 'value': parameter.default or None})}>"


def _select(parameter: Parameter) -> str:
    own = '<option value="">its own</option>' if parameter.default is None else ""
    options = "".join(
        f"<option{' selected' if option == parameter.default else ''}>{html.escape(option)}</option>"
        for option in parameter.check.options
    )
    return f'<select name="{parameter.name}">{own}{options}</select>'


def _number(parameter: Parameter, limits: Limits, config: Config) -> dict[str, object]:
    check, name = parameter.check, parameter.name
    allowed = [check.high, EXACT, limits.of(name)]
    attributes = {
        "name": name,
        "type": "number",
        "min": check.low,
        "max": min(most for most in allowed if most is not None),
        "step": 1 if isinstance(check, Whole) else "any",
        "value": defaults_within(limits).get(name),
        "placeholder": EXAMPLES.get(name),
    }
    if name in SIDES:
        multiple = config.size_multiple
        attributes |= {"min": multiple, "step": multiple, "placeholder": config.image_size}
    return attributes


def _written(attributes: Mapping[str, object]) -> str:
    given = {name: value for name, value in attributes.items() if value is not None}
    return " ".join(f'{name}="{html.escape(str(value))}"' for name, value in given.items())


# ---- sizes


def _sizes(limits: Limits, config: Config) -> str:
    """The model's own size, whose value is empty, and others as `WIDTHxHEIGHT`; twice the same stands once."""
    sizes = {size: name for name, size in reversed(_shapes(limits, config).items())}
    options = []
    for (width, height), name in reversed(sizes.items()):
        size = f"{width}x{height}"
        value = "" if width == height == config.image_size else size
        options.append(f'<option value="{value}" data-size="{size}">{name} {width} × {height}</option>')
    return "".join(options)


def _shapes(limits: Limits, config: Config) -> dict[str, tuple[int, int]]:
    multiple, most = config.size_multiple, limits.max_side // config.size_multiple
    found = {}
    for name, (width, height) in SHAPES.items():
        scale = config.image_size / (width * height) ** 0.5 / multiple
        found[name] = tuple(multiple * max(1, min(most, round(side * scale))) for side in (width, height))
    return found
