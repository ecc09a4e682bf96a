"""Compiler caches: below --cache, and never over what the user has set."""

from pathlib import Path

import pytest

from codmd_serve import worker
from codmd_serve.caches import COMPILER_CACHES, prepare_caches
from codmd_serve.messages import Load


def test_compilers_keep_their_results_below_the_cache(tmp_path: Path) -> None:
    environment = {"TRITON_CACHE_DIR": "/mine"}
    prepare_caches(environment, str(tmp_path))
    assert environment == {"TRITON_CACHE_DIR": "/mine", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}


def test_without_a_cache_nothing_is_set() -> None:
    environment: dict[str, str] = {}
    prepare_caches(environment, "")
    assert environment == {}


def test_a_worker_takes_them_from_what_it_is_told_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in COMPILER_CACHES:
        monkeypatch.delenv(name, raising=False)
    seen: dict[str, str] = {}
    monkeypatch.setattr(worker.os, "environ", seen)
    worker.serve_jobs(Load("/nowhere", {"cache": str(tmp_path)}), iter([]), lambda _: None)  # type: ignore[arg-type]
    assert seen == {name: str(tmp_path / folder) for name, folder in COMPILER_CACHES.items()}
