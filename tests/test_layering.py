"""Who may import whom: reads the imports of every file, and starts the HTTP side without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("codmd_serve", "distill", "app")
WAN = ("codmd_serve.wan",)
# What a module of codmd_serve may import of codmd_serve, by prefix; a package stands for all that is in it.
PURE = (
    "codmd_serve.config",
    "codmd_serve.errors",
    "codmd_serve.files",
    "codmd_serve.grid",
    "codmd_serve.textfiles",
)
ALLOWED: dict[str, tuple[str, ...]] = {
    "codmd_serve": (),
    "codmd_serve.errors": (),
    "codmd_serve.config": ("codmd_serve.errors",),
    "codmd_serve.files": ("codmd_serve.errors",),
    "codmd_serve.grid": ("codmd_serve.errors",),
    "codmd_serve.jobs": (*PURE, "codmd_serve.files", "codmd_serve.jobs"),
    "codmd_serve.prompts": (),
    "codmd_serve.textfiles": ("codmd_serve.errors", "codmd_serve.files"),
    "codmd_serve.video": (*PURE, "codmd_serve.service_time"),
    "codmd_serve.webp": (),
    "codmd_serve.schedule": PURE,
    "codmd_serve.sampler": (*PURE, "codmd_serve.schedule"),
    "codmd_serve.student_scheduler": (*PURE, "codmd_serve.schedule"),
    "codmd_serve.grammar": PURE,
    "codmd_serve.wan": (
        *PURE,
        "codmd_serve.device",
        "codmd_serve.grammar",
        "codmd_serve.prompts",
        "codmd_serve.schedule",
        "codmd_serve.sampler",
        "codmd_serve.student_scheduler",
        "codmd_serve.verdicts",
        *WAN,
    ),
    "codmd_serve.device": PURE,
    "codmd_serve.commands": ("codmd_serve.errors", "codmd_serve.textfiles"),
    "codmd_serve.cuda_graph": PURE,
    "codmd_serve.verdicts": PURE,
    "codmd_serve.denoise": (
        *PURE,
        "codmd_serve.sampler",
        "codmd_serve.cuda_graph",
        "codmd_serve.verdicts",
        *WAN,
    ),
    "codmd_serve.device_memory": (),
    "codmd_serve.chunk_graphs": (
        *PURE,
        *(f"codmd_serve.{name}" for name in ("cuda_graph", "device_memory", "verdicts")),
        *WAN,
    ),
    "codmd_serve.overlap": (*PURE, "codmd_serve.device", "codmd_serve.device_memory"),
    "codmd_serve.threads": (),
    "codmd_serve.stages": (*PURE, "codmd_serve.messages"),
    "codmd_serve.warm": (
        *PURE,
        *(
            f"codmd_serve.{name}"
            for name in ("chunk_graphs", "device", "device_memory", "engine", "overlap", "verdicts")
        ),
        *WAN,
    ),
    "codmd_serve.engine": (
        *PURE,
        "codmd_serve.denoise",
        "codmd_serve.overlap",
        "codmd_serve.stages",
        "codmd_serve.threads",
        "codmd_serve.verdicts",
        "codmd_serve.video",
        *WAN,
    ),
    "codmd_serve.loading": (
        *PURE,
        "codmd_serve.__version__",
        "codmd_serve.verdicts",
        "codmd_serve.warm",
        "codmd_serve.cpu",
        "codmd_serve.denoise",
        "codmd_serve.device",
        "codmd_serve.engine",
        "codmd_serve.overlap",
        "codmd_serve.video",
        *WAN,
    ),
    "codmd_serve.convert_cli": (*PURE, "codmd_serve.__version__", *WAN),
    "codmd_serve.models_cli": (*PURE, "codmd_serve.__version__", *WAN),
    "codmd_serve.doctor": (
        *PURE,
        *(f"codmd_serve.{name}" for name in ("__version__", "commands", "device", "video")),
        *WAN,
    ),
    "codmd_serve.bench": (
        *PURE,
        "codmd_serve.__version__",
        "codmd_serve.bench",
        "codmd_serve.chunk_graphs",
        "codmd_serve.cpu",
        "codmd_serve.cuda_graph",
        "codmd_serve.denoise",
        "codmd_serve.device",
        "codmd_serve.engine",
        "codmd_serve.loading",
        "codmd_serve.stages",
        "codmd_serve.video",
        "codmd_serve.warm",
        *WAN,
    ),
    "codmd_serve.messages": PURE,
    "codmd_serve.caches": (),
    "codmd_serve.cpu": (),
    "codmd_serve.lean_imports": (),
    "codmd_serve.service_time": PURE,
    "codmd_serve.worker_process": (*PURE, "codmd_serve.messages"),
    "codmd_serve.worker_slot": (
        *PURE,
        *(f"codmd_serve.{name}" for name in ("messages", "service_time", "worker_process")),
    ),
    "codmd_serve.pool": (
        *PURE,
        *(f"codmd_serve.{name}" for name in ("cpu", "messages", "service_time", "worker_process", "worker_slot")),
    ),
    "codmd_serve.worker": (
        *PURE,
        "codmd_serve.caches",
        "codmd_serve.cpu",
        "codmd_serve.lean_imports",
        "codmd_serve.messages",
        "codmd_serve.engine",
        "codmd_serve.loading",
        *WAN,
    ),
    "codmd_serve.bundle": PURE,
    "codmd_serve.batch": (
        *PURE,
        "codmd_serve.api.schemas",
        "codmd_serve.commands",
        "codmd_serve.cpu",
        "codmd_serve.loading",
        *WAN,
    ),
    "codmd_serve.dispatcher": (*PURE, "codmd_serve.jobs", "codmd_serve.messages", "codmd_serve.worker_slot"),
    "codmd_serve.api": (
        *PURE,
        "codmd_serve.__version__",
        "codmd_serve.api",
        "codmd_serve.bundle",
        "codmd_serve.dispatcher",
        "codmd_serve.jobs",
        "codmd_serve.prompts",
    ),
    "codmd_serve.serving": (
        *PURE,
        "codmd_serve.api",
        "codmd_serve.dispatcher",
        "codmd_serve.jobs",
        "codmd_serve.pool",
        "codmd_serve.worker_process",
    ),
    "codmd_serve.cli": ("codmd_serve",),
}
DISTILL_MAY = (
    *PURE,
    "codmd_serve.__version__",
    "codmd_serve.bundle",
    "codmd_serve.commands",
    "codmd_serve.cpu",
    "codmd_serve.device",
    "codmd_serve.grammar",
    "codmd_serve.prompts",
    "codmd_serve.schedule",
    "codmd_serve.sampler",
    "codmd_serve.video",
    *WAN,
)
DISTILL_EXCEPTIONS = {
    # VBench scores what is served, so its videos come from the engine itself.
    "distill.evaluate.vbench.generate": ("codmd_serve.loading",),
}
# CONTRIBUTING.md states both.
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 60
# What a module of distill may import of distill: rooms lower in this table know nothing of those above them.
SETTINGS = ("distill.config", "distill.settings", "distill.streams")
NETWORKS = (*SETTINGS, "distill.losses", "distill.networks", "distill.parallel")
METHODS = (*NETWORKS, "distill.data", "distill.methods")
PRETRAIN = (*NETWORKS, "distill.data", "distill.pretrain", "distill.run", "distill.worlds")
DISTILL_ALLOWED: dict[str, tuple[str, ...]] = {
    "distill": (),
    "distill.cli": ("distill",),
    "distill.bench": (*METHODS, "distill.bench", "distill.run"),
    "distill.evaluate": (*NETWORKS, "distill.evaluate", "distill.pretrain", "distill.worlds"),
    # It runs the trainer itself.
    "distill.evaluate.compare": (*METHODS, "distill.evaluate", "distill.run", "distill.worlds"),
    "distill.pretrain": PRETRAIN,
    # They measure the teacher while it trains.
    "distill.pretrain.curve": (*PRETRAIN, "distill.evaluate"),
    "distill.pretrain.curve_worker": (*PRETRAIN, "distill.evaluate"),
    "distill.plan": (*METHODS, "distill.plan"),
    "distill.run": (*METHODS, "distill.run", "distill.validate"),
    # It asks whether a run fits before it starts it.
    "distill.run.command": (*METHODS, "distill.plan", "distill.run", "distill.validate"),
    "distill.validate": (*METHODS, "distill.evaluate", "distill.validate", "distill.worlds"),
    "distill.methods": METHODS,
    "distill.data": (*NETWORKS, "distill.data", "distill.worlds"),
    "distill.networks": NETWORKS,
    "distill.networks.analytic": (*NETWORKS, "distill.worlds"),
    "distill.parallel": (*SETTINGS, "distill.parallel"),
    "distill.losses": (*SETTINGS, "distill.losses"),
    "distill.worlds": ("distill.worlds",),
    "distill.config": (*SETTINGS, "distill.formats"),
    "distill.formats": (),
    "distill.settings": (),
    "distill.streams": (),
}
HEAVY = ("torch", "diffusers", "transformers", "numpy", "gradio")


def modules(package: str) -> list[tuple[str, Path]]:
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def imports(path: Path) -> Iterator[str]:
    """Every dotted name that a file imports, inside functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            # app/ has another name in an installed wheel, so its modules know each other as siblings only.
            is_sibling = path.is_relative_to(ROOT / "app") and node.level == 1
            assert node.level == 0 or is_sibling, f"{path}: imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def dotted_names(path: Path) -> set[str]:
    """Every name and attribute chain that a file uses."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {ast.unparse(node) for node in nodes if isinstance(node, ast.Name | ast.Attribute)}


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def rule_of(module: str, allowed: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the most specific rule; a new module has to be entered in the table first."""
    entry = max((entry for entry in allowed if within(module, (entry,))), key=len)
    assert entry not in PACKAGES or module == entry, f"{module} has no place in the layering yet"
    return allowed[entry]


