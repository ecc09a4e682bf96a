"""deploy/: flags, variables, routes and metrics that it names exist. No image is built and no engine runs here."""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_runner import FACTS, FakeRunner

from codmd_serve import cli
from codmd_serve.api.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
UNIT = (DEPLOY / "codmd-serve.service").read_text()
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "codmd-serve.json").read_text())
METRIC = re.compile(r"\b(?:codmd|process)_[a-z_]+")
OURS = {name: service for name, service in COMPOSE["services"].items() if service["image"].startswith("codmd-serve")}
VARIABLES = {flag.variable for flag in cli.SERVE_FLAGS}


def parse(words: list[str]) -> argparse.Namespace:
    return cli._parser().parse_args(words)


@pytest.fixture
def exported() -> set[str]:
    """Names of all series that a server with a warm worker exports."""

    class Dispatcher:
        runner = FakeRunner.__new__(FakeRunner)
        num_running, blocked = 1, ""

    runner: Any = Dispatcher.runner
    runner.facts, runner.is_ready, runner.num_hanging, runner.restarts = FACTS, True, 0, {}
    metrics = Metrics()
    metrics.watch(lambda: (1, 2, 3.0), lambda: True, Dispatcher(), 16, lambda: 0)  # type: ignore[arg-type]
    metrics.refused("queue_full")
    names = set()
    for line in metrics.text().decode().splitlines():
        if not line.startswith("#"):
            names.add(re.split(r"[{ ]", line)[0])
    return names


def expressions() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    for rule in rules["groups"][0]["rules"]:
        yield rule["alert"], rule["expr"]


def test_every_metric_of_the_dashboard_and_of_the_alerts_is_exported(exported: set[str]) -> None:
    used = {}
    for title, expression in expressions():
        names = METRIC.findall(expression)
        assert names, f"{title} shows no metric"
        used |= dict.fromkeys(names, title)
    missing = {name: title for name, title in used.items() if name not in exported}
    assert not missing
    parts = (r"_bucket$", r"_sum$", r"_count$", r"_created$")
    ours = {name for name in exported if name.startswith("codmd_") and not re.search("|".join(parts), name)}
    assert ours <= used.keys(), f"no panel and no alert shows {sorted(ours - used.keys())}"


def test_the_labels_of_the_dashboard_exist(exported: set[str]) -> None:
    labels = {"status", "code", "stage", "source", "reason", "instance", "job", "le"}
    for _, expression in expressions():
        used = re.findall(r"(\w+)=~?\"", expression) + re.findall(r"by \(([\w, ]+)\)", expression)
        assert {name.strip() for each in used for name in each.split(",")} <= labels, expression


def test_the_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells


@pytest.mark.parametrize("name", OURS)
def test_services_of_compose_use_flags_and_variables_that_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service = OURS[name]
    settings: Mapping[str, str] = service["environment"]
    assert settings.keys() <= VARIABLES
    for variable, value in {**image_settings(), **settings}.items():
        if variable.startswith("CODMD_"):
            monkeypatch.setenv(variable, "" if value.startswith("${") else str(value))
    options = parse(service["command"])
    config = cli._config(options)
    assert config.store.startswith("postgresql://") and config.results == "/results" and config.data == "/data"
    grace_s = int(service["stop_grace_period"].removesuffix("s"))
    assert config.drain_timeout_s < grace_s, "the container would be killed while jobs still end"
    for port in re.findall(r"127\.0\.0\.1:(\d+)/", str(service.get("healthcheck", ""))):
        assert int(port) == config.metrics_port
    assert service["build"]["target"] in re.findall(r"^FROM .* AS (\w+)$", DOCKERFILE, re.M)
    assert service["depends_on"]["postgres"]["condition"] == "service_healthy"


def test_compose_publishes_on_this_machine_only_and_declares_its_volumes() -> None:
    for name, service in COMPOSE["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], volume
        assert ":" in service["image"] and not service["image"].endswith(":latest")


def test_prometheus_scrapes_what_compose_runs() -> None:
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    api, workers = scraped
    host, port = api["static_configs"][0]["targets"][0].split(":")
    assert (
        host in OURS["api"]["environment"]["CODMD_ALLOWED_HOSTS"].split(",") and port == image_settings()["CODMD_PORT"]
    )
    (discovery,) = workers["dns_sd_configs"]
    assert set(discovery["names"]) == OURS.keys() - {"api"}
    assert all(str(discovery["port"]) in OURS[name]["command"] for name in discovery["names"])
    jobs = {each["job_name"] for each in scraped}
    for _, expression in expressions():
        for wanted in re.findall(r"job=~?\"([^\"]+)\"", expression):
            assert any(re.fullmatch(wanted, job) for job in jobs)


def image_settings() -> dict[str, str]:
    """ENV of the Dockerfile."""
    joined = DOCKERFILE.replace("\\\n", " ")
    lines = re.findall(r"^ENV (.+)$", joined, re.M)
    return dict(pair.split("=", 1) for line in lines for pair in shlex.split(line))


def test_the_image_runs_as_nobody_in_particular_and_is_asked_for_its_health() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.M)[1:]
    final = {stage.split()[2]: stage for stage in stages if stage.split()[2] in ("cpu", "cuda")}
    assert final.keys() == {"cpu", "cuda"}
    for stage in final.values():
        assert stage.rstrip().splitlines()[-1] == "USER 10001:10001"
    assert "useradd --uid 10001" in DOCKERFILE and "groupadd --gid 10001" in DOCKERFILE
    health = re.search(r"HEALTHCHECK .*?CMD (\[.+?\])$", DOCKERFILE, re.S | re.M)
    assert health is not None
    _, _, code = json.loads(health[1])
    compile(code, "HEALTHCHECK", "exec")
    assert "/health'" in code and "CODMD_PORT" in code
    settings = image_settings()
    assert {name for name in settings if name.startswith("CODMD_")} <= VARIABLES
    assert parse(json.loads(re.findall(r"^CMD (\[.+\])$", DOCKERFILE, re.M)[-1])).command == "serve"
    version = re.findall(r"torch==([\d.]+)", DOCKERFILE)
    assert len(set(version)) == 1 and f"torch=={version[0]}" in (DEPLOY.parent / "Makefile").read_text()


def test_the_image_refuses_to_serve_everybody_unless_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in image_settings().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(cli.ConfigError, match="refusing to listen on 0"):
        cli._config(parse(["serve"]))


def test_what_the_image_copies_is_not_ignored_and_exists() -> None:
    kept = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [word for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.M) for word in line.split()[:-1]]
    assert sorted(copied) == sorted(kept) and all((DEPLOY.parent / name).exists() for name in kept)


def test_the_unit_starts_a_command_that_exists_with_variables_that_exist() -> None:
    (start,) = re.findall(r"^ExecStart=(.+)$", UNIT, re.M)
    program, *words = shlex.split(start)
    assert Path(program).name == "codmd-serve" and parse(words).command == "serve"
    assert set(re.findall(r"\b(CODMD_\w+)=", UNIT)) <= VARIABLES
    stop_s = int(re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.M)[0])
    assert stop_s > parse(["serve"]).drain_timeout_s
    assert re.findall(r"^RestartPreventExitStatus=(\d+)$", UNIT, re.M) == ["2"]


def test_systemd_reads_the_unit_where_there_is_a_systemd(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    unit = tmp_path / "codmd-serve.service"
    unit.write_text(re.sub(r"/opt/codmd-serve/bin/codmd-serve", sys.executable, UNIT))
    command = [program or "true", *(["verify", str(unit)] if program else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
