"""Reads adapter scales from the metadata beside a file's tensors, as PEFT and kohya write them.

Knows dictionaries only, neither files nor tensors.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from codmd_serve.errors import CheckpointError
from codmd_serve.textfiles import parse_json, shown

# Names of an update's tensors: MODULE.lora_A.default.weight, MODULE.lora_up.weight, MODULE.alpha, MODULE.diff_b.
LORA_KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|alpha|lora_alpha|rank|lora_rank"
    r"|diff|diff_b)(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
ADAPTER_CONFIG = "adapter_config.json"
_HEADER_KEY = "lora_adapter_metadata"
_TRANSFORMER = "transformer."


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """The scale of an update as one piece of metadata states it: alpha / rank, or alpha / sqrt(rank).

    Attributes:
        where: the place, in words.
        alpha, rank: of all modules; None when it does not say.
        alpha_pattern, rank_pattern: of modules whose names match.
        is_rank_stabilised: the square root of the rank divides.
        is_exact: it describes every module; a training log's value is a default that modules may depart from.
        varies: alpha tensors of modules may differ from it by intention.
    """

    where: str
    alpha: float | None = None
    rank: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    is_rank_stabilised: bool = False
    is_exact: bool = True
    varies: bool = False


def header_statements(header: Mapping[str, str], source: str) -> list[Statement]:
    """Read what a safetensors header says about an adapter.

    Args:
        header: its `__metadata__`: diffusers keeps PEFT's settings as JSON under lora_adapter_metadata, with a prefix
            for each network; kohya and musubi keep ss_network_alpha and ss_network_dim; others lora_alpha and rank.
        source: what messages call the file.

    Raises:
        CheckpointError: settings that are not JSON or no numbers, or an adapter that is no plain LoRA.
    """
    found = []
    if _HEADER_KEY in header:
        where = f"{_HEADER_KEY} of its header"
        data = parse_json(header[_HEADER_KEY], f"{source}: {where}", CheckpointError)
        if not isinstance(data, Mapping):
            raise CheckpointError(f"{source}: {where} must be an object, got {shown(data)}")
        own = {key.removeprefix(_TRANSFORMER): value for key, value in data.items() if key.startswith(_TRANSFORMER)}
        found.append(statement_of(where, own or data, source))
    plain = {key: value for key, value in header.items() if key in ("lora_alpha", "alpha", "r", "rank", "lora_rank")}
    if {"lora_alpha", "alpha"} & plain.keys():
        plain["use_rslora"] = str(header.get("use_rslora", "")).lower() in ("true", "1")  # type: ignore[assignment]
        found.append(statement_of("its header", plain, source))
    kohya = {name: _float_or_none(header.get(f"ss_network_{name}")) for name in ("alpha", "dim")}
    arguments = str(header.get("ss_network_args", ""))
    if kohya["alpha"] is not None:
        found.append(
            Statement(
                where="ss_network_alpha of its header",
                alpha=kohya["alpha"],
                rank=kohya["dim"],
                is_rank_stabilised=re.search(r"rs_?lora\W+true", arguments, re.IGNORECASE) is not None,
                is_exact=False,
                varies="alphas" in arguments,
            )
        )
    return [statement for statement in found if statement is not None]


def _float_or_none(text: str | None) -> float | None:
    # "None" and "Dynamic" are what kohya writes where there is no single number.
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def statement_of(where: str, data: Mapping[str, Any], source: str) -> Statement | None:
    """Read an adapter's settings in PEFT's words, as adapter_config.json and safetensors headers hold them.

    Returns:
        What they say about its strength; None when that is nothing.

    Raises:
        CheckpointError: an update that is not base + scale * up @ down, or numbers that are none.
    """
    _refuse_other_updates(where, data, source)
    alpha, rank = (
        _stated_number(data, names, where, source) for names in (("lora_alpha", "alpha"), ("r", "rank", "lora_rank"))
    )
    patterns: dict[str, dict[str, float]] = {}
    for name in ("alpha_pattern", "rank_pattern"):
        entries = data.get(name) or {}
        if not isinstance(entries, Mapping):
            raise CheckpointError(f"{source}: {name} of {where} must be an object, got {shown(entries)}")
        patterns[name] = {str(key): _stated_number(entries, (key,), where, source) or 0.0 for key in entries}
    if alpha is None and not patterns["alpha_pattern"]:
        return None
    return Statement(
        where=where,
        alpha=alpha,
        rank=rank,
        alpha_pattern=patterns["alpha_pattern"],
        rank_pattern=patterns["rank_pattern"],
        is_rank_stabilised=bool(data.get("use_rslora")),
    )


def _refuse_other_updates(where: str, data: Mapping[str, Any], source: str) -> None:
    kind = data.get("peft_type")
    if kind is not None and str(kind).rpartition(".")[2].upper() != "LORA":
        raise CheckpointError(
            f"{source} is a {shown(kind)} adapter ({where}), no LoRA: merge it with the tool that made it, then "
            "convert the result"
        )
    if data.get("use_dora"):
        raise CheckpointError(
            f"{source} is a DoRA ({where}: use_dora), whose magnitudes make it another update than up @ down: merge it "
            "with `merge_and_unload` of PEFT, then convert the result"
        )
    start = str(data.get("init_lora_weights", "")).lower()
    if start.startswith(("pissa", "olora", "corda", "loftq")):
        raise CheckpointError(
            f"{source} starts from {start} ({where}), which changes the base too: save it with PEFT's "
            "`path_initial_model_for_weight_conversion`, or merge it there, then convert the result"
        )


def _stated_number(data: Mapping[str, Any], names: tuple[str, ...], where: str, source: str) -> float | None:
    name = next((name for name in names if data.get(name) is not None), None)
    if name is None:
        return None
    try:
        value = float(data[name])
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise CheckpointError(f"{source}: {name} of {where} must be a number, got {shown(data[name])}")
    return value
