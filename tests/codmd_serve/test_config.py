"""Settings: operators' mistakes, and where the embedded bundle is looked for."""

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from codmd_serve import config
from codmd_serve.config import ServeConfig
from codmd_serve.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"port": 0}, r"port must be in 1\.\.65535, got 0"),
        ({"port": 65536}, "port must be in"),
        ({"queue_size": 0}, "queue_size must be in"),
        ({"max_pixels": -1}, "max_pixels must be in"),
        ({"max_body_bytes": 10}, "max_body_bytes must be in"),
        ({"jobs_kept": 0}, "jobs_kept must be in"),
        ({"max_attempts": 0}, "max_attempts must be in"),
        ({"drain_timeout_s": -1}, "drain_timeout_s must be in"),
        ({"dtype": "int8"}, "dtype must be one of auto"),
        ({"host": "0.0.0.0"}, "refusing to listen on 0.0.0.0: there is no authentication"),
    ],
)
def test_serve_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServeConfig(**changes)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_serve_config_allows_loopback(host: str) -> None:
    assert ServeConfig(host=host).host == host


def test_serve_config_allows_another_host_when_told_so() -> None:
    assert ServeConfig(host="0.0.0.0", allow_remote_without_auth=True).host == "0.0.0.0"


def test_serve_config_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        ServeConfig().port = 1  # type: ignore[misc]


def test_default_bundle_path_prefers_what_an_installed_wheel_carries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "codmd_serve"
    package.mkdir()
    monkeypatch.setattr(config, "__file__", str(package / "config.py"))
    assert config.default_bundle_path() == tmp_path / "weights" / "shapeworld-dmd"
    (package / "_weights").mkdir()
    assert config.default_bundle_path() == package / "_weights" / "shapeworld-dmd"
