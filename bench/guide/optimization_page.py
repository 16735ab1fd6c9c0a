"""The page of one optimization."""

import inspect
import re
from collections.abc import Sequence
from pathlib import Path

from bench.common import ROOT
from bench.guide import changes, facts, ways, work
from bench.guide.chapters import Chapter
from bench.guide.pictures import TIMES, VALUES, command
from bench.report import markdown
from sd.optimizations.base import Optimization
from sd.pipeline import StableDiffusion

TO_ROOT = "../../../"


def page(
    one: Optimization, chapter: Chapter, pipe: StableDiffusion, drawn: dict, around: tuple[str, str]
) -> tuple[str, str]:
    """Markdown, and the drawing of its way. pipe: without weights. drawn: pictures.json. around: its neighbours."""
    doc = inspect.cleandoc(one.doc)
    text = f"{one.name}={VALUES[one.name]}" if one.name in VALUES else one.name
    parts = (
        head(one, chapter, around),
        f"> {_quoted(doc)}",
        section("What it changes", changed(one, pipe, text, drawn)),
        section("The data's way", f"![The data's way before and after {one.name}](../drawings/{one.name}.svg)"),
        section("What to expect", expected(one, chapter, pipe, text)),
        section("What was measured", measured(one)),
        section("What it costs the picture", costs(one, drawn)),
        section("When it hurts", hurts(doc, chapter)),
        section("The paper", chapter.sections["Paper"]),
        section("Exercise", exercise(chapter)),
    )
    return "\n\n".join(parts) + "\n", str(ways.draw(chapter.sections["Way"].strip("`\n"), f"{one.name}: before, after"))


def section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}"


def _quoted(doc: str) -> str:
    return doc.replace("\n", "\n> ").replace("> \n", ">\n")


def file_of(one: Optimization) -> Path:
    return Path(inspect.getfile(one.function)).resolve().relative_to(ROOT.resolve())


def head(one: Optimization, chapter: Chapter, around: tuple[str, str]) -> str:
    before, after = (f"[{name}]({name}.md)" if name else "" for name in around)
    file = file_of(one)
    facts_of_it = (
        f"**{'Exact' if one.exact else 'Approximate'}**; stage {one.stage.name.lower()}; needs {one.needs.text}; "
        f"in [{file}]({TO_ROOT}{file}). `--opt {one.name}{'=' + one.hint if one.hint else ''}`"
    )
    ways_on = " | ".join(
        filter(
            None,
            (f"Previous: {before}" * bool(before), "[The guide](../README.md)", f"Next: {after}" * bool(after)),
        )
    )
    return f"# {one.name}\n\n{ways_on}\n\n{chapter.sentence}\n\n{facts_of_it}"


def changed(one: Optimization, pipe: StableDiffusion, text: str, drawn: dict) -> str:
    before, after = changes.of(pipe, one.name, text, drawn)
    on = "the demo model" if one.name in changes.BY_THE_DEMO_MODEL else "SD 1.5's shapes"
    if not after and changes.needs_a_machine(one.name) and one.name != "page-out":
        return "What `--explain` says was not recorded: no machine that drew the pictures could run it."
    if not after:
        return "No module computes otherwise: what changes lies around them."
    if before:
        said = f"Before:\n\n```text\n{changes.table(before)}\n```\n\nAfter:\n\n```text\n{changes.table(after)}\n```"
    else:
        said = f"New rows, beside those that stay:\n\n```text\n{changes.table(after)}\n```"
    return f"`--opt {text} --explain` on {on}, what differs alone; `*` stands for a number.\n\n{said}"


# ---- what to expect


def expected(one: Optimization, chapter: Chapter, pipe: StableDiffusion, text: str) -> str:
    tables = []
    if "counted" in chapter.fields:
        tables.append(counted_table(pipe, f"{one.name}={chapter.fields['counted']}".removesuffix("=none")))
    if chapter.touches:
        tables.append(touched_table(chapter.touches))
    return "\n\n".join((chapter.sections["Roofline"], *tables))


