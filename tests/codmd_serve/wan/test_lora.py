"""Updates add what they say at the strength they say: every naming, every place that states it, every contradiction."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from codmd_serve.errors import CheckpointError
from codmd_serve.wan.lora import find_scales, merge_lora, read_lora
from codmd_serve.wan.names import original_name
from codmd_serve.wan.published import Published, read_published

RANK = 4
QUERY = "blocks.1.attn1.to_q"


def lora(weights: Mapping[str, Tensor]) -> Published:
    return Published(family="lora", naming="lora", weights=dict(weights), config={})


@pytest.fixture(scope="module")
def base(golden_base: Path) -> dict[str, Tensor]:
    """Weights of the base, by diffusers name."""
    return read_published(golden_base).weights


def updates(shapes: Mapping[str, torch.Size]) -> dict[str, tuple[Tensor, Tensor]]:
    """Random factors for every matrix of the blocks, by diffusers module."""
    rng = torch.Generator().manual_seed(2)
    return {
        name.removesuffix(".weight"): (
            torch.randn(RANK, shape[1], generator=rng),
            torch.randn(shape[0], RANK, generator=rng),
        )
        for name, shape in shapes.items()
        if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2
    }


def stored(factors: Mapping[str, tuple[Tensor, Tensor]], style: str, alpha: float | None) -> dict[str, Tensor]:
    """Name factors as LightX2V (prefixed or not), musubi or diffusers do."""
    state = {}
    for module, (down, up) in factors.items():
        name = original_name(f"{module}.weight").removesuffix(".weight")
        if style == "diffusers":
            state |= {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}
            continue
        prefixed = {
            "lightx2v": f"diffusion_model.{name}",
            "bare": name,
            "musubi": "lora_unet_" + name.replace(".", "_"),
        }[style]
        state |= {f"{prefixed}.lora_down.weight": down, f"{prefixed}.lora_up.weight": up}
        if alpha is not None:
            state[f"{prefixed}.alpha"] = torch.tensor(alpha)
    return state


@pytest.mark.parametrize(
    ("style", "alpha"), [("lightx2v", None), ("lightx2v", 2.0), ("bare", 8.0), ("musubi", 8.0), ("diffusers", None)]
)
def test_low_rank_updates_are_added(base: dict[str, Tensor], style: str, alpha: float | None) -> None:
    factors = updates({name: tensor.shape for name, tensor in base.items()})
    merged = merge_lora(lora(stored(factors, style, alpha)), base, "FILE")
    assert merged.keys() == base.keys()
    scale = 1.0 if alpha is None else alpha / RANK
    for name, tensor in base.items():
        down, up = factors.get(name.removesuffix(".weight"), (None, None)) if name.endswith(".weight") else (None, None)
        wanted = tensor if down is None or up is None else tensor + scale * (up @ down)
        # alpha goes into the factors before they are multiplied: float32 rounding of sums of RANK products
        torch.testing.assert_close(merged[name], wanted, rtol=1e-5, atol=1e-5, msg=name)


def test_whole_differences_are_added_where_diffusers_drops_them(base: dict[str, Tensor]) -> None:
    state = stored(updates({name: tensor.shape for name, tensor in base.items()}), "lightx2v", None)
    before = merge_lora(lora(state), base, "FILE")
    differences = {
        "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
        "blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
        "blocks.2.cross_attn.q.diff_b": "blocks.2.attn2.to_q.bias",
        "blocks.2.modulation.diff": "blocks.2.scale_shift_table",
        "patch_embedding.diff": "patch_embedding.weight",
        "head.head.diff": "proj_out.weight",
        "time_projection.1.diff_b": "condition_embedder.time_proj.bias",
    }
    for key, name in differences.items():
        state[f"diffusion_model.{key}"] = torch.full_like(base[name], 0.5)
    after = merge_lora(lora(state), base, "FILE")
    changed = {name for name in base if not torch.equal(before[name], after[name])}
    assert changed == set(differences.values())
    for name in changed:
        torch.testing.assert_close(after[name], before[name] + 0.5)


def test_merged_weights_keep_the_dtype_of_the_base(base: dict[str, Tensor]) -> None:
    half = {name: tensor.bfloat16() for name, tensor in base.items()}
    factors = updates({name: tensor.shape for name, tensor in base.items()})
    merged = merge_lora(lora(stored(factors, "diffusers", None)), half, "FILE")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"diffusion_model.blocks.0.self_attn.q.lora_up.weight": None},
            r"half of an update: blocks\.0\.attn1\.to_q has",
        ),
        (
            {"diffusion_model.blocks.0.self_attn.gate.lora_up.weight": torch.zeros(96, RANK)},
            "self_attn.gate', which the base does not have",
        ),
        ({"diffusion_model.blocks.0.self_attn.q.weight": torch.zeros(96, 96)}, "a whole tensor .modules_to_save"),
        ({"diffusion_model.blocks.0.self_attn.q.lora_up.other.weight": torch.zeros(96, 4)}, "adapter called 'other'"),
        ({"blocks.0.attn1.to_q.lora_A.weight": torch.zeros(RANK, 96)}, "two updates of blocks.0.attn1.to_q"),
        ({"diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(torch.nan)}, "alpha of .* that is no number: nan"),
        ({"diffusion_model.blocks.0.ffn.0.lora_up.weight": torch.full((192, RANK), torch.inf)}, "not finite"),
        (
            {"diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.zeros(RANK, 40)},
            r"attn1\.to_q\.weight is \(96, 96\), its update \(96, 40\); name the diffusers folder",
        ),
        (
            {"diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.zeros(RANK + 1, 96)},
            r"halves of blocks\.0\.attn1\.to_q that do not fit each other: \(5, 96\) and \(96, 4\)",
        ),
        ({"diffusion_model.blocks.0.self_attn.norm_q.diff": torch.zeros(7)}, r"norm_q\.weight is \(96,\), its update"),
        (
            {"diffusion_model.blocks.9.norm3.diff": torch.zeros(96)},
            r"blocks\.9\.norm3', which the base does not",
        ),
    ],
)
def test_updates_that_do_not_fit_are_refused(
    base: dict[str, Tensor], change: dict[str, Tensor | None], message: str
) -> None:
    factors = updates({name: tensor.shape for name, tensor in base.items()})
    state = {**stored(factors, "lightx2v", None), **change}
    with pytest.raises(CheckpointError, match=message):
        merge_lora(lora({name: tensor for name, tensor in state.items() if tensor is not None}), base, "FILE")


def test_updates_of_a_deeper_network_are_refused(base: dict[str, Tensor]) -> None:
    factors = updates({name: tensor.shape for name, tensor in base.items()})
    deeper = {re.sub(r"blocks\.2\.", "blocks.3.", module): pair for module, pair in factors.items()}
    with pytest.raises(CheckpointError, match=r"blocks\.3\..*, which the base does not have"):
        merge_lora(lora(stored(deeper, "lightx2v", None)), base, "FILE")


# where the strength stands

PEFT = {"r": RANK, "lora_alpha": 2, "peft_type": "LORA"}


def pair(module: str = "transformer." + QUERY, rank: int = RANK) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(3)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, 96, generator=rng),
        f"{module}.lora_B.weight": torch.randn(96, rank, generator=rng),
    }


def factor(path: Path, base: dict[str, Tensor], scale: float | None = None) -> float:
    """The factor that the one update of a file was added with."""
    published = read_published(path)
    merged = merge_lora(published, base, "FILE", scale)
    (changed,) = [name for name in base if not torch.equal(merged[name], base[name])]
    down, up = (tensor for name, tensor in sorted(published.weights.items()) if "lora" in name)
    whole, change = up @ down, merged[changed] - base[changed]
    torch.testing.assert_close(change, change.flatten()[0] / whole.flatten()[0] * whole, rtol=1e-2, atol=1e-4)
    return float((change * whole).sum() / (whole * whole).sum())


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})}, 0.5),
        ({"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 12})}, 3.0),
        ({"lora_adapter_metadata": json.dumps({**PEFT, "use_rslora": True})}, 1.0),
        ({"lora_adapter_metadata": json.dumps({**PEFT, "alpha_pattern": {"attn1.to_q": 6}})}, 1.5),
        ({"lora_adapter_metadata": json.dumps({**PEFT, "alpha_pattern": {"attn2.to_q": 6}})}, 0.5),
        ({"lora_adapter_metadata": json.dumps({**PEFT, "r": 8, "rank_pattern": {r"blocks\.\d+\.attn1.*": 4}})}, 0.5),
        ({"ss_network_alpha": "1.0", "ss_network_dim": "4", "ss_network_module": "networks.lora_wan"}, 0.25),
        ({"ss_network_alpha": "2", "ss_network_dim": "4", "ss_network_args": '{"rs_lora": "True"}'}, 1.0),
        ({"lora_alpha": "8", "rank": "4"}, 2.0),
        ({"format": "pt"}, 1.0),
        ({"ss_network_alpha": "None", "ss_network_dim": "Dynamic"}, 1.0),
    ],
)
def test_strength_of_the_header_is_used(
    base: dict[str, Tensor], tmp_path: Path, header: dict[str, str], expected: float
) -> None:
    save_file(pair(), tmp_path / "a.safetensors", metadata=header)
    assert factor(tmp_path / "a.safetensors", base) == pytest.approx(expected, rel=1e-4)
    assert factor(tmp_path / "a.safetensors", base, 0.75) == pytest.approx(0.75, rel=1e-4)


@pytest.mark.parametrize(("alpha", "rslora", "expected"), [(16, False, 4.0), (16, True, 8.0), (1, False, 0.25)])
def test_strength_of_adapter_config_is_used(
    base: dict[str, Tensor], tmp_path: Path, alpha: int, rslora: bool, expected: float
) -> None:
    save_file(pair("base_model.model.blocks.1.self_attn.q"), tmp_path / "adapter_model.safetensors")
    settings = {**PEFT, "lora_alpha": alpha, "use_rslora": rslora, "target_modules": ["q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    for source in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert factor(source, base) == pytest.approx(expected, rel=1e-4)


def test_strength_of_a_torch_file_is_used(base: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"lora_state_dict": pair(), "lora_config": {"r": 4, "lora_alpha": 2}}, tmp_path / "a.pt")
    assert factor(tmp_path / "a.pt", base) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        (
            {"transformer.blocks.1.attn1.to_q.alpha": torch.tensor(4.0)},
            {"lora_adapter_metadata": json.dumps(PEFT)},
            r"two things about the strength of blocks\.1\.attn1\.to_q: 1 by its alpha tensor, 0\.5 by lora_adapter_",
        ),
        (
            {"transformer.blocks.1.attn1.to_q.alpha": torch.tensor(4.0)},
            {"ss_network_alpha": "1", "ss_network_dim": "4"},
            r"1 by its alpha tensor, 0\.25 by ss_network_alpha of its header; say which with --lora-scale",
        ),
        (
            {},
            {"lora_adapter_metadata": json.dumps(PEFT), "ss_network_alpha": "4", "ss_network_dim": "4"},
            r"0\.5 by lora_adapter_metadata of its header, 1 by ss_network_alpha",
        ),
        (
            {},
            {"lora_adapter_metadata": json.dumps({**PEFT, "r": 8})},
            r"two things about the rank of blocks\.1\.attn1\.to_q: 4 by its tensors, 8 by",
        ),
    ],
)
def test_strengths_that_contradict_are_refused_until_the_user_says_which(
    base: dict[str, Tensor], tmp_path: Path, tensors: dict[str, Tensor], header: dict[str, str], message: str
) -> None:
    save_file({**pair(), **tensors}, tmp_path / "a.safetensors", metadata=header)
    with pytest.raises(CheckpointError, match=message):
        factor(tmp_path / "a.safetensors", base)
    assert factor(tmp_path / "a.safetensors", base, 1.5) == pytest.approx(1.5, rel=1e-4)


def test_two_statements_that_agree_are_one(base: dict[str, Tensor], tmp_path: Path) -> None:
    alpha = {"transformer.blocks.1.attn1.to_q.alpha": torch.tensor(2.0, dtype=torch.bfloat16)}
    header = {"lora_adapter_metadata": json.dumps(PEFT), "ss_network_alpha": "2.0", "ss_network_dim": "4"}
    save_file({**pair(), **alpha}, tmp_path / "a.safetensors", metadata=header)
    assert factor(tmp_path / "a.safetensors", base) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"lora_adapter_metadata": "{"}, "lora_adapter_metadata of its header cannot be read as JSON"),
        ({"lora_adapter_metadata": "[]"}, "must be an object"),
        ({"lora_adapter_metadata": json.dumps({**PEFT, "lora_alpha": "much"})}, "lora_alpha of .* must be a number"),
        ({"lora_adapter_metadata": json.dumps({**PEFT, "use_dora": True})}, "is a DoRA .*merge_and_unload"),
        ({"lora_adapter_metadata": json.dumps({**PEFT, "peft_type": "LOHA"})}, "'LOHA' adapter .*no LoRA"),
        ({"lora_adapter_metadata": json.dumps({**PEFT, "init_lora_weights": "pissa"})}, "changes the base too"),
        ({"lora_adapter_metadata": json.dumps({**PEFT, "alpha_pattern": [1]})}, "alpha_pattern .* must be an object"),
    ],
)
def test_headers_that_mean_another_update_are_refused(tmp_path: Path, header: dict[str, str], message: str) -> None:
    save_file(pair(), tmp_path / "a.safetensors", metadata=header)
    with pytest.raises(CheckpointError, match=message):
        read_published(tmp_path / "a.safetensors")


def test_what_nobody_states_is_known_to_be_assumed(base: dict[str, Tensor]) -> None:
    two = {**pair(), **pair("transformer.blocks.0.attn1.to_k"), f"transformer.{QUERY}.alpha": torch.tensor(2.0)}
    scales = find_scales(read_lora(lora(two), base, "FILE"), (), "FILE", None)
    assert scales.by_module == {QUERY: 0.5, "blocks.0.attn1.to_k": 1.0} and scales.is_assumed
    known = {name: tensor for name, tensor in two.items() if "to_k" not in name}
    assert not find_scales(read_lora(lora(known), base, "FILE"), (), "FILE", None).is_assumed


# files that have a part of the usual set


def some(names: str, style: str, alpha: float | None, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    factors = updates({name: tensor.shape for name, tensor in base.items()})
    return stored({name: pair for name, pair in factors.items() if re.search(names, name)}, style, alpha)


@pytest.mark.parametrize(
    ("names", "style", "alpha"),
    [
        (r"attn[12]\.to_q", "musubi", 2.0),
        (r"attn1", "musubi", None),
        (r"ffn", "musubi", 2.0),
        (r"blocks\.2\.attn2\.to_out", "lightx2v", 8.0),
        (r"blocks\.[02]\.", "lightx2v", None),
    ],
)
def test_updates_of_some_modules_are_added(
    base: dict[str, Tensor], names: str, style: str, alpha: float | None
) -> None:
    factors = {name: pair for name, pair in updates(shapes_of(base)).items() if re.search(names, name)}
    merged = merge_lora(lora(some(names, style, alpha, base)), base, "FILE")
    scale = 1.0 if alpha is None else alpha / RANK
    for name, tensor in base.items():
        found = factors.get(name.removesuffix(".weight"))
        wanted = tensor if found is None else tensor + scale * (found[1] @ found[0])
        torch.testing.assert_close(merged[name], wanted, rtol=1e-5, atol=1e-5, msg=name)


def shapes_of(base: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in base.items()}


@pytest.mark.parametrize("style", ["lora_unet_{}", "diffusion_model.{}"])
def test_embeddings_and_head_take_alpha(base: dict[str, Tensor], style: str) -> None:
    targets = {
        "patch_embedding": "patch_embedding.weight",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1.weight",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2.weight",
        "time_projection.1": "condition_embedder.time_proj.weight",
        "head.head": "proj_out.weight",
    }
    rng = torch.Generator().manual_seed(5)
    state, wanted = {}, dict(base)
    for module, name in targets.items():
        key = style.format(module.replace(".", "_") if style.startswith("lora_unet") else module)
        rows, *columns = base[name].shape
        down, up = torch.randn(2, *columns, generator=rng), torch.randn(rows, 2, generator=rng)
        shaped = up[:, :, None, None, None] if len(columns) > 1 else up
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": shaped, f"{key}.alpha": torch.tensor(1.0)}
        wanted[name] = base[name] + 0.5 * (up @ down.flatten(1)).reshape(base[name].shape)
    merged = merge_lora(lora(state), base, "FILE")
    for name, tensor in wanted.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "prefix",
    ["", "model.", "model.diffusion_model.", "generator.", "diffusion_model.", "pipe.dit.", "module.", "net_ema."],
)
def test_prefixes_are_taken_off(base: dict[str, Tensor], tmp_path: Path, prefix: str) -> None:
    for module in ("blocks.1.self_attn.q", QUERY):
        save_file(pair(prefix + module), tmp_path / "a.safetensors")
        assert factor(tmp_path / "a.safetensors", base) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("container", ["state_dict", "model", "lora"])
def test_containers_of_updates_are_opened(base: dict[str, Tensor], tmp_path: Path, container: str) -> None:
    torch.save({container: pair("generator." + QUERY), "epoch": 3}, tmp_path / "a.pt")
    assert factor(tmp_path / "a.pt", base) == pytest.approx(1.0, rel=1e-4)


def test_a_file_of_differences_alone_is_read(base: dict[str, Tensor], tmp_path: Path) -> None:
    keys = {"blocks.0.norm3.diff": "blocks.0.norm2.weight", "head.head.diff_b": "proj_out.bias"}
    state = {f"diffusion_model.{key}": torch.full_like(base[name], 0.25) for key, name in keys.items()}
    save_file(state, tmp_path / "a.safetensors")
    merged = merge_lora(read_published(tmp_path / "a.safetensors"), base, "FILE")
    for name, tensor in base.items():
        torch.testing.assert_close(merged[name], tensor + 0.25 * (name in keys.values()), msg=name)


def test_a_bias_of_an_update_is_scaled_with_it(base: dict[str, Tensor]) -> None:
    state = {
        **pair(),
        f"transformer.{QUERY}.lora_B.bias": torch.ones(96),
        f"transformer.{QUERY}.alpha": torch.tensor(2.0),
    }
    merged = merge_lora(lora(state), base, "FILE")
    torch.testing.assert_close(merged[f"{QUERY}.bias"], base[f"{QUERY}.bias"] + 0.5)


def test_updates_of_two_networks_are_refused_until_one_is_named(base: dict[str, Tensor], tmp_path: Path) -> None:
    both = {**pair("lora_unet_blocks_1_self_attn_q"), **pair("lora_te_encoder_block_0_q")}
    save_file(both, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 2 networks: .*; say which with --key"):
        read_published(tmp_path / "a.safetensors")
