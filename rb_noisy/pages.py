"""Pages that need nothing but themselves: a Jinja template with its style and script put inline."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

SHARED = Path(__file__).with_name("templates")  # base.html and base.css, which every page starts from


def render_page(folder: Path, name: str, **values: Any) -> str:
    """`folder`/`name`.html filled in with `values`, all text escaped, with `name`.css and `name`.js inline.

    The page tells the browser to load nothing at all and to run no script but its own, known by its SHA-256: what
    stands in a card or in a class name can neither call home nor be run.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader([folder, SHARED]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = "\n".join(file.read_text(encoding="utf-8") for file in (SHARED / "base.css", folder / f"{name}.css"))
    script = (folder / f"{name}.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template(f"{name}.html")
    return page.render(style=Markup(style), script=Markup(script), script_digest=digest, **values) + "\n"
