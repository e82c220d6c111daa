"""From records to what people read: published folders, tables, figures and one static page. No torch, no engine.

    publish(task_id, runs_dir, results_dir)   finished runs -> results/<task>/<fingerprint>/, then everything generated
    report(results_dir, check)                regenerate what is generated, or say what would change
    verify(target, results_dir)               recompute every published verdict and compare

Each returns the exit code of its verb and prints what it did. They import what they need when they are called, so that
`verify` needs no matplotlib and `suite --help` none of it.
"""

from __future__ import annotations

import os
from pathlib import Path

from suite.errors import EXIT_NOTHING

EXIT_DIFFERENT = 1


def publish(task_id: str, runs_dir: Path, results_dir: Path) -> int:
    """Copy every finished run of the task's current version into `results_dir`, grade it there, regenerate the rest."""
    from suite.archive.publishing import publish_task
    from suite.spec.reading import load_all

    folders = publish_task(load_all()[task_id], Path(runs_dir), Path(results_dir))
    if not folders:
        print(f"{task_id}: no finished run of the current version below {runs_dir}; run it with: suite run {task_id}")
        return EXIT_NOTHING
    for folder in folders:
        print(f"published {folder}")
    return report(Path(results_dir))


def report(results_dir: Path, check: bool = False) -> int:
    """Write RESULTS.md, results.tex, results.csv, index.html and all figures from the published records alone.

    With `check`, write nothing: name the files that would change and return 1 if there are any.
    """
    from suite.report.generate import changed_files, generated_files, write_files
    from suite.spec.reading import load_all

    files = generated_files(Path(results_dir), load_all())
    changes = changed_files(Path(results_dir), files)
    for name, what in sorted(changes.items()):
        print(f"{'would change' if check else 'wrote'} {os.path.normpath(Path(results_dir) / name)} ({what})")
    if check:
        print(f"{len(files)} generated files, {len(changes)} would change")
        return EXIT_DIFFERENT if changes else 0
    write_files(Path(results_dir), files, changes)
    return 0


def verify(target: str | None = None, results_dir: Path = Path("results")) -> int:
    """Recompute every published verdict (of one task, or of a bundle) and compare it with the one that stands there."""
    from suite.archive.verifying import verify_published

    found = verify_published(target, Path(results_dir))
    for line in found.differences:
        print(line)
    for line in found.remarks:
        print(f"remark: {line}")
    if not found.checked and not found.differences:
        print(f"nothing published{f' for {target}' if target else ''} in {results_dir}")
        return EXIT_NOTHING
    print(f"{len(found.checked)} published verdicts recomputed, {len(found.differences)} differences")
    return EXIT_DIFFERENT if found.differences else 0
