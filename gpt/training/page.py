"""Pages about runs: one HTML file each, which opens anywhere, asks the network for nothing and runs no script.

Jinja2 is imported when a page is written: most imports of this package never write one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def write_page(path: Path, template: Path, **values: Any) -> None:
    """Render a template into `path`, in one move: a reader never sees half a page.

    Args:
        path: the page.
        template: beside it, or in this folder, lie the files that it includes.
        values: what it names.

    Raises:
        OSError: it cannot be written.
    """
    import jinja2

    loader = jinja2.FileSystemLoader([template.parent, Path(__file__).parent])
    templates = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = templates.get_template(template.name).render(values)
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(page, encoding="utf-8", errors="replace")  # a sampled text may hold half a surrogate pair
    os.replace(aside, path)
