"""Write docs/reference from the code, or say which of its pages are out of date: reference.py [--write].

Every page is a function of the code alone: of the parsers, the settings, the OpenAPI document and the error table.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import reference_commands as commands  # noqa: E402
import reference_formats as formats  # noqa: E402
import reference_http as http  # noqa: E402

FOLDER = Path("docs/reference")
NOTE = "<!-- Written by scripts/reference.py --write from the code; edit the code. -->"
PAGES: dict[str, Callable[[], str]] = {
    "codmd-serve.md": commands.serve_page,
    "codmd-distill.md": commands.distill_page,
    "environment.md": commands.environment_page,
    "http.md": http.routes_page,
    "errors.md": http.errors_page,
    "settings.md": formats.settings_page,
    "run-folder.md": formats.run_folder_page,
    "bundle.md": formats.bundle_page,
}


def pages() -> dict[str, str]:
    """Return the text of every page by file name."""
    return {name: f"{NOTE}\n\n{make().strip()}\n" for name, make in PAGES.items()}


def stale(folder: Path, made: dict[str, str]) -> list[str]:
    """Return the names of the pages in `folder` that differ from those made, are missing, or are no longer made."""
    there = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    return sorted(name for name in there.keys() | made.keys() if there.get(name) != made.get(name))


def main() -> int:
    """Run the command line; return 1 when pages are out of date and were not to be written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the pages")
    folder = ROOT / FOLDER
    made = pages()
    names = stale(folder, made)
    if not parser.parse_args().write:
        print("\n".join(f"{FOLDER / name} is out of date: run scripts/reference.py --write" for name in names))
        return 1 if names else 0
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name in made:
            (folder / name).write_text(made[name], encoding="utf-8")
        else:
            (folder / name).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
