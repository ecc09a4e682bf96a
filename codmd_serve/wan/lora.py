"""Low-rank updates of Wan networks: reads every naming, finds their scale, and merges them into weights.

Knows neither files nor bundles. diffusers' own loader is not used: it needs alpha in all modules or none, drops
differences of norms, and reads no strength that stands beside the tensors.

Legend: a module is what has a `weight`, by diffusers name; an update is scale * up @ down, where scale is alpha / rank
or what stands in its place.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from codmd_serve.errors import CheckpointError
from codmd_serve.textfiles import shown
from codmd_serve.wan.names import original_name
from codmd_serve.wan.published import Published, plain_name
from codmd_serve.wan.statements import LORA_KEY, Statement

DISAGREEMENT = 1e-3  # relative; alpha is often stored in half precision
_ADAPTER = "default"


@dataclass(slots=True)
class Update:
    """The tensors of a file for one module."""

    down: Tensor | None = None
    up: Tensor | None = None
    bias: Tensor | None = None
    alpha: float | None = None
    stored_as: str = ""

    @property
    def rank(self) -> int:
        """Return the rank: columns of up, rows of down."""
        return 0 if self.down is None else self.down.shape[0]


@dataclass(slots=True)
class Lora:
    """The low-rank updates of a file by module, and its full differences by parameter."""

    updates: dict[str, Update] = field(default_factory=dict)
    differences: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scales:
    """The factor of each module's update.

    Attributes:
        by_module: the factors.
        stated: where they come from, in words.
        is_assumed: nothing states the factor of some module, so it was taken as 1.
    """

    by_module: Mapping[str, float]
    stated: str
    is_assumed: bool


def merge_lora(
    published: Published, base: Mapping[str, Tensor], source: str, scale: float | None = None
) -> dict[str, Tensor]:
    """Merge a low-rank update into the weights it was made for; refuse a tensor that matches no parameter.

    Args:
        published: of naming lora.
        base: weights by diffusers name, any floating dtype.
        source: what messages call the file.
        scale: factor of all updates; None is what the file states, or 1.

    Returns:
        base + scale * up @ down (+ differences), summed in float32, then in the dtypes of `base`.

    Raises:
        CheckpointError: unknown names, shapes that are not those of the base, or strengths that contradict each other.

    Source: LoRA (arXiv 2106.09685), section 4.1; rank-stabilised scaling (arXiv 2312.03732); PEFT's names.
    """
    lora = read_lora(published, base, source)
    return add_lora(lora, find_scales(lora, published.statements, source, scale), base, source)


def read_lora(published: Published, base: Iterable[str], source: str) -> Lora:
    """Sort the tensors of a file by module.

    Raises:
        CheckpointError: a name that no parameter of the base has in any naming, half of an update, or one given twice.
    """
    table = _module_table(base)
    lora = Lora()
    for key, tensor in published.weights.items():
        match = LORA_KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(
                f"{source} holds {shown(key)} beside its updates, a whole tensor (modules_to_save, for example): merge "
                "it with the tool that made it, as `merge_and_unload` of PEFT does, then convert the result"
            )
        if match["adapter"] not in (None, _ADAPTER, "weight"):
            raise CheckpointError(
                f"{source} holds an adapter called {shown(match['adapter'])}: save one adapter alone, named default"
            )
        parameter = table.get(plain_name(match["module"])[1])
        if parameter is None:
            raise CheckpointError(
                f"{source} updates {shown(match['module'])}, which the base does not have: is it of another model?"
            )
        _store_tensor(lora, parameter, match, tensor, source)
    _check_halves(lora, source)
    return lora


def find_scales(lora: Lora, statements: Iterable[Statement], source: str, given: float | None) -> Scales:
    """Return the scale of each update: the user's, else the file's, else 1.

    Raises:
        CheckpointError: two statements that differ, or that do not fit the tensors.
    """
    if given is not None:
        return Scales(by_module=dict.fromkeys(lora.updates, given), stated="--lora-scale", is_assumed=False)
    statements = list(statements)
    by_module, sources, is_assumed = {}, set(), False
    for module, update in lora.updates.items():
        found: list[tuple[str, float]] = []
        if update.alpha is not None:
            found.append(("its alpha tensor", update.alpha / update.rank))
        for statement in statements:
            stated = _stated_scale(statement, module, update, source, has_alpha=update.alpha is not None)
            if stated is not None:
                found.append((statement.where, stated))
        for where, value in found[1:]:
            if not math.isclose(value, found[0][1], rel_tol=DISAGREEMENT):
                raise CheckpointError(
                    f"{source} says two things about the strength of {module}: {found[0][1]:.6g} by {found[0][0]}, "
                    f"{value:.6g} by {where}; say which with --lora-scale"
                )
        by_module[module] = found[0][1] if found else 1.0
        sources |= {where for where, _ in found}
        is_assumed = is_assumed or not found
    return Scales(by_module=by_module, stated=", ".join(sorted(sources)), is_assumed=is_assumed)


def add_lora(lora: Lora, scales: Scales, base: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the base with all updates and differences added, as `merge_lora` describes."""
    merged = dict(base)
    for module, update in lora.updates.items():
        assert update.up is not None and update.down is not None
        # Convolutions are products too: of (out, rank, 1, 1, 1) and (rank, in, frames, rows, columns).
        change = scales.by_module[module] * (update.up.float().flatten(1) @ update.down.float().flatten(1))
        is_kernel = update.down.ndim > 2
        shape = (update.up.shape[0], *update.down.shape[1:]) if is_kernel else change.shape
        _add(merged, f"{module}.weight", change.reshape(shape), source)
        if update.bias is not None:
            _add(merged, f"{module}.bias", scales.by_module[module] * update.bias.float(), source)
    for name, change in lora.differences.items():
        _add(merged, name, change, source)
    return merged


