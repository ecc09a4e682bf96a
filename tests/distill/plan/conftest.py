"""A small Wan transformer whose activations outweigh its weights, built as the trainer builds its networks."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from codmd_serve.wan.attention import use_compact_cross_attention
from distill.networks.precision import keep_sensitive_parts_float32
from distill.plan.architecture import Architecture, read_architecture
from distill.plan.flops import Sequence

SAMPLES = 2
LATENTS = (8, 3, 16, 16)  # (C, F, H, W): 192 tokens
PROMPT_TOKENS = 16


@pytest.fixture(scope="session")
def network_config() -> dict[str, Any]:
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 4,
        "attention_head_dim": 12,
        "in_channels": 8,
        "out_channels": 8,
        "text_dim": 20,
        "freq_dim": 16,
        "ffn_dim": 112,
        "num_layers": 3,
    }


@pytest.fixture(scope="session")
def architecture(network_config: dict[str, Any]) -> Architecture:
    return read_architecture(network_config)


def new_network(network_config: dict[str, Any], residual: str = "fp32") -> WanTransformer3DModel:
    torch.manual_seed(0)
    transformer = use_compact_cross_attention(WanTransformer3DModel(**network_config))
    keep_sensitive_parts_float32(transformer, residual)
    return transformer.eval()


@pytest.fixture(scope="session")
def build_network() -> Callable[..., WanTransformer3DModel]:
    return new_network


@pytest.fixture
def network(network_config: dict[str, Any]) -> WanTransformer3DModel:
    return new_network(network_config)


@pytest.fixture(scope="session")
def sequence() -> Sequence:
    return Sequence(tokens=192, context_tokens=192, prompt_tokens=PROMPT_TOKENS)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, timesteps and prompt embeddings of SAMPLES samples."""
    rng = torch.Generator().manual_seed(1)
    latents = torch.randn(SAMPLES, *LATENTS, generator=rng)
    return latents, torch.tensor([900.0, 300.0]), torch.randn(SAMPLES, PROMPT_TOKENS, 20, generator=rng)


class LiveBytes(TorchDispatchMode):
    """Bytes of all distinct storages that operators gave out while it was on and that are still alive.

    Storages of `known` tensors are not counted. Storages that are resized, as FSDP2 does, count with their new size.
    """

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.current = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.sizes: dict[int, int] = {}
        self.resize = torch.UntypedStorage.resize_

    def __enter__(self) -> "LiveBytes":
        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            self.resize(storage, size)
            self._see(storage)
            return storage

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        torch.UntypedStorage.resize_ = self.resize  # type: ignore[method-assign]
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once."""
        self._see(tensor.untyped_storage())

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        if key not in self.sizes:
            self.sizes[key] = 0
            weakref.finalize(storage, self._remove, key)
        self.current += storage.nbytes() - self.sizes[key]
        self.sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.current)

    def _remove(self, key: int) -> None:
        self.current -= self.sizes.pop(key)


@pytest.fixture(scope="session")
def live_bytes() -> type[LiveBytes]:
    return LiveBytes
