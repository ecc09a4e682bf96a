"""Imports diffusers and transformers without their model zoos, for processes that only serve; standard library only.

Both import hundreds of modules before the first of ours: every transformer and UNet of diffusers, its schedulers, scipy
for losses, torch._dynamo for a decorator, torch.distributed.tensor for an isinstance. transformers also reads 3,300
source files for the names in them. `import_lean` leaves all of that out:

- the packages in EMPTY_PACKAGES are empty while it runs, and a few modules that serving never calls have stand-ins.
  Afterwards both are gone again: a later import gets the real thing, and finds the classes that are there already;
- the packages in LATE_PACKAGES run their own code when somebody asks them for a name, which serving does not;
- transformers caches that there is no torch.distributed, which it supports. A serving process shards nothing;
- the garbage collector pauses. It would look in vain at a million new objects, which are exempt from it afterwards.
"""

import contextlib
import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Unpack

# Packages whose __init__ imports all they have. Any module in them is found; names of the package itself are these.
EMPTY_PACKAGES: dict[str, tuple[str, ...]] = {
    "diffusers.hooks": (),
    "diffusers.models.autoencoders": (),
    "diffusers.models.transformers": (),
    "diffusers.models.unets": (),
    "transformers.generation": ("configuration_utils",),
}
# Packages whose __init__ reads every model file for its names; parents first.
LATE_PACKAGES = ("transformers", "transformers.models")


def _as_it_is(decorated: Any = None, *_: object, **_options: object) -> Any:
    """Decorate nothing, with arguments or without."""
    return _as_it_is if decorated is None else decorated


# Modules and the names that are asked of them: bases of classes, a decorator, a table.
STAND_INS: dict[str, dict[str, Any]] = {
    "boto3": {},  # accelerate writes configs for SageMaker
    "diffusers.loaders.peft": {"PeftAdapterMixin": type("PeftAdapterMixin", (), {})},
    "diffusers.loaders.single_file_model": {"FromOriginalModelMixin": type("FromOriginalModelMixin", (), {})},
    "torch._dynamo": dict.fromkeys(("allow_in_graph", "assume_constant_result", "disable"), _as_it_is),
    # For masks that vmap over positions, which a text encoder without a cache has none of; entering it would fail.
    "torch._dynamo._trace_wrapped_higher_order_op": {"TransformGetItemToIndex": None},
    "transformers.generation.continuous_batching": {},
    "transformers.generation.continuous_batching.cache": {"PagedAttentionCache": type("PagedAttentionCache", (), {})},
    "transformers.loss": {},
    "transformers.loss.loss_utils": {"LOSS_MAPPING": {}},
    # It imports the whole of transformers a second time.
    "transformers.processing_utils": {"Unpack": Unpack},
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
    with _uncollected(), _distributions_by_need():
        for name in LATE_PACKAGES:
            _place_late(name)
        placed = {name: _stand_in(name, content) for name, content in STAND_INS.items()}
        placed |= {name: _empty_package(name, inner) for name, inner in EMPTY_PACKAGES.items()}
        sys.modules.update(placed)
        try:
            _leave_out_distributed()
            yield
        finally:
            for name, module in placed.items():
                if sys.modules.get(name) is module:
                    del sys.modules[name]
                parent, _, child = name.rpartition(".")
                if parent in sys.modules and sys.modules[parent].__dict__.get(child) is module:
                    delattr(sys.modules[parent], child)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Pause the garbage collector, and exempt from it what the block leaves behind."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _distributions_by_need() -> Iterator[None]:
    """Let `importlib.metadata.packages_distributions` open every installed package when its result is used.

    diffusers calls it on import, and looks up packages that are rarely installed.
    """
    real = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = lambda: _Distributions(real)
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = real


class _Distributions(Mapping[str, list[str]]):
    def __init__(self, compute: Any) -> None:
        self._compute = functools.cache(compute)

    def __getitem__(self, name: str) -> list[str]:
        found: list[str] = self._compute()[name]
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._compute())

    def __len__(self) -> int:
        return len(self._compute())


def _leave_out_distributed() -> None:
    """Let transformers find no torch.distributed, and remember that; a version that asks again only takes longer."""
    distributed: Any = importlib.import_module("torch.distributed")
    ask = getattr(importlib.import_module("transformers.utils.import_utils"), "is_torch_distributed_available", None)
    real = distributed.is_available
    distributed.is_available = lambda: False
    try:
        if ask is not None:
            ask()
    finally:
        distributed.is_available = real


class _LatePackage(ModuleType):
    """A package whose own code runs when somebody asks it for a name; its modules can be imported before."""

    def __getattr__(self, asked: str) -> Any:
        # inspect asks every module for some of these.
        if asked.startswith("__") and asked != "__all__":
            raise AttributeError(f"module {self.__name__} has no attribute {asked}")
        if asked != "__all__" and PathFinder.find_spec(f"{self.__name__}.{asked}", self.__path__) is not None:
            return importlib.import_module(f"{self.__name__}.{asked}")
        with _LATE:
            # Its code, which asks it for names itself, may put another module in its place.
            if sys.modules.get(self.__name__) is self and not self.__dict__.get("_is_run"):
                self.__dict__["_is_run"] = True
                spec: Any = self.__spec__
                spec.loader.exec_module(self)
        real = sys.modules.get(self.__name__)
        if real is self or real is None:
            raise AttributeError(f"module {self.__name__} has no attribute {asked}")
        return getattr(real, asked)


_LATE = threading.RLock()


def _place_late(name: str) -> None:
    """Put a package into sys.modules without running its code."""
    parent, _, child = name.rpartition(".")
    spec = PathFinder.find_spec(name, sys.modules[parent].__path__ if parent else None)
    if spec is None or spec.origin is None or spec.submodule_search_locations is None:
        raise ImportError(f"{name} is no package in a folder")
    package = _LatePackage(name)
    _describe(package, spec)
    if parent:
        setattr(sys.modules[parent], child, package)
    else:
        package.__dict__["__version__"] = importlib.metadata.version(name)
    sys.modules[name] = package


def _describe(package: ModuleType, spec: ModuleSpec) -> None:
    package.__spec__, package.__loader__, package.__file__ = spec, spec.loader, spec.origin
    package.__package__, package.__path__ = spec.name, list(spec.submodule_search_locations or ())


def _stand_in(name: str, content: dict[str, Any]) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # for those who ask whether it is installed
    module.__dict__.update(content)
    return module


def _empty_package(name: str, inner: tuple[str, ...]) -> ModuleType:
    """Return a package without content of its own; names that are asked of it are looked up in `inner`."""
    module = ModuleType(name)
    module.__path__ = _folders(name)

    def look_up(asked: str) -> Any:
        if asked == GENERATION_MIXIN.__name__:
            return GENERATION_MIXIN
        if not asked.startswith("__"):  # inspect asks every module for its file
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
