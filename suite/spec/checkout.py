"""The checkout in which one stands: where its tasks, their shared blocks and its baselines are."""

import re
from pathlib import Path

from suite.errors import UserError


def find_repo(start: Path | None = None) -> Path:
    """The checkout in which one stands: the nearest folder upward whose pyproject.toml names fp16-mismatch-suite and
    that has tasks/.
    """
    start = Path(start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        project = folder / "pyproject.toml"
        if (folder / "tasks").is_dir() and project.is_file() and re.search(r"fp16-mismatch-suite", project.read_text()):
            return folder
    raise UserError(f"no checkout of fp16-mismatch-suite at or above {start}; change into one and call again")


def task_files(repo: Path | None = None) -> dict[str, Path]:
    """Every task of the checkout by file name, sorted; folders such as _base hold none. Paths are relative to the
    current folder if below it.
    """
    here, repo = Path.cwd(), repo or find_repo()
    files = sorted(repo.glob("tasks/*/*.yaml"), key=lambda path: path.stem)
    shown = [path.relative_to(here) if path.is_relative_to(here) else path for path in files]
    return {path.stem: path for path in shown if not path.parent.name.startswith("_")}


def task_path(path_or_id: str | Path) -> Path:
    """The file meant by a path or an id. Raises UserError for an id that this checkout does not have."""
    path = Path(path_or_id)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    files = task_files()
    if str(path_or_id) not in files:
        raise UserError(f"no task {str(path_or_id)!r}; there are: {', '.join(files)}")
    return files[str(path_or_id)]


def base_folder(path: Path) -> Path:
    """tasks/_base of the checkout in which the file lies; of the current checkout for a file elsewhere. Outside of any
    checkout a folder that is not there: such a task extends nothing."""
    for folder in Path(path).resolve().parents:
        if (folder / "_base").is_dir():
            return folder / "_base"
    try:
        return find_repo() / "tasks" / "_base"
    except UserError:
        return Path(path).resolve().parent / "tasks" / "_base"
