"""Text from jinja2 templates, which lie beside the modules that fill them."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape


def render(template: Path, **values: object) -> str:
    """Fill a template; in one named *.html, values are escaped, but for those marked as safe (`markupsafe.Markup`).

    Raises:
        jinja2.UndefinedError: the template uses a value that is not given.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(values)