def counted_table(pipe: StableDiffusion, text: str) -> str:
    plain = work.counted_plain()
    with work.switched(pipe, text) as record:
        left = work.counted(pipe, record)
    rows = [
        ("plain", f"{plain.picture / 1e3:.2f}", f"{plain.cheapest:.0f}", ""),
        (f"`{text}`", f"{left.picture / 1e3:.2f}", f"{left.cheapest:.0f}", f"{plain.picture / left.picture:.3f}x"),
    ]
    columns = ("", f"TFLOP of the UNet in {plain.steps} steps", "GFLOP in its cheapest step", "if time followed them")
    return f"Counted on SD 1.5's shapes at 512x512, without running anything:\n\n{markdown(columns, rows)}"


def touched_table(selectors: Sequence[str]) -> str:
    """The calls that it makes faster, and what a step would take if they cost nothing."""
    rows = [_touched_row(selector) for selector in selectors]
    columns = (
        "what it touches",
        "calls",
        "GFLOP",
        "MB in fp16",
        "H100, fp16: share of the floor",
        "CPU with AVX2, fp32: share of the floor",
        "measured there",
    )
    most = _most(selectors)
    return f"A guided step at 512x512, plain:\n\n{markdown(columns, rows)}\n\n{most}"


def _touched_row(selector: str) -> tuple[str, ...]:
    calls = work.chosen([selector])
    shares = [
        work.floor_seconds(calls, facts.ceilings()[m], b)
        / work.floor_seconds(work.step_calls(), facts.ceilings()[m], b)
        for m, b in (("H100", 0.5), ("CPU, AVX2", 1))
    ]
    megabytes = sum(call.bytes for call in calls) / 2e6
    return (
        selector.replace("@", ", "),
        str(len(calls)),
        f"{sum(call.flops for call in calls) / 1e9:.0f}",
        f"{megabytes:.0f}",
        *(f"{share:.1%}" for share in shares),
        f"{_measured_share([selector]):.1%}",
    )


def _measured_share(selectors: Sequence[str]) -> float:
    def is_in(line: dict) -> bool:
        return any(
            line["kind"] == kind and grid in ("", line["grid"])
            for kind, _, grid in (selector.partition("@") for selector in selectors)
        )

    lines = facts.roofline()
    return sum(float(x["measured_ms"]) for x in lines if is_in(x)) / sum(float(x["measured_ms"]) for x in lines)


def _most(selectors: Sequence[str]) -> str:
    share = _measured_share(selectors)
    return (
        f"If all of it took no time, the step on the CPU with AVX2 would be {1 / (1 - share):.2f} times as fast: no "
        "change to these calls alone can gain more ([how to read this](../roofline.md))."
    )


# ---- what was measured


def measured(one: Optimization) -> str:
    found = facts.measured(one.name)
    by_machine = {machine: [m for m in found if m.machine == machine] for machine in facts.MACHINES}
    by_machine |= {m.machine: [n for n in found if n.machine == m.machine] for m in found}
    rows, commands = [], []
    for machine, some in by_machine.items():
        if not some:
            rows.append((machine, "not measured yet" if runs_on(one, machine) else "does not run there", "", "", ""))
        for entry in some:
            if entry.entry["command"] not in commands:
                commands.append(entry.entry["command"])
            rows.append((machine, *_measured_row(entry, commands.index(entry.entry["command"]) + 1)))
    columns = ("", "without", "with", "times as fast", "how")
    listed = "\n".join(f"# {i}\n{line}" for i, line in enumerate(commands, 1))
    told = f"\n\n<details><summary>The commands</summary>\n\n```\n{listed}\n```\n\n</details>" if commands else ""
    return markdown(columns, rows) + told + memory(one)


def memory(one: Optimization) -> str:
    """What it saves in memory, where that was measured; else nothing."""
    rows = [
        (
            f"[{m.machine}]({TO_ROOT}{m.file.relative_to(ROOT)})",
            *(f"{peak:.2f} GiB" for peak in m.gib),
            f"`--opt {m.with_it['opts']}` beside `{m.without['opts']}`, {m.with_it['size']}x{m.with_it['size']}",
            f"{m.without['command_s']} and {m.with_it['command_s']} s",
        )
        for m in facts.saved(one.name)
    ]
    if not rows:
        return ""
    columns = ("", "peak memory without", "with", "how", "the command takes")
    return f"\n\nOf the command with one step, by `python bench/memory.py`:\n\n{markdown(columns, rows)}"


