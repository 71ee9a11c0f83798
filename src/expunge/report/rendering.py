"""HTML from templates: one file, its styles and scripts within it, all else shown as text."""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from expunge.report.documents import script_json
from expunge.report.drawing import library, shown
from expunge.report.pieces import Figure


@dataclass(frozen=True)
class Script:
    """A script within the page; its digest lets it run, and no other."""

    text: Markup
    digest: str


def render(
    template: str,
    *,
    title: str,
    figures: Sequence[Figure] = (),
    items: dict[str, Any] | None = None,
    **content: Any,
) -> str:
    """A page from one of the templates; whatever a model wrote is text, never markup.

    Only the scripts of this package and the library of charts may run: the page names their
    digests, and allows nothing from outside.
    """
    names = ["page.js", *(["items.js"] if items else [])]
    charts = {figure.table.name: figure.chart for figure in figures}
    return (
        _environment()
        .get_template(template)
        .render(
            title=title,
            css=Markup(_asset("page.css")),
            licences=Markup(_asset("licences.txt").replace("--", "- -")),
            scripts=[_script(text) for text in (library(), *map(_asset, names))],
            charts=Markup(script_json(charts)),
            items=Markup(script_json(items)) if items else None,
            **content,
        )
    )


def tied(text: str) -> str:
    """The text with each number kept on one line with its % sign."""
    return re.sub(r"(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", text)


def _script(text: str) -> Script:
    """A script that no part of its own text ends too early."""
    text = text.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Script(Markup(text), f"sha256-{digest}")


def _asset(name: str) -> str:
    return files("expunge.report").joinpath("web", name).read_text(encoding="utf-8")


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FunctionLoader(_asset),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    environment.filters["tied"] = tied
    environment.filters["told"] = lambda value: json.dumps(value, indent=1, ensure_ascii=False)
    return environment
