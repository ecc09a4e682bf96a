"""A student as a low-rank update of its base: the closest of its rank, and a bundle again by `convert`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.wan.checkpoint import StudentSpec, load_bundle, read_spec, save_bundle
from codmd_serve.wan.convert import ConvertOptions, convert
from distill.cli import main
from distill.run import extract
from distill.run.extract import low_rank_update, write_low_rank

LAYER = "blocks.0.attn1.to_q"


def trained(base: Path, spec: StudentSpec, folder: Path, rank: int) -> Path:
    """Write a bundle each of whose linear layers differs from the base's by so many directions, sizes 2^-k."""
    transformer = WanTransformer3DModel.from_pretrained(base, subfolder="transformer")
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in transformer.modules():
            if isinstance(module, torch.nn.Linear):
                rows, columns = module.weight.shape
                left, right = (torch.linalg.qr(torch.randn(n, rank, generator=rng))[0] for n in (rows, columns))
                module.weight += left @ torch.diag(0.5 ** torch.arange(rank)) @ right.mT
    save_bundle(folder, transformer, replace(spec, base=str(base)))
    return folder


@pytest.fixture
def bundle(tiny_base: Path, tiny_spec: StudentSpec, tmp_path: Path) -> Path:
    return trained(tiny_base, tiny_spec, tmp_path / "student", 3)


def test_an_update_of_the_rank_of_the_change_is_the_change(bundle: Path, tmp_path: Path) -> None:
    update = low_rank_update(bundle, 3)
    assert update.kept == pytest.approx(1.0, abs=1e-4)
    write_low_rank(tmp_path / "adapter", bundle, update, 3, "fp32")
    spec = convert(tmp_path / "adapter", None, tmp_path / "again", ConvertOptions(), read_spec(bundle).package_version)
    own = read_spec(bundle)
    assert replace(spec.spec, base=own.base, base_model=own.base_model, preview_map=own.preview_map) == own
    first, second = (load_bundle(path).transformer.state_dict() for path in (bundle, tmp_path / "again"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [1024, 4])
def test_of_a_smaller_rank_it_keeps_the_largest_directions(
    bundle: Path, tiny_base: Path, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "MAX_WHOLE_SIDE", side)  # 4: by random directions, as for large layers
    update = low_rank_update(bundle, 2)
    # 1 and 1/4 of 1, 1/4 and 1/16.
    assert update.kept == pytest.approx((1 + 1 / 4) / (1 + 1 / 4 + 1 / 16), abs=1e-3)
    up, down = (update.tensors[f"transformer.{LAYER}.lora_{half}.weight"] for half in "BA")
    assert (up.shape[1], down.shape[0]) == (2, 2)
    weights = [
        load_file(next((folder / "transformer").glob("*.safetensors")))[f"{LAYER}.weight"]
        for folder in (bundle, tiny_base)
    ]
    change = weights[0] - weights[1]
    torch.testing.assert_close(torch.linalg.svdvals(change - up @ down)[0], torch.tensor(0.25), rtol=1e-3, atol=1e-3)


def test_a_layer_narrower_than_the_rank_is_kept_whole(bundle: Path) -> None:
    update = low_rank_update(bundle, 4096)
    assert update.kept == pytest.approx(1.0, abs=1e-5)


def test_the_command_says_how_large_it_is_and_what_it_keeps(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapter"
    assert main(["extract", "--bundle", str(bundle), "--rank", "3", "--out", str(out)]) == 0
    assert "MB, 100.0% of the squared change of all weights" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["pytorch_lora_weights.safetensors", "student.json"]
    stored = load_file(out / "pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


def test_what_has_no_update_is_refused(bundle: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--rank must be 1 or more, got 0"):
        low_rank_update(bundle, 0)
    with pytest.raises(CheckpointError, match="has the weights of its base"):
        low_rank_update(tiny_bundle, 4)
    with pytest.raises(CheckpointError, match="no student bundle at"):
        low_rank_update(tmp_path / "none", 4)


@pytest.mark.parametrize("kind", ["lacks", "other", "damaged", "nan"])
def test_a_bundle_that_does_not_fit_its_base_is_refused(bundle: Path, kind: str) -> None:
    file = next((bundle / "transformer").glob("*.safetensors"))
    weights = load_file(file)
    if kind == "lacks":
        del weights[f"{LAYER}.weight"]
        message = f"not of its base's layout: one of them alone has {LAYER}.weight"
    elif kind == "other":
        weights[f"{LAYER}.weight"] = weights[f"{LAYER}.weight"][:-1].clone()
        message = f"{LAYER}.weight of .* is \\(23, 24\\), of its base \\(24, 24\\)"
    elif kind == "nan":
        weights[f"{LAYER}.weight"][0, 0] = float("nan")
        message = f"{LAYER}.weight of .* is not finite"
    else:
        message = "cannot be read"
    save_file(weights, file)
    if kind == "damaged":
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=message):
        low_rank_update(bundle, 2)


def test_a_place_that_cannot_be_written_is_an_error(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    out.write_text("a file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_low_rank(out / "below", bundle, low_rank_update(bundle, 1), 1, "fp16")
    assert out.read_text() == "a file"
