"""The page's form, out of the table of picture parameters: the page asks for what the command line takes."""

import html
from collections.abc import Iterable, Mapping

from sd.config import Config
from sd.pictures.parameters import PARAMETERS, Choice, Parameter, Text, Whole
from sd.service.orders import Limits, defaults_within

FRONT = ("seed", "steps")
"""Beside the prompt; all others are under "More settings"."""

SIDES = ("height", "width")
EXAMPLES = {
    "prompt": "a blue fox on a yellow background",
    "negative_prompt": "blurry",
    "seed": "random",
}
EXACT = 2**53 - 1
"""The largest whole number that JavaScript's hold."""


def page_with_form(page: str, limits: Limits, config: Config) -> str:
    """page.html with its three places for fields filled, the limits and the model's own size in them."""
    shown = [one for one in PARAMETERS.values() if one.portable]
    fields = {one.name: _field(one, limits, config) for one in shown}
    more = [one for one in shown if one.name not in ("prompt", *FRONT)]
    texts, others = (
        [fields[one.name] for one in more if isinstance(one.check, Text) == text] for text in (True, False)
    )
    places = {
        "prompt": fields["prompt"],
        "front": _row(fields[name] for name in FRONT),
        "more": "\n".join([*texts, _row(others)]),
    }
    for name, filled in places.items():
        page = page.replace(f"<!-- {name} -->", filled)
    return page


def _row(fields: Iterable[str]) -> str:
    return "\n".join(['<div class="row">', *fields, "</div>"])


def _field(parameter: Parameter, limits: Limits, config: Config) -> str:
    label = html.escape(parameter.label or parameter.name.replace("_", " ").capitalize())
    if isinstance(parameter.check, Choice):
        return f"<label>{label} {_select(parameter)}</label>"
    if isinstance(parameter.check, Text):
        return f"<label>{label} {_text(parameter, limits)}</label>"
    attributes = _number(parameter, limits, config)
    required = " required" if attributes["value"] is not None else ""
    return f"<label>{label} <input {_written(attributes)}{required}></label>"


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
