"""Latents whose channels are uncorrelated and of variance one, by a change of basis folded into the VAE's 1x1 layers.

A VAE spreads its latents as it likes: in ShapeWorld's, the first two principal channels hold 56 % of the variance and
the last eight, which decide between a circle and a square, 12 %. Flow matching weighs all variance alike, so it learns
colours first and shapes last. White channels weigh alike what the decoder needs alike; its pictures stay the same.

Legend: P clips, C channels, F latent frames, H and W latent rows and columns.
"""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor

FIT_BATCH = 1024


@dataclass(frozen=True, slots=True)
class Whitening:
    """white = matrix @ (raw - mean), per position; matrix (C, C) and mean (C,) float32 on the CPU."""

    matrix: Tensor
    mean: Tensor

    def apply(self, raw_PCFHW: Tensor) -> Tensor:
        """Whiten latents (P, C, F, H, W)."""
        device = raw_PCFHW.device
        centred = raw_PCFHW.float() - self.mean.to(device)[:, None, None, None]
        return torch.einsum("ij,pjfhw->pifhw", self.matrix.to(device), centred)


def fit_whitening(raw_PCFHW: Tensor) -> Whitening:
    """Whitening by principal components, of channels over all clips and positions.

    Args:
        raw_PCFHW: (P, C, F, H, W) latents as the VAE gives them, any floating dtype.
    """
    channels, device = raw_PCFHW.shape[1], raw_PCFHW.device
    total = torch.zeros(channels, dtype=torch.float64, device=device)
    products = torch.zeros(channels, channels, dtype=torch.float64, device=device)
    # In parts: as float64 at once, 40,000 clips would be 5 GB.
    for start in range(0, len(raw_PCFHW), FIT_BATCH):
        part = raw_PCFHW[start : start + FIT_BATCH]
        rows = part.movedim(1, -1).flatten(0, -2).double()
        total += rows.sum(0)
        products += rows.T @ rows
    count = raw_PCFHW[:, 0].numel()
    mean = total / count
    covariance = (products / count - torch.outer(mean, mean)).cpu()
    variances, directions = torch.linalg.eigh(covariance)
    # Largest first, and of a fixed sign: an eigenvector's own sign is arbitrary and differs between machines.
    directions = directions.flip(1)
    directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    matrix = variances.flip(0).clamp(min=1e-12).rsqrt()[:, None] * directions.T
    return Whitening(matrix.float(), mean.float().cpu())


@torch.no_grad()
def fold_into_vae(vae: AutoencoderKLWan, whitening: Whitening) -> None:
    """Let `vae` encode to and decode from white latents, in place; its reconstructions stay the same.

    The posterior's mean is transformed exactly. Its variance, no longer diagonal, becomes the constant that the old one
    has at the bias of the layer: nothing here samples from it.
    """
    channels = vae.config.z_dim
    matrix = whitening.matrix.to(vae.device)
    mean = whitening.mean.to(vae.device)
    quant, post = vae.quant_conv, vae.post_quant_conv
    old_variance = quant.bias[channels:].exp()
    weight = quant.weight[:channels].flatten(1)
    quant.weight[:channels] = (matrix @ weight).reshape(quant.weight[:channels].shape)
    quant.bias[:channels] = matrix @ (quant.bias[:channels] - mean)
    quant.weight[channels:] = 0.0
    quant.bias[channels:] = (matrix.square() @ old_variance).log()
    weight = post.weight.flatten(1)
    post.bias += weight @ mean
    post.weight.copy_((weight @ torch.linalg.inv(matrix.double()).float()).reshape(post.weight.shape))


@torch.no_grad()
def fold_into_transformer(transformer: WanTransformer3DModel, matrix: Tensor) -> None:
    """Let `transformer` read and predict latents in another basis, in place: flow'(matrix @ x) = matrix @ flow(x).

    Args:
        transformer: trained on other latents.
        matrix: (C, C), from its latents to the new ones, both normalised.
    """
    inverse = torch.linalg.inv(matrix.double())
    embed = transformer.patch_embedding.weight
    embed.copy_(torch.einsum("dcxyz,cn->dnxyz", embed.double(), inverse).to(embed.dtype))
    out = transformer.proj_out
    for parameter in (out.weight, out.bias):
        # Rows of the output projection run over (position in the patch, channel).
        split = parameter.double().unflatten(0, (-1, len(matrix)))
        parameter.copy_(torch.einsum("ij,pj...->pi...", matrix.double(), split).flatten(0, 1).to(parameter.dtype))
