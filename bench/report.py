"""The ladder as a table on the terminal; and the tables and plots of the documents.

python bench/report.py           # the tables in README.md and bench/README.md, from bench/results
python bench/report.py --write   # into them, between their markers, and the plots
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import plots
from bench.common import ROOT, print_table, read_csv
from bench.rungs import RERUN
from sd.writing import write_whole

Result = Mapping[str, str]


def print_ladder(results: Sequence[Result]) -> None:
    """Each row's speed and looks; what was not measured is blank."""
    first = results[0]
    title = f"{first['size']}x{first['size']}, {first['steps']} steps, batch {first['batch']}, {first['sampler']}"
    title = f"{title}, {first['dtype']}, {first['device']}, torch {first['torch']}, commit {first['commit']}"
    print_table(title, [_line(result) for result in results])
    for result in results:
        if trouble := "; ".join(filter(None, (result["problems"], result["error"]))):
            print(f"{result['row']}: {trouble}")


def _line(r: Result) -> dict[str, str]:
    return {
        "row": r["row"],
        "exact": "" if r["opts"] == RERUN.key else "yes" if r["exact"] == "1" else "no",
        "step ms": _ms(r["step_s"], r["step_s_q1"], r["step_s_q3"]),
        "picture s": _range(r["picture_s"], r["picture_s_q1"], r["picture_s_q3"]),
        "speed-up": _range(r["speedup"], r["speedup_q1"], r["speedup_q3"]),
        "compile s": r["compile_s"],
        "pays after": r["pays_after"].replace("inf", "never"),
        "peak GiB": r["peak_gib"],
        "MFU": f"{float(r['mfu']):.1%}" if r["mfu"] else "",
        "error: first": r["error_first"],
        "median": r["error_median"],
        "last": r["error_last"],
        "PSNR dB": r["psnr_db"],
        "SSIM": r["ssim"],
        "trouble": "yes" if r["problems"] or r["error"] else "",
    }


def _range(median: str, low: str, high: str) -> str:
    return f"{float(median):.4g} [{float(low):.4g}, {float(high):.4g}]" if median else ""


def _ms(*seconds: str) -> str:
    return _range(*(str(1000 * float(s)) if s else "" for s in seconds))


# ---- the tables of the documents, from bench/results

RESULTS = ROOT / "bench" / "results"
DOCUMENTS = ("README.md", "bench/README.md")
CPU_LABELS = {
    "naive": "attention spelled out",
    "sdpa": "plain: SDPA",
    "+ winograd": "+ Winograd's convolutions",
    "+ cpu-linear": "+ linear layers, GEGLU in one",
    "+ cpu-attention": "+ attention",
    "+ cpu-norm": "+ norms with SiLU, sums within convolutions",
    "+ kv-cache": "+ the text's keys and values once a prompt",
    "+ keep-memory": "+ freed memory kept",
    "+ shared-halves": "+ what both halves of guidance share, once",
}
APPROXIMATE_LABELS = {
    ("alone", "+ int8-weights"): "plain, int8 weights",
    ("alone", "+ int8-static"): "plain, static int8 (weights and activations)",
    ("on-cpu", "+ int8-weights"): "all of the above, int8 weights",
}
H100_LABELS = {
    "naive": "attention spelled out, fp16, eager",
    "sdpa": "plain: SDPA, fp16, eager (bound by the host's CPU)",
    "base": "+ CUDA graphs of UNet, VAE and text encoder, noise copied without waiting",
    "+ attention": "+ the backend for each head size",
    "+ channels-last": "+ channels-last",
    "+ pointwise-linear": "+ 1x1 convolutions as matrix products",
    "+ split-conv": "+ 3x3 convolutions of the smallest grid tap by tap",
    "+ packed-qkv": "+ packed q/k/v",
    "+ kv-cache": "+ text keys once a prompt",
    "+ time-cache": "+ timestep table",
    "+ fused-norm": "+ GroupNorm, SiLU, bias and timestep in one Triton kernel",
    "+ fused-layernorm": "+ residual and LayerNorm in one",
    "+ fused-geglu": "+ GEGLU in one, with its product where that pays",
    "+ fused-upsample": "+ upsampling at the memory's speed",
    "+ shared-halves": "+ what precedes the text once for both halves: `--opt exact`",
}
H100_QUANTIZED_LABELS = {
    "base": "`exact` less packed q/k/v",
    "+ int8-weights": "the same and int8 weights, eager",
    "+ float8": "the same and float8, eager",
}
PEER_LABELS = {
    "diffusers": "diffusers 0.42.1, eager",
    "diffusers-compiled": "the same, channels-last, compiled, frozen",
    "openvino": "OpenVINO 2026.4.1, f32",
    "sdcpp-f16": "stable-diffusion.cpp, f16",
    "sdcpp-q8_0": "stable-diffusion.cpp, q8_0",
    "ours-pytorch": "ours, `--opt cpu`, without a C++ compiler",
    "ours:cpu": "ours, `--opt cpu`",
}
AVX512_PEER_LABELS = {
    "diffusers": "diffusers 0.42.1, fp32, eager",
    "openvino": "OpenVINO 2026.4.1, f32",
    "ours:cpu": "ours, `--opt cpu`, fp32",
    "diffusers-bf16": "diffusers, bf16, eager",
    "diffusers-bf16-cl": "the same, channels-last",
    "diffusers-bf16-compiled": "the same, compiled, frozen",
    "openvino-bf16": "OpenVINO, bf16",
    "ours:cpu-bf16,cpu": "ours, `--dtype bfloat16`",
    "ours:cpu-int8,cpu": "ours, `--opt cpu-int8,cpu`",
}
PEER_COLUMNS = (("step", 512), ("decode", 512), ("step", 256), ("decode", 256))


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["|".join(f" {cell} " if cell else " " for cell in cells) for cells in (columns, *rows)]
    lines.insert(1, "|".join(["---"] * len(columns)))
    return "\n".join(f"|{line}|" for line in lines)


