"""The counted evaluations against those that the methods say they make."""

import pytest
import torch
from torch import nn

from distill.config import DistillConfig, with_overrides
from distill.data.prompts import prompts_in_memory
from distill.methods.registry import METHODS
from distill.networks.base import open_base
from distill.networks.build import build_networks
from distill.run.calls import Calls
from distill.run.trainer import Trainer

CPU = torch.device("cpu")


@pytest.mark.parametrize("lora_critic_rank", [0, 2])
def test_counts_are_those_of_the_methods_passes(tiny_config: DistillConfig, lora_critic_rank: int) -> None:
    """Also with a LoRA critic, whose calls go through the teacher's own module."""
    config = with_overrides(tiny_config, [f"lora_critic_rank={lora_critic_rank}", "guidance_scale=2"])
    base = open_base(config.base)
    networks = build_networks(config, base, CPU)
    width = int(base.transformer_entry("text_dim"))
    data = prompts_in_memory(torch.ones(3, width), torch.tensor([0, 1, 2, 3]))
    trainer = Trainer(config, networks, data, base.latent_shape(config.native), CPU)
    for _ in range(4):
        trainer.iterate()
    passes = METHODS[config.method].passes(config)
    student_turns, critic_turns, size = 2, 4, config.batch_size
    assert trainer.updates == {"student": student_turns, "critic": critic_turns}
    # Guided: two samples a call.
    assert trainer.calls.counts["teacher"] == 2 * size * student_turns * passes["student"].teacher
    trained = critic_turns * passes["critic"].trained
    assert trainer.calls.counts["critic"] == size * (student_turns * passes["student"].critic + trained)
    assert trainer.calls.counts["student"] >= size * (student_turns + critic_turns)
    before = dict(trainer.calls.counts)
    assert trainer.state_values()["calls"] == before
    batch = data.batch([0], CPU)
    networks.teacher(torch.zeros(1, *trainer.shape[1:]), torch.ones(1), batch.prompt_embeds, return_dict=False)
    assert trainer.calls.counts == before, "previews and validation are no part of the training"


def test_an_older_checkpoint_without_counts_starts_at_zero(tiny_config: DistillConfig) -> None:
    networks = build_networks(tiny_config, open_base(tiny_config.base), CPU)
    assert isinstance(networks.student, nn.Module)
    calls = Calls(networks)
    calls.restore({})
    assert set(calls.counts.values()) == {0}
    calls.restore({"teacher": 7})
    assert calls.counts["teacher"] == 7
