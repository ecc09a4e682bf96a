"""MatrixOptimizer: which parameters Muon takes, what its update is, and that it trains in any memory format."""

import copy

import pytest
import torch
from torch import nn

from distill.pretrain.optimizer import MatrixOptimizer, orthogonalise


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 32)
        self.conv = nn.Conv3d(32, 16, 3)
        self.linear = nn.Linear(32, 4)


def test_muon_takes_matrices_and_convolutions_but_no_tables_biases_or_thin_layers() -> None:
    module = Mixed()
    optimizer = MatrixOptimizer(module, 1e-3)
    assert [id(p) for p in optimizer.matrices] == [id(module.conv.weight)]
    assert {id(p) for p in optimizer.others} == {
        id(p) for name, p in module.named_parameters() if name != "conv.weight"
    }
    assert MatrixOptimizer(module, 1e-3, use_muon=False).matrices == []


def test_muon_step_moves_the_parameter_by_an_orthogonal_matrix() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 32, bias=False)
    before = linear.weight.detach().clone()
    optimizer = MatrixOptimizer(nn.Sequential(linear), 1e-2)
    # A gradient of very unequal singular values: its update must have nearly equal ones.
    linear.weight.grad = torch.randn(32, 48) * torch.linspace(1.0, 0.1, 48)
    optimizer.step()
    moved = torch.linalg.svdvals(linear.weight.detach() - before)
    assert moved.min() > 0.4 * moved.max()
    assert moved.max() < 1e-2 * 0.2 * 48**0.5 * 1.5
    assert linear.weight.grad is None


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_a_step_trains_a_convolution_in_any_memory_format(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    conv = nn.Conv3d(32, 24, 3, bias=False)
    gradient = torch.randn(conv.weight.shape)
    moved = []
    for layout in (torch.contiguous_format, memory_format):
        other = nn.Conv3d(32, 24, 3, bias=False)
        other.load_state_dict(conv.state_dict())
        other.to(memory_format=layout)
        optimizer = MatrixOptimizer(other, 1e-2)
        other.weight.grad = gradient.to(memory_format=layout)
        optimizer.step()
        assert other.weight.is_contiguous(memory_format=layout)
        moved.append(other.weight.detach() - conv.weight.detach())
    assert moved[0].abs().max() > 1e-3
    torch.testing.assert_close(moved[1], moved[0])


def test_a_batched_update_equals_torchs_muon() -> None:
    torch.manual_seed(0)
    ours = nn.ModuleList([nn.Linear(48, 32, bias=False), nn.Linear(48, 32, bias=False), nn.Linear(32, 64, bias=False)])
    theirs = nn.ModuleList(
        [nn.Linear(48, 32, bias=False), nn.Linear(48, 32, bias=False), nn.Linear(32, 64, bias=False)]
    )
    theirs.load_state_dict(ours.state_dict())
    start = [parameter.detach().clone() for parameter in ours.parameters()]
    reference = torch.optim.Muon(
        theirs.parameters(), lr=1e-2, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    optimizer = MatrixOptimizer(ours, 1e-2)
    for _ in range(3):
        for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            own.grad = torch.randn_like(own)
            other.grad = own.grad.clone()
        optimizer.step()
        reference.step()
    for own, other, before in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        wanted = other.detach() - before
        # Both round to bfloat16 in each of 5 products, in another order.
        assert (own.detach() - other.detach()).norm() < 0.02 * wanted.norm()


def test_a_saved_optimizer_goes_on_as_if_it_had_not_stopped() -> None:
    def build() -> tuple[nn.Module, MatrixOptimizer]:
        torch.manual_seed(0)
        module = Mixed()
        return module, MatrixOptimizer(module, 1e-2)

    def step(module: nn.Module, optimizer: MatrixOptimizer, number: int) -> None:
        torch.manual_seed(number)
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.clip_gradients()
        optimizer.step()

    straight, optimizer = build()
    step(straight, optimizer, 1)
    weights, state = copy.deepcopy(straight.state_dict()), copy.deepcopy(optimizer.state_dict())
    resumed, other = build()
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    step(straight, optimizer, 2)
    step(resumed, other, 2)
    for own, wanted in zip(resumed.parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(own, wanted)


def test_orthogonalise_keeps_singular_vectors_of_wide_and_tall_matrices() -> None:
    torch.manual_seed(0)
    for shape in ((2, 20, 50), (2, 50, 20)):
        given = torch.randn(shape)
        found = orthogonalise(given)
        left, _, right = torch.linalg.svd(given, full_matrices=False)
        wanted = left @ right
        cosine = (found * wanted).sum((1, 2)) / found.norm(dim=(1, 2)) / wanted.norm(dim=(1, 2))
        assert (cosine > 0.97).all()
