"""Everything that is generated in results/, and the results part of the README beside it, as {path: bytes}: what `report` writes and `report --check` compares.

Generated from the published records, the verdicts beside them and the task files; from nothing else, and without a
time stamp, so that the same records give the same bytes. The manifest of a folder keeps its lines about the data as
they are: only the lines about figures are generated, so that regenerating can never bless a changed record.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from suite.archive.doses import LEVELS_OF, PAPER_LEVELS, launch_of, own_levels, responses_of
from suite.archive.published import MANIFEST, VERDICT, exists, read_manifest, read_verdict, records_of
from suite.archive.publishing import fingerprint_folders, published_runs
from suite.door import read_bytes
from suite.files import write_atomic
from suite.report import page, readme, tables
from suite.report.doses import MIN_DOSES, dose_sections
from suite.report.escaping import escape_address, escape_markdown
from suite.report.figures import plots
from suite.report.figures.dose import dose_figures
from suite.report.findings import findings
from suite.report.matrix import claim_titles
from suite.report.mixtures import mixtures_markdown
from suite.report.rows import result_rows
from suite.spec.kinds import kind_of


def generated_files(results_dir: Path, tasks: dict) -> dict[str, bytes]:
    """All generated files by their path below `results_dir`."""
    rows = result_rows(results_dir, tasks)
    files, figures, matrices, verdicts, places, published, launches, levels = {}, [], [], [], {}, {}, {}, []
    for folder in fingerprint_folders(results_dir):
        with records_of(folder):
            runs = published_runs(results_dir, folder.parent.name, folder.name)
            task = tasks.get(folder.parent.name)
            drawn = plots.figures(kind_of(task), runs) if task else []
            matrices += [(folder.parent.name, folder.name, matrix) for matrix in tables.matrices(runs)]
            verdicts.append(read_verdict(folder / VERDICT))
            published[folder] = runs, drawn, verdicts[-1]
            launches[folder.parent.name, folder.name] = [one for one in map(launch_of, runs) if one]
            levels = own_levels(runs) if folder.parent.name == LEVELS_OF else levels  # of the last such machine by name
    for folder, (runs, drawn, verdict) in published.items():
        found = responses_of(launches, folder.parent.name, folder.name, MIN_DOSES)
        drawn = sorted([*drawn, *dose_figures(found, [*levels, *PAPER_LEVELS])], key=lambda figure: figure.name)
        place = folder.relative_to(results_dir).as_posix()
        files |= {f"{place}/figures/{figure.name}.svg": figure.svg for figure in drawn}
        files[f"{place}/{MANIFEST}"] = _manifest(folder, {f"figures/{f.name}.svg": f.svg for f in drawn})
        beside = [(f"{place}/figures/{one.name}.svg", one.caption) for one in drawn]
        of_task = places.setdefault(folder.parent.name, [])
        of_task.append(page.Place(folder.name, verdict, runs, beside, tables.arm_table(verdict)))
        figures += [(folder.parent.name, folder.name, f"{place}/figures/{f.name}.svg", f.caption) for f in drawn]
    arms = [table for table in map(tables.arm_table, verdicts) if table]
    found = findings(rows)
    sections = [tables.matrix_markdown(*found) for found in matrices] + mixtures_markdown(verdicts, tasks)
    if arms:
        sections += ["## Metrics of the arms, means over launches", *map(tables.arm_table_markdown, arms)]
    sections += dose_sections(launches, levels)
    files["RESULTS.md"] = tables.markdown(rows, [*sections, *_figure_sections(figures)]).encode()
    files["results.tex"] = tables.latex(rows).encode()
    files["results.csv"] = tables.comma_separated(rows).encode()
    titles = claim_titles(results_dir.resolve().parent)
    files["index.html"] = page.render(rows, figures, matrices, found, titles).encode()
    for task in (task for task in places if task in tasks):
        files[f"{page.PAGES}/{task}.html"] = page.render_task(task, rows, places[task]).encode()
    beside = readme.readme_of(results_dir)
    if beside:
        files["../README.md"] = readme.with_results(beside.read_text(), found, verdicts).encode()
    return files


def _manifest(folder: Path, figures: dict[str, bytes]) -> bytes:
    listed = read_manifest(folder / MANIFEST) if exists(folder / MANIFEST) else {}
    listed = {name: digest for name, digest in listed.items() if not name.startswith("figures/")}
    listed |= {name: hashlib.sha256(data).hexdigest() for name, data in figures.items()}
    return "".join(f"{listed[name]}  {name}\n" for name in sorted(listed)).encode()


def _figure_sections(figures: list[tuple[str, str, str, str]]) -> list[str]:
    if not figures:
        return []
    return [
        "## Figures",
        *(_figure_section(*map(escape_markdown, (task, hardware, text)), escape_address(path)) for task, hardware, path, text in figures),
    ]


def _figure_section(task: str, hardware: str, text: str, address: str) -> str:
    return f"### {task} on {hardware}\n\n![{text}]({address})\n\n{text}"


def changed_files(results_dir: Path, files: dict[str, bytes]) -> dict[str, str]:
    """{path: "missing" | "different" | "no longer generated"} of everything that `report` would touch."""
    changes = {}
    for name, data in files.items():
        path = results_dir / name
        if not exists(path):
            changes[name] = "missing"
        elif read_bytes(path) != data:
            changes[name] = "different"
    patterns = ("*/*/figures/*", f"{page.PAGES}/*")
    there = (path.relative_to(results_dir).as_posix() for pattern in patterns for path in results_dir.glob(pattern))
    return changes | {name: "no longer generated" for name in there if name not in files}


def write_files(results_dir: Path, files: dict[str, bytes], changes: dict[str, str]) -> None:
    for name, what in changes.items():
        path = results_dir / name
        if what == "no longer generated":
            path.unlink()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, files[name])
