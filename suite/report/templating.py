"""Pages from templates that lie in the packages beside the code that fills them."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, FunctionLoader


def render_page(place: str, name: str, **values) -> str:
    """The template `templates/<name>` of the package `place`, filled. Every page may include style.css of suite.report."""

    def load(wanted: str) -> str:
        package = "suite.report" if wanted == "style.css" else place
        return (files(package) / "templates" / wanted).read_text(encoding="utf-8")

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(load))
    return environment.get_template(name).render(**values)
