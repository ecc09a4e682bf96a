"""Checkpoints of the tests: whole states in memory, and the single file that older versions wrote."""

import shutil
from pathlib import Path
from typing import Any

import torch

from distill.parallel.state import stage
from distill.run.checkpoint import STATE_FILE, load_checkpoint, save_checkpoint


def save(run_dir: Path, iteration: int, tensors: dict[str, torch.Tensor], /, keep_last: int = 9, **values: Any) -> Path:
    """Save a checkpoint of one process."""
    return save_checkpoint(run_dir, iteration, stage(tensors), values, keep_last)


def whole_state(folder: Path) -> dict[str, Any]:
    """Return all values and tensors of a checkpoint as nested dicts."""
    checkpoint = load_checkpoint(folder)
    values = {key: value for key, value in checkpoint.values.items() if key not in ("elapsed_s", "ema_updates")}
    state: dict[str, Any] = {
        **values,
        "ema": {"num_updates": checkpoint.values["ema_updates"], "shadow": {}},
        "networks": {},
        "optimizers": {},
    }
    for name in sorted(checkpoint.names()):
        kind, *rest = name.split("/")
        groups = ["shadow"] if kind == "ema" else rest[:-1]
        target = state.setdefault(kind, {})
        for group in groups:
            target = target.setdefault(group, {})
        target[rest[-1]] = checkpoint.read(name)
    return state


def as_single_file(folder: Path, iteration_key: str = "iteration") -> Path:
    """Rewrite a sharded checkpoint as the state.pt of older versions; return the file.

    Its optimizers are those of `torch.optim.AdamW.state_dict`: moments by the parameter's place in the network.
    """
    checkpoint, state = load_checkpoint(folder), whole_state(folder)
    order = [name.removeprefix("networks/student/") for name in stored_order(folder) if "networks/student/" in name]
    networks = {role: in_order(network, order) for role, network in state["networks"].items()}
    optimizers = {
        role: {
            "state": {
                place: {key: moments[name] for key, moments in state["optimizers"][role].items()}
                for place, name in enumerate(network)
                if role in state["optimizers"] and name in state["optimizers"][role]["step"]
            },
            "param_groups": [{"lr": 1e-3, "params": list(range(len(network)))}],
        }
        for role, network in networks.items()
    }
    own = {
        iteration_key: state["iteration"],
        "updates": state["updates"],
        "num_skipped": state["num_skipped"],
        "nonfinite_in_row": state["nonfinite_in_row"],
        "ema": state["ema"],
        "networks": networks,
        "optimizers": optimizers,
    }
    elapsed_s = checkpoint.values["elapsed_s"]
    shutil.rmtree(folder)
    folder.mkdir()
    torch.save({"trainer": own, "elapsed_s": elapsed_s}, folder / STATE_FILE)
    return folder / STATE_FILE


def stored_order(folder: Path) -> list[str]:
    """Return the names of a checkpoint's tensors in the order in which they were saved."""
    index = load_checkpoint(folder).index
    assert index is not None
    return list(index.tensors)


def in_order(network: dict[str, torch.Tensor], order: list[str]) -> dict[str, torch.Tensor]:
    return {name: network[name] for name in order if name in network} | network