def _module_table(parameters: Iterable[str]) -> dict[str, str]:
    """Map every spelling of a module to its diffusers name: dotted or underscored, diffusers' or the original word."""
    table = {}
    for name in parameters:
        for spelling in (name, original_name(name)):
            module = re.sub(r"\.(weight|bias)$", "", spelling)
            table[module] = table[module.replace(".", "_")] = re.sub(r"\.(weight|bias)$", "", name)
    return table


def _store_tensor(lora: Lora, module: str, match: re.Match[str], tensor: Tensor, source: str) -> None:
    part, leaf = match["part"], match["leaf"]
    if part in ("diff", "diff_b"):
        name = f"{module}.bias" if part == "diff_b" else f"{module}.weight"
        # A table such as scale_shift_table is a parameter of its own, without a leaf.
        lora.differences[module if module.endswith("scale_shift_table") else name] = tensor
        return
    update = lora.updates.setdefault(module, Update(stored_as=match["module"]))
    if part in ("alpha", "lora_alpha"):
        if tensor.numel() != 1 or not math.isfinite(tensor.item()):
            raise CheckpointError(f"{source} has an alpha of {module} that is no number: {shown(tensor.tolist())}")
        update.alpha = float(tensor.item())
        return
    if part in ("rank", "lora_rank"):
        return
    half = "down" if part in ("lora_A", "lora_down", "lora.down") else "up"
    if leaf == "bias":
        if half == "down":
            raise CheckpointError(f"{source} has a bias on lora_A of {module}: PEFT makes none there")
        update.bias = tensor
    elif getattr(update, half) is not None:
        raise CheckpointError(
            f"{source} holds two updates of {module}, as {match['module']} and {update.stored_as}: convert one at a "
            "time, each on the result of the one before"
        )
    else:
        setattr(update, half, tensor)


def _check_halves(lora: Lora, source: str) -> None:
    for module, update in lora.updates.items():
        if update.down is None or update.up is None:
            has = "down" if update.down is not None else "up" if update.up is not None else "alpha"
            raise CheckpointError(f"{source} has half of an update: {module} has {has} alone; fetch it again")
        down, up = update.down, update.up
        if down.ndim < 2 or up.ndim < 2 or math.prod(up.shape[1:]) != down.shape[0] or not update.rank:
            raise CheckpointError(
                f"{source} has halves of {module} that do not fit each other: {tuple(down.shape)} and "
                f"{tuple(up.shape)}; fetch it again"
            )


def _stated_scale(statement: Statement, module: str, update: Update, source: str, *, has_alpha: bool) -> float | None:
    """Return the scale that a statement beside the tensors gives a module; None when it gives none."""
    alpha, rank = statement.alpha, statement.rank
    for pattern, value in statement.alpha_pattern.items():
        alpha = value if _matches(pattern, module, update) else alpha
    for pattern, value in statement.rank_pattern.items():
        rank = value if _matches(pattern, module, update) else rank
    if rank is not None and rank != update.rank:
        # A trainer's note about the whole file; the tensors of a module are closer to it.
        if not statement.is_exact:
            return None
        raise CheckpointError(
            f"{source} says two things about the rank of {module}: {update.rank} by its tensors, {rank:g} by "
            f"{statement.where}; say the strength with --lora-scale"
        )
    if alpha is None or (has_alpha and statement.varies):
        return None
    return float(alpha / (math.sqrt(update.rank) if statement.is_rank_stabilised else update.rank))


def _matches(pattern: str, module: str, update: Update) -> bool:
    # As PEFT: a pattern is the end of a module's name, or a regular expression for it.
    for name in (module, update.stored_as):
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", name):
                return True
        except re.error:
            if name.endswith(pattern):
                return True
    return False


def _add(weights: dict[str, Tensor], name: str, change: Tensor, source: str) -> None:
    old = weights.get(name)
    if old is None:
        raise CheckpointError(f"{source} updates {name}, which the base does not have: is it of another model?")
    # rCM's patch embedding is a linear layer; its numbers come in the order of the kernel.
    if name == "patch_embedding.weight" and change.ndim == 2 and change.numel() == old.numel():
        change = change.reshape(old.shape)
    if change.shape != old.shape:
        raise CheckpointError(
            f"{source} does not fit its base: {name} is {tuple(old.shape)}, its update {tuple(change.shape)}; "
            "name the diffusers folder of the model it was made for with --base"
        )
    if not bool(change.isfinite().all()):
        raise CheckpointError(f"{source} holds values that are not finite, in the update of {name}: it is of no use")
    weights[name] = (old.float() + change.float()).to(old.dtype)