def cpu_ladder(results: Path = RESULTS) -> str:
    """The cumulative rows, and the approximate ones with every fidelity that was measured of them, the latest first."""
    folder = results / "cpu2" / "ladder"
    looks = read_csv(folder / "fidelity.csv")[::-1]
    rows = [(CPU_LABELS[line["row"]], line) for line in read_csv(folder / "ladder.csv")]
    for (name, row), label in APPROXIMATE_LABELS.items():
        rows += [(label, line) for line in read_csv(folder / f"{name}.csv") if line["row"] == row]
    columns = ("", "step", "picture", "beside the plain one", "peak", "error")
    return markdown(
        columns, [_cpu_row(label, line, [x for x in looks if x["opts"] == line["opts"]]) for label, line in rows]
    )


def _cpu_row(label: str, line: Result, looks: Sequence[Result]) -> tuple[str, ...]:
    ratio, low, high = (float(line[column]) for column in ("speedup", "speedup_q1", "speedup_q3"))
    noise = ", against itself: the noise" if line["row"] == "sdpa" else ""
    return (
        label,
        f"{float(line['step_s']):.2f} s",
        f"{float(line['picture_s']):.1f} s",
        f"{ratio:.2f}x [{low:.2f}, {high:.2f}]{noise}",
        f"{float(line['peak_gib']):.1f} GiB",
        "; ".join(_power(float(x["error_last"])) + _decibels(x) for x in looks),
    )


def _decibels(look: Result) -> str:
    return "" if look["exact"] == "1" else f", {float(look['psnr_db']):.0f} dB"


def _power(value: float) -> str:
    """One digit: 1.3e-05 -> 1e-5."""
    digit, _, exponent = f"{value:.0e}".partition("e")
    return f"{digit}e{int(exponent)}" if value else "0"


def h100_ladder(results: Path = RESULTS) -> str:
    """The cumulative rows, and those of quantized layers; how far the last latents and the pictures are from fp32's."""
    folder = results / "h100"
    looks = {line["opts"]: line for line in read_csv(folder / "fidelity.csv") if line["psnr_db"]}
    rows = []
    for name, labels in (("ladder", H100_LABELS), ("quantized", H100_QUANTIZED_LABELS)):
        lines = {line["row"]: line for line in read_csv(folder / f"{name}.csv")}
        rows += [_h100_row(label, lines[row], looks.get(lines[row]["opts"])) for row, label in labels.items()]
    return markdown(("", "picture", "UNet step", "peak", "from fp32"), rows)


def _h100_row(label: str, line: Result, look: Result | None) -> tuple[str, ...]:
    return (
        label,
        f"{float(line['picture_s']):.3f} s",
        f"{1e3 * float(line['step_s']):#.3g} ms",
        f"{float(line['peak_gib']):.1f} GiB",
        f"{_power(float(look['error_last']))}, {float(look['psnr_db']):.0f} dB" if look else "",
    )


def cpu_peers(results: Path = RESULTS) -> str:
    return peers(results / "cpu2" / "peers_cpu.csv", PEER_LABELS, PEER_COLUMNS)


def cpu_peers_avx512(results: Path = RESULTS) -> str:
    return peers(results / "cpu4" / "peers_cpu.csv", AVX512_PEER_LABELS, PEER_COLUMNS[:2], with_error=True)


def peers(path: Path, labels: Mapping[str, str], columns: Sequence[tuple[str, int]], with_error: bool = False) -> str:
    """The latest row of each engine, and from where to where diffusers' own times went beside them."""
    lines = [line for line in read_csv(path) if not line["error"]]
    latest = {(line["engine"], line["part"], int(line["size"])): line for line in lines}
    own: dict[tuple[str, int], list[float]] = {}
    for line in latest.values():
        own.setdefault((line["part"], int(line["size"])), []).append(float(line["baseline_s"]))
    rows = [
        (label, *(_peer(latest.get((engine, *column)), own[column], with_error) for column in columns))
        for engine, label in labels.items()
    ]
    names = {"step": "guided step", "decode": "VAE decode"}
    return markdown(("", *(f"{names[part]}, {size}x{size}" for part, size in columns)), rows)


def _peer(line: Result | None, own: Sequence[float], with_error: bool) -> str:
    if line is None:
        return ""
    if line["engine"] == line["baseline"]:
        return f"{min(own):#.3g} to {max(own):#.3g} s"
    error = f", {_power(float(line['relative_error']))}" if with_error else ""
    return f"{float(line['median_s']):#.3g} s ({float(line['speedup']):.2f}x){error}"


TABLES = {
    "h100-ladder": h100_ladder,
    "cpu-ladder": cpu_ladder,
    "cpu-peers": cpu_peers,
    "cpu-peers-avx512": cpu_peers_avx512,
}


def between_markers(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(\n<!-- end -->)", re.DOTALL)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The tables of README.md and bench/README.md, from bench/results.")
    parser.add_argument("--write", action="store_true", help="into the documents, between their markers")
    args = parser.parse_args(argv)
    tables = {name: build() for name, build in TABLES.items()}
    if not args.write:
        print("\n\n".join(f"{name}\n\n{table}" for name, table in tables.items()))
        return 0
    for path in (ROOT / document for document in DOCUMENTS):
        text = path.read_text()
        for name, table in tables.items():
            text = between_markers(name).sub(lambda found, table=table: found[1] + table + found[2], text)
        write_whole(path, text.encode())
    for name, drawing in plots.of_documents(RESULTS).items():
        write_whole(RESULTS / name, str(drawing).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