@pytest.mark.parametrize(
    ("module", "path"), modules("codmd_serve"), ids=lambda value: value if isinstance(value, str) else ""
)
def test_codmd_serve_imports_only_what_lies_below(module: str, path: Path) -> None:
    allowed = rule_of(module, ALLOWED)
    for name in imports(path):
        if within(name, PACKAGES):
            assert within(name, allowed), f"{module} must not import {name}"


@pytest.mark.parametrize(
    ("module", "path"), modules("distill"), ids=lambda value: value if isinstance(value, str) else ""
)
def test_distill_imports_only_the_shared_half_of_codmd_serve(module: str, path: Path) -> None:
    may = (*DISTILL_MAY, *DISTILL_EXCEPTIONS.get(module, ()))
    for name in imports(path):
        # "import codmd_serve" is for its version.
        if within(name, ("codmd_serve", "app")) and name != "codmd_serve":
            assert within(name, may), f"{module} must not import {name}"


@pytest.mark.parametrize(
    ("module", "path"), modules("distill"), ids=lambda value: value if isinstance(value, str) else ""
)
def test_rooms_of_distill_import_only_those_below(module: str, path: Path) -> None:
    allowed = rule_of(module, DISTILL_ALLOWED)
    for name in imports(path):
        if within(name, ("distill",)):
            assert within(name, allowed), f"{module} must not import {name}"


