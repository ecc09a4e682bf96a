"""Counts how many samples each network was evaluated on, so that runs of two methods can be compared at equal cost."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import nn

from distill.networks.build import Networks

NETWORKS = ("student", "critic", "teacher")


class Calls:
    """Forward evaluations inside the `with` blocks of this object, on this rank.

    A guided evaluation of the teacher counts twice, for it is a call with two samples; what activation checkpointing
    computes again does not count.

    Attributes:
        counts: samples by network.
    """

    def __init__(self, networks: Networks) -> None:
        self.counts = dict.fromkeys(NETWORKS, 0)
        self.is_counting = False
        self.teacher = networks.teacher
        for role in NETWORKS:
            getattr(networks, role).register_forward_pre_hook(self._hook(role), with_kwargs=True)

    def _hook(self, role: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            if not self.is_counting:
                return
            num_samples = len(args[0] if args else options["hidden_states"])
            self.counts[role] += num_samples
            if getattr(module, "base", None) is self.teacher:
                # Adapters on the teacher: the hook of the teacher, which runs next, must count nothing.
                self.counts["teacher"] -= num_samples

        return note

    def restore(self, counts: Mapping[str, int]) -> None:
        """Go on from the counts of a checkpoint; one of an older version has none."""
        self.counts |= {role: int(counts.get(role, 0)) for role in NETWORKS}

    def __enter__(self) -> None:
        self.is_counting = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.is_counting = False
