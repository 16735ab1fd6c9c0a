"""The table of picture parameters: everything that reads it follows it."""

import dataclasses
import inspect
import json
from html.parser import HTMLParser

import pytest
from PIL import Image

from sd import inference, pipeline, samplers, schedules
from sd.config import SD15
from sd.pictures.drawing import draw_batch
from sd.pictures.parameters import PARAMETERS, Number, Parameter, UserError, check_parameter, defaults
from sd.pictures.plan import plan
from sd.pictures.png import read_parameters, save_png
from sd.pictures.prompts_file import read_prompts
from sd.pictures.run import pictures_of, recalled
from sd.request import check_ranges, finite
from sd.service.form import assembled, page_with_form
from sd.service.orders import Limits, read_order
from sd.service.worker import FailedError


def test_what_is_refused_here_is_what_the_pipeline_refuses():
    good = {"steps": 50, "cfg_scale": 7.5, "sampler": "ddpm", "strength": 0.8}
    values = [("steps", 0), ("steps", 1), ("steps", 1000), ("steps", 1001), ("strength", 0.0), ("strength", 1e-9)]
    values += [
        ("strength", 1.0),
        ("strength", 1.01),
        ("cfg_scale", float("inf")),
        ("cfg_scale", -3.0),
        ("sampler", "x"),
        ("sampler", "DPM++ 2M Karras"),
        ("schedule", "Karras"),
        ("schedule", "no"),
    ]
    for name, value in values:
        assert raises(check_parameter, name, value) == raises(refused_by_the_pipeline, **{**good, name: value}), (
            name,
            value,
        )


def refused_by_the_pipeline(cfg_scale, strength, sampler, steps, schedule=None):
    finite("cfg_scale", cfg_scale)
    check_ranges(strength, 0.5, None, None, 12)
    samplers.choose(sampler)
    schedules.check(samplers.schedule_of(sampler, schedule), steps)


def raises(function, *args, **kwargs) -> bool:
    try:
        function(*args, **kwargs)
    except ValueError:
        return True
    return False


# ---- the table


def test_the_defaults_are_those_of_the_pipeline():
    signature = inspect.signature(pipeline.StableDiffusion.generate).parameters
    for name, parameter in PARAMETERS.items():
        if parameter.recorded and name != "prompt":
            assert signature[name].default == parameter.default, name


def test_a_limit_is_one_of_the_service():
    limits = {parameter.limit for parameter in PARAMETERS.values()} - {None}
    assert limits <= {field.name for field in dataclasses.fields(Limits)}
    assert Limits(max_side=99).of("width") == 99
    assert Limits().of("seed") is None


def test_a_default_passes_its_own_check():
    for name, value in defaults().items():
        assert value is None or check_parameter(name, value) == value


@pytest.mark.parametrize("value", [1e40, -1e40, 10**400, float("inf"), float("-inf"), float("nan"), True, "7", 1000.1])
def test_guidance_that_no_dtype_holds(value):
    with pytest.raises(ValueError, match=r"^cfg_scale must be (a finite number|from -1000 to 1000), not "):
        check_parameter("cfg_scale", value)


