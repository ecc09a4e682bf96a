"""Imports diffusers and transformers without their model zoos, for processes that only serve; standard library only.

Both import hundreds of modules before the first of ours: every transformer and UNet of diffusers, its schedulers, scipy
for losses, torch._dynamo for a decorator. Within `lean_imports` the packages in between are empty, and a few modules
that serving never calls have stand-ins. Afterwards they are gone again: what is imported later is the real thing, and
finds the classes that are there already.
"""

import contextlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

# Packages whose __init__ imports all they have. Any module in them is found; names of the package itself are these.
EMPTY_PACKAGES: dict[str, tuple[str, ...]] = {
    "diffusers.hooks": (),
    "diffusers.models.autoencoders": (),
    "diffusers.models.transformers": (),
    "diffusers.models.unets": (),
    "transformers.generation": ("configuration_utils",),
}


def _as_it_is(decorated: Any = None, *_: object, **_options: object) -> Any:
    """Decorate nothing, with arguments or without."""
    return _as_it_is if decorated is None else decorated


# Modules and the names that are asked of them: bases of classes, a decorator, a table.
STAND_INS: dict[str, dict[str, Any]] = {
    "diffusers.loaders.peft": {"PeftAdapterMixin": type("PeftAdapterMixin", (), {})},
    "diffusers.loaders.single_file_model": {"FromOriginalModelMixin": type("FromOriginalModelMixin", (), {})},
    "torch._dynamo": dict.fromkeys(("allow_in_graph", "assume_constant_result", "disable"), _as_it_is),
    # For masks that vmap over positions, which a text encoder without a cache has none of; entering it would fail.
    "torch._dynamo._trace_wrapped_higher_order_op": {"TransformGetItemToIndex": None},
    "transformers.generation.continuous_batching": {},
    "transformers.generation.continuous_batching.cache": {"PagedAttentionCache": type("PagedAttentionCache", (), {})},
    "transformers.loss": {},
    "transformers.loss.loss_utils": {"LOSS_MAPPING": {}},
}
# Every model of diffusers asks it for its device.
ASKED_LATER = ("diffusers.hooks.group_offloading",)
HALVES = ("codmd_serve", "diffusers", "transformers")
GENERATION_MIXIN = type("GenerationMixin", (), {})

logger = logging.getLogger(__name__)


def import_lean(name: str) -> ModuleType:
    """Import a module of ours leanly; as it is usually imported where a version of a library does not allow that."""
    known = set(sys.modules)
    try:
        with lean_imports():
            for each in (*ASKED_LATER, name):
                importlib.import_module(each)
        return sys.modules[name]
    except Exception as error:  # whatever half an import raises
        logger.warning("imports=full reason=%r", f"{type(error).__name__}: {error}")
        # Not torch: it cannot be imported twice.
        for half in [new for new in sys.modules.keys() - known if new.split(".")[0] in HALVES]:
            del sys.modules[half]
        return importlib.import_module(name)


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """Import what serving needs within the block, and nothing that only others need.

    Does nothing where one of the packages was imported before.
    """
    if {"diffusers", "transformers"} & sys.modules.keys():
        yield
        return
    placed = {name: _stand_in(name, content) for name, content in STAND_INS.items()}
    placed |= {name: _empty_package(name, inner) for name, inner in EMPTY_PACKAGES.items()}
    sys.modules.update(placed)
    try:
        yield
    finally:
        for name, module in placed.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
            parent, _, child = name.rpartition(".")
            if parent in sys.modules and sys.modules[parent].__dict__.get(child) is module:
                delattr(sys.modules[parent], child)


def _stand_in(name: str, content: dict[str, Any]) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(content)
    return module


def _empty_package(name: str, inner: tuple[str, ...]) -> ModuleType:
    """Return a package without content of its own; names that are asked of it are looked up in `inner`."""
    module = ModuleType(name)
    module.__path__ = _folders(name)

    def look_up(asked: str) -> Any:
        if asked == GENERATION_MIXIN.__name__:
            return GENERATION_MIXIN
        for part in inner:
            found = importlib.import_module(f"{name}.{part}")
            if hasattr(found, asked):
                return getattr(found, asked)
        raise AttributeError(f"{name} has no {asked} while imports are lean")

    module.__dict__["__getattr__"] = look_up
    return module


def _folders(name: str) -> list[str]:
    """Return where a package lies, without importing its parents."""
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top)
    places = spec.submodule_search_locations if spec is not None else None
    return ["/".join((place, *rest)) for place in places or ()]
