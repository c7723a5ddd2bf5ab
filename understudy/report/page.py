"""Pages of one file, without scripts and without anything from elsewhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from understudy.report.charts import number


def render_page(template: Path, **values: Any) -> str:
    """Render a template that extends base.html.jinja and may import parts.html.jinja."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(values)


def write_page(path: Path, page: str) -> None:
    """Write a page, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8", errors="replace")
    temporary.replace(path)


def fact_rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values as text, without those that are None."""
    return [(words(key), _text(value)) for key, value in values.items() if value is not None]


def words(key: object) -> str:
    """A key for people: `tokens_mean` -> `tokens mean`."""
    return str(key).replace("_", " ")


def _text(value: Any) -> str:
    """A value as text; an object's entries line by line, as in `mean 0.71`."""
    if isinstance(value, dict):
        return "\n".join(f"{words(key)} {_text(inner)}" for key, inner in value.items())
    return number(value) if isinstance(value, float) else str(value)
