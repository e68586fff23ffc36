"""What docs/job.md says of every field is what the specification has; other pages name commands that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from paramserver.families import families
from paramserver.job import Job

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| `([^`]+)` \| (?:`([^`]+)`|(required|none)) \|", re.MULTILINE)


def _fields(schema: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Every leaf field with its default as the page writes it."""
    found: dict[str, str] = {}
    for name, field in schema.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found.update(_fields(kind, f"{prefix}{name}."))
        elif field.is_required():
            found[prefix + name] = "required"
        else:
            default = field.get_default(call_default_factory=True)
            assert default is not PydanticUndefined
            written = default if isinstance(default, str) else json.dumps(default)
            found[prefix + name] = "none" if default is None else written
    return found


def _rows(heading: str) -> dict[str, str]:
    page = (ROOT / "docs" / "job.md").read_text(encoding="utf-8")
    section = page.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return {field: quoted or word for field, quoted, word in ROW.findall(section)}


def test_the_page_has_every_field_of_a_job_with_its_default() -> None:
    assert _rows("All fields") == _fields(Job)


@pytest.mark.parametrize("part", ["model.args", "data"])
@pytest.mark.parametrize("name", ["mlp", "recurrent"])
def test_the_page_has_every_field_of_a_family(name: str, part: str) -> None:
    family = families()[name]
    schema = family.arguments if part == "model.args" else family.data
    assert _rows(f"Family `{name}`: `{part}`") == _fields(schema)


def test_every_command_that_a_page_shows_exists() -> None:
    from paramserver.cli.__main__ import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    known |= {group.name for group in app.registered_groups if group.name}
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("examples/*.md")]
    shown = {word for page in pages for word in re.findall(r"(?:`|^\$ |^)paramserver ([a-z]+)", page.read_text(), re.M)}
    assert shown <= known
    assert {"run", "up", "submit", "status", "down", "validate"} <= shown


def test_every_page_that_a_page_links_to_exists() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