@pytest.mark.parametrize("value", ["1e40", "1" + "0" * 400])
def test_it_is_one_line_wherever_it_comes_from(tmp_path, capfd, monkeypatch, value):
    """Options, prompts files, PNGs and orders. As JSON has it: 1e40 is a float, the digits are a whole number."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "x", "cfg_scale": {value}}}')
    save_png(Image.new("RGB", (8, 8)), "p.png", {"prompt": "x", "cfg_scale": json.loads(value)})
    for line in (["--prompt", "x", "--cfg-scale", value], ["--prompts-file", "p.jsonl"], ["--from-png", "p.png"]):
        assert inference.main(line) == 2
        [error] = capfd.readouterr().err.splitlines()
        assert "cfg_scale must be " in error
    with pytest.raises(FailedError, match="cfg_scale must be from") as refused:
        read_order(f'{{"prompt": "x", "cfg_scale": {value}}}'.encode(), Limits(), SD15)
    assert refused.value.status == 422


# ---- one more line in it


class Generator:
    """A pipeline that takes any parameter, and says which it was given."""

    def __init__(self):
        self.given, self.source = {}, None

    def generate(self, prompts, **given):
        self.given = given
        return [Image.new("RGB", (8, 8)) for _ in prompts]


@pytest.fixture
def wobble(monkeypatch) -> Parameter:
    added = Parameter(
        "wobble", Number(0, 2), "how much noise, {low} to {high} ({default})", 0.5, limit="max_num_images"
    )
    monkeypatch.setitem(PARAMETERS, "wobble", added)
    return added


def test_a_new_parameter_is_an_option(wobble, capsys):
    with pytest.raises(SystemExit):
        inference.main(["--help"])
    assert "--wobble X how much noise, 0 to 2 (0.5)" in " ".join(capsys.readouterr().out.split())
    run, _ = inference.parse_arguments(["--prompt", "x", "--wobble", "1.5"])
    [(job, _)] = pictures_of(run)
    assert job.wobble == 1.5
    with pytest.raises(UserError, match=r"wobble must be from 0 to 2, not 3\.0"):
        pictures_of(inference.parse_arguments(["--prompt", "x", "--wobble", "3"])[0])


def test_a_new_parameter_stands_in_prompts_files(wobble, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "x", "wobble": 2}\n{"prompt": "y"}')
    jobs = plan(read_prompts(file), {}, first_seed=0)
    assert [job.wobble for job in jobs] == [2.0, 0.5]
    assert jobs[0].settings() != jobs[1].settings()
    file.write_text('{"prompt": "x", "wobble": -1}')
    with pytest.raises(UserError, match="line 1: wobble must be from 0 to 2, not -1"):
        read_prompts(file)


def test_a_new_parameter_is_drawn_with_recorded_and_recalled(wobble, tmp_path):
    run, _ = inference.parse_arguments(["--prompt", "x", "--seed", "3", "--wobble", "1.5"])
    [(job, _)] = pictures_of(run)
    pipe = Generator()
    [picture] = draw_batch(pipe, [job])
    assert pipe.given["wobble"] == 1.5
    save_png(picture, tmp_path / "a.png", picture.info)
    assert read_parameters(tmp_path / "a.png")["wobble"] == 1.5
    run, _, _ = recalled(*inference.parse_arguments(["--from-png", str(tmp_path / "a.png")]))
    [(again, _)] = pictures_of(run)
    assert again == job


def test_a_new_parameter_is_checked_and_limited_by_the_service(wobble):
    def order(value: float):
        return read_order(json.dumps({"prompt": "x", "wobble": value}).encode(), Limits(max_num_images=1), SD15)

    assert order(1).jobs[0].wobble == 1.0
    wrong = [(-1, "wobble must be from 0 to 1, not -1"), (3, "at most 1 here, not 3"), (1.5, "at most 1 here, not 1.5")]
    for value, words in wrong:
        with pytest.raises(FailedError, match=words):
            order(value)


def test_a_new_parameter_is_on_the_page(wobble):
    wanted = {"type": "number", "min": "0", "max": "1", "step": "any", "value": "0.5"}
    assert form(Limits(max_num_images=1))["wobble"] == wanted


# ---- the page


class Form(HTMLParser):
    """The form's fields: name -> attributes, of a select its options too."""

    def __init__(self, page: str):
        super().__init__()
        self.fields: dict[str, dict] = {}
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag in ("input", "textarea", "select") and "name" in attributes:
            self.last = self.fields[attributes.pop("name")] = attributes
            attributes.pop("required", None)
            attributes.pop("placeholder", None)
        elif tag == "option":
            self.chosen = "selected" in attributes

    def handle_data(self, text):
        if self.lasttag == "option" and text.strip():
            self.last.setdefault("options", []).append(text)
            if self.chosen:
                self.last["value"] = text


def form(limits: Limits = Limits()) -> dict[str, dict]:  # noqa: B008 (frozen)
    return Form(page_with_form(assembled(), limits, SD15)).fields


def test_the_page_asks_for_what_the_command_line_takes():
    fields = form()
    files = {"init_image", "mask", "control", "control_preprocess"}
    assert set(fields) == set(PARAMETERS) - files | {"opt"}
    options, _ = inference.parse_arguments(["--prompt", "x"])
    [(job, _)] = pictures_of(options)
    for name in ("steps", "cfg_scale", "sampler"):
        assert fields[name]["value"] == str(getattr(job, name))
    assert fields["num_images"]["value"] == "1"
    assert fields["sampler"]["options"] == list(samplers.SAMPLERS)
    assert fields["height"] == {"type": "number", "min": "64", "max": "1024", "step": "64"}


def test_the_page_asks_for_no_more_than_the_service_takes():
    fields = form(Limits(max_steps=20, max_prompt=10))
    assert (fields["steps"]["value"], fields["steps"]["max"], fields["prompt"]["maxlength"]) == ("20", "20", "10")


def test_a_text_cannot_leave_its_attribute(monkeypatch):
    changed = dataclasses.replace(PARAMETERS["negative_prompt"], default='"><b')
    monkeypatch.setitem(PARAMETERS, "negative_prompt", changed)
    assert form()["negative_prompt"]["value"] == '"><b'
