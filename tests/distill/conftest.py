"""Fixtures of the distiller's tests: tiny Wan modules with random weights."""

import pytest
import torch
from diffusers import WanTransformer3DModel


def build_tiny_transformer(seed: int = 0, num_layers: int = 2) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=48,
        num_layers=num_layers,
    )
    # The default initialisation leaves biases at zero, which would make a zero prompt row a zero value.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def tiny_transformer() -> WanTransformer3DModel:
    return build_tiny_transformer()
