"""Print the tree of the repository that stands in PAGE, or write it there: readme_tree.py [--write].

Folders of Python carry the first sentence of their package's docstring, then the names of their files.
"""

import argparse
import ast
import re
import subprocess
import textwrap
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path("docs/explanation/architecture.md")
PRODUCT = ("codmd_serve", "distill", "app", "scripts")
OTHERS = {
    "weights": "the embedded teacher and student, how they were made, what they score",
    "tests": "mirror the packages; helpers/ is shared by them, gpu/ needs a CUDA device",
    "docs": "tutorials, how-to, reference (generated), explanation, measured results",
    "deploy": "Dockerfile, compose file, systemd unit, Prometheus, Grafana, a SLURM script",
}
SCRIPTS = "Tools for developers: not installed, not imported."
BEGIN, END = "<!-- tree: scripts/readme_tree.py --write -->", "<!-- end of tree -->"
NAME_WIDTH, WIDTH = 18, 116


def tree(root: Path = ROOT) -> str:
    """Return the tree as an indented Markdown block, made of the tracked files."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.splitlines()
    files = [Path(name) for name in listed if not name.startswith(".") and (root / name).exists()]
    folders: dict[Path, list[str]] = defaultdict(list)
    for file in files:
        if file.parts[0] in PRODUCT and file.suffix == ".py" and file.name != "__init__.py":
            folders[file.parent].append(file.name)
            for parent in list(file.parents)[1:-1]:  # a folder of folders only still has a line
                folders[parent] = folders[parent]
    lines = []
    for folder in sorted(folders):
        lines += _entry(folder, _first_sentence(root / folder), sorted(folders[folder]))
    tops = {file.parts[0] for file in files if len(file.parts) > 1} - set(PRODUCT)
    for top in sorted(tops):
        lines += _entry(Path(top), OTHERS[top], [])
    return "\n".join("    " + line for line in lines)


def replaced(page: str, new_tree: str) -> str:
    """Return the text of a page with its tree replaced.

    Raises:
        ValueError: the markers around the tree are missing.
    """
    if BEGIN not in page or END not in page:
        raise ValueError(f"the page has no {BEGIN!r} ... {END!r}")
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n\n{new_tree}\n\n{END}", page)


def _entry(folder: Path, sentence: str, names: list[str]) -> list[str]:
    indent = "  " * (len(folder.parts) - 1)
    head = f"{indent}{folder.name}/"
    text = f"{head:<{NAME_WIDTH}}{sentence}"
    room = " " * NAME_WIDTH
    body = textwrap.wrap("  ".join(names), WIDTH, initial_indent=room, subsequent_indent=room) if names else []
    return [*textwrap.wrap(text, WIDTH, subsequent_indent=room, drop_whitespace=True), *body]


def _first_sentence(folder: Path) -> str:
    package = folder / "__init__.py"
    if not package.exists():
        return SCRIPTS
    docstring = ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=\.)\s", docstring.replace("\n", " "), maxsplit=1)[0]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write the tree into {PAGE}")
    options = parser.parse_args()
    page = ROOT / PAGE
    if options.write:
        page.write_text(replaced(page.read_text(encoding="utf-8"), tree()), encoding="utf-8")
    else:
        print(tree())


if __name__ == "__main__":
    main()