@pytest.mark.parametrize(("module", "path"), modules("app"), ids=lambda value: value if isinstance(value, str) else "")
def test_app_is_an_http_client(module: str, path: Path) -> None:
    for name in imports(path):
        assert not within(name, PACKAGES), f"{module} must not import {name}; siblings are imported as `from .name`"


@pytest.mark.parametrize("package", ["codmd_serve", "distill"])
def test_pages_are_imported_by_app_module_only(package: str) -> None:
    for module, path in modules(package):
        named = [name for name in imports(path) if within(name, ("app",))]
        assert named == [], f"{module}: a wheel has no package app; call codmd_serve.commands.app_module"


@pytest.mark.parametrize("module", PURE)
def test_the_bottom_layer_needs_the_standard_library_only(module: str) -> None:
    path = ROOT / (module.replace(".", "/") + ".py")
    for name in imports(path):
        first = name.partition(".")[0]
        assert first in sys.stdlib_module_names or within(name, PURE), f"{module} must not import {name}"


@pytest.mark.parametrize("module", ["codmd_serve.schedule", "codmd_serve.sampler"])
def test_the_shared_mathematics_needs_torch_only(module: str) -> None:
    path = ROOT / (module.replace(".", "/") + ".py")
    for name in imports(path):
        first = name.partition(".")[0]
        assert first in ("torch", "codmd_serve") or first in sys.stdlib_module_names, f"{module} must not import {name}"


def test_only_one_file_knows_cuda_graphs() -> None:
    for package in PACKAGES:
        for module, path in modules(package):
            names = dotted_names(path)
            graphs = names & {"torch.cuda.graph", "torch.cuda.CUDAGraph", "torch.cuda.make_graphed_callables"}
            assert not graphs or module == "codmd_serve.cuda_graph", f"{module} records CUDA graphs"


def test_only_processes_where_they_begin_read_the_environment() -> None:
    for package in PACKAGES:
        for module, path in modules(package):
            names = dotted_names(path)
            reads = names & {"os.environ", "os.getenv", "environ", "getenv"}
            assert not reads or module in (
                "codmd_serve.batch",
                "codmd_serve.cli",
                "codmd_serve.worker",
                "distill.cli",
            ), f"{module} reads the environment"


def test_help_of_the_distiller_does_not_wait_for_torch() -> None:
    code = "import sys, distill.cli; print(sorted(sys.modules.keys() & {'torch', 'diffusers', 'transformers'}))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "module",
    [
        "codmd_serve.api.app",
        "codmd_serve.dispatcher",
        "codmd_serve.serving",
        "codmd_serve.worker",
        "codmd_serve.cli",
        "codmd_serve",
    ],
)
def test_the_http_process_never_imports_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted(sys.modules.keys() & {set(HEAVY)!r}))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("page", ["app.demo", "app.study"])
def test_the_page_does_not_import_torch(page: str) -> None:
    code = f"import sys, {page}; print(sorted(sys.modules.keys() & {{'torch', 'codmd_serve', 'distill'}}))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", PACKAGES)
def test_files_and_functions_stay_readable(package: str) -> None:
    for module, path in modules(package):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= MAX_FILE_LINES, f"{module} is too long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION_LINES, f"{module}.{node.name} is too long"


def test_tests_poll_and_do_not_sleep_a_fixed_time() -> None:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        polls = {id(inner) for node in nodes if isinstance(node, ast.While) for inner in ast.walk(node)}
        for node in nodes:
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("sleep"):
                assert id(node) in polls, f"{path}:{node.lineno} sleeps outside a polling loop"
