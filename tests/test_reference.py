"""docs/reference is what the code says, down to the last flag, variable, setting and file."""

from pathlib import Path

import pytest
import reference
import reference_commands
import reference_formats
import reference_http


def test_pages_are_those_that_the_code_makes() -> None:
    names = reference.stale(reference.ROOT / reference.FOLDER, reference.pages())
    assert names == [], "run: .venv/bin/python scripts/reference.py --write"


def test_a_change_of_a_page_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("old", encoding="utf-8")
    (tmp_path / "gone.md").write_text("left over", encoding="utf-8")
    assert reference.stale(tmp_path, {"a.md": "new", "missing.md": ""}) == ["a.md", "gone.md", "missing.md"]


def test_every_variable_that_the_code_reads_is_explained() -> None:
    assert reference_commands.variables_read() == set(reference_commands.OTHER_VARIABLES)


def test_pages_depend_on_no_variable_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    before = reference_commands.serve_page()
    monkeypatch.setenv("CODMD_PORT", "9999")
    monkeypatch.setenv("CODMD_BUNDLE", "/somewhere")
    assert reference_commands.serve_page() == before and "9999" not in before


def test_every_flag_of_every_command_is_on_its_page() -> None:
    for page, parser in (
        (reference_commands.serve_page(), reference_commands.serve_parser()),
        (reference_commands.distill_page(), reference_commands.distill_parser()),
    ):
        for path, command in reference_commands.leaves(parser):
            section = page.split(f"\n## {' '.join(path)}\n")[1].split("\n## ")[0]
            for action in command._actions:
                for name in action.option_strings:
                    assert f"`{name}`" in section or name in ("-h", "--help"), (path, name)


def test_every_route_is_on_the_page() -> None:
    page = reference_http.routes_page()
    for path, operations in reference_http.document()["paths"].items():
        for method in operations:
            assert f"\n## {method.upper()} {path}\n" in page


def test_pages_name_no_path_of_this_machine() -> None:
    for name, text in reference.pages().items():
        assert str(reference.ROOT) not in text, name
        assert str(Path.home()) not in text, name


def test_a_field_without_a_description_is_refused() -> None:
    from dataclasses import dataclass

    @dataclass
    class Settings:
        """Two fields.

        Attributes:
            known: is described,
                in two lines.
        """

        known: int = 0
        unknown: int = 0

    assert reference_formats.attributes(Settings) == {"known": "is described, in two lines."}
    with pytest.raises(ValueError, match="has to describe unknown"):
        reference_formats.described(Settings)