def runs_on(one: Optimization, machine: str) -> bool:
    """By what it says that it needs."""
    needs = one.needs.text
    if not machine.startswith("CPU"):
        return "NVIDIA" in needs or "CPU" not in needs
    return "AVX2" not in machine or "AVX512" not in needs if "CPU" in needs else "NVIDIA" not in needs


def _measured_row(one: facts.Measured, number: int) -> tuple[str, ...]:
    entry = one.entry
    unit = " s" if entry["unit"] == "s" else "x"
    before = "1, plain" if entry["before"] is None else f"{float(entry['before']):.3g}{unit}"
    spread = f" [{entry['low']:.2f}, {entry['high']:.2f}]" if "low" in entry else ""
    item = f"`{entry['item']}` " if "=" in str(entry["item"]) else ""
    beside = len(str(entry["beside"]).split(",")) if entry["beside"] else 0
    how = f"{item}{_settings(str(entry['command']))}"
    how += f", beside {beside} other{'s' * (beside > 1)}" if beside else ", alone"
    how += f", with {entry['joined']}" if entry["joined"] else ""
    how += f" ({number})"
    return before, f"{float(entry['after']):.3g}{unit}{spread}", f"{one.ratio:.2f}", how


def _settings(command: str) -> str:
    found = {key: m[1] for key in ("size", "steps", "dtype") if (m := re.search(rf"--{key} (\S+)", command))}
    if not found:
        return "512x512, 50 steps, float16"
    return f"{found['size']}x{found['size']}, {found['steps']} steps, {found['dtype']}"


# ---- what it costs


def costs(one: Optimization, drawn: dict) -> str:
    looks = [m for m in facts.measured(one.name) if "psnr_db" in m.entry]
    told = [
        f"Of 16 pictures of the demo model, the median is {m.entry['psnr_db']:.1f} dB from plain fp32 "
        f"({m.machine}{', ' + '`' + str(m.entry['item']) + '`' if '=' in str(m.entry['item']) else ''})."
        for m in looks
    ]
    picture = drawn.get(one.name)
    if not picture or "error" in picture:
        reason = f": {picture['error']}" if picture else ""
        what = f"No picture was drawn with it{reason}."
        return "\n\n".join((what, *dict.fromkeys(told)))
    return "\n\n".join((sheet(one.name, picture), *dict.fromkeys(told)))


def sheet(name: str, picture: dict) -> str:
    most = f"no colour of a pixel differs by more than {picture['largest']} of 255."
    far = "Not a byte differs." if picture["psnr_db"] is None else f"{picture['psnr_db']} dB from the plain one; {most}"
    where = f"{_told(picture['device'])}, {picture['dtype']}, torch {picture['torch']}"
    return (
        f"![plain, with {name}, and the difference times {TIMES}](../pictures/{name}.webp)\n\n"
        f"{far} Drawn on {where}, beside the plain picture there:\n\n"
        f"```\n{command(name, picture['dtype'])}\n```"
    )


def _told(device: str) -> str:
    """`AMD EPYC avx_vnni avx512f` -> `AMD EPYC (avx_vnni, avx512f)`"""
    flags = [word for word in device.split() if word.startswith(("avx", "amx"))]
    return f"{device.partition(' ' + flags[0])[0]} ({', '.join(flags)})" if flags else device


def hurts(doc: str, chapter: Chapter) -> str:
    found = re.search(r"Hurts: (.*?)(?:\n\n|\Z)", doc, re.DOTALL)
    own = " ".join(found[1].split()) if found else ""
    own = own[:1].upper() + own[1:]
    return "\n\n".join(filter(None, (own, chapter.sections.get("Hurts", ""))))


def exercise(chapter: Chapter) -> str:
    answer = chapter.sections["Answer"]
    return f"{chapter.sections['Exercise']}\n\n<details><summary>Answer</summary>\n\n{answer}\n\n</details>"
