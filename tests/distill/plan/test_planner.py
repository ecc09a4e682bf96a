"""Plans of the published recipes: the 14B fits 8 x 80 GB, the authors' layout of it does not, and why."""

import dataclasses
import json
from pathlib import Path

import pytest

from codmd_serve.errors import ConfigError
from distill.cli import main
from distill.config import with_overrides
from distill.methods.registry import METHODS, recipe_config
from distill.plan.architecture import PUBLISHED, Subject, count_parameters, read_subject
from distill.plan.memory import PHASES
from distill.plan.options import GIB, PlanOptions, divisors
from distill.plan.planner import make_plan, smallest, suggest
from distill.plan.reference import ReferenceLayout, reference_layout
from distill.plan.report import PlanReport, plan_json, plan_notes, plan_text

EIGHT = PlanOptions(gpus=8, gpu_gib=80.0)
STATES = ("student weights", "critic weights", "teacher weights", "optimizer", "EMA")
AUTHORS_STATES = ("weights", "optimizer", "gradients")


@pytest.fixture(scope="module")
def subject_14b() -> Subject:
    return read_subject(recipe_config("wan_14b"))


@pytest.fixture(scope="module")
def authors_on_8(subject_14b: Subject) -> ReferenceLayout:
    layout = reference_layout(subject_14b, EIGHT)
    assert layout is not None
    return layout


def fitting_14b(options: PlanOptions = EIGHT) -> PlanOptions:
    return dataclasses.replace(options, context_parallel=4, accumulate=16)


@pytest.mark.parametrize(("base", "total"), [("1.3B", 1_418_996_800), ("14B", 14_288_491_584)])
def test_published_table_gives_the_published_sizes(base: str, total: int) -> None:
    counts = count_parameters(PUBLISHED[f"Wan-AI/Wan2.1-T2V-{base}-Diffusers"])
    assert counts.total == total
    if base == "14B":
        # Rank 64 on every linear layer of the blocks.
        assert 64 * counts.lora_width == 306_708_480


def test_sizes_of_a_published_base_need_no_files(subject_14b: Subject) -> None:
    assert subject_14b.latents == (16, 21, 60, 104)
    assert subject_14b.num_tokens == 32_760


def test_a_14b_teacher_of_a_1_3b_student_is_counted_as_itself(subject_14b: Subject) -> None:
    options = dataclasses.replace(EIGHT, accumulate=8)
    config = recipe_config("wan_1_3b")
    alone = make_plan(read_subject(config), options)
    subject = read_subject(with_overrides(config, ["teacher=Wan-AI/Wan2.1-T2V-14B-Diffusers"]))
    plan = make_plan(subject, options)
    memory, before = plan.memory["student update"], alone.memory["student update"]
    # bf16 weights of 14.29 G parameters over 8 GPUs.
    assert memory["teacher weights"] == pytest.approx(2 * 14.288e9 / 8, rel=0.01)
    for part in ("student weights", "critic weights", "optimizer", "EMA"):
        assert memory[part] == before[part]
    # A forward of the 14B is 1,678 TFLOP, one of the 1.3B 283; see test_flops.py.
    assert plan.flops["teacher"] / alone.flops["teacher"] == pytest.approx(1678 / 283, rel=1e-3)
    assert {**plan.flops, "teacher": 0} == {**alone.flops, "teacher": 0}
    assert plan.gathered_bytes > alone.gathered_bytes
    lora = make_plan(subject, dataclasses.replace(options, lora_critic_rank=64))
    own = make_plan(subject_14b, dataclasses.replace(fitting_14b(), lora_critic_rank=64))
    assert lora.memory["critic update"]["critic weights"] == own.memory["critic update"]["critic weights"]
    assert "teacher 14.288 G parameters, bf16" in plan_text(
        PlanReport(plan=plan, suggestion=None, smallest=None, reference=reference_layout(subject, options), command="")
    )
    assert reference_layout(subject, options) is None


def test_samples_of_a_14b_teacher_cost_its_forwards() -> None:
    plans = [
        make_plan(read_subject(with_overrides(recipe_config("wan_1_3b", "dcm"), [f"teacher={teacher}"])), EIGHT)
        for teacher in ("", "Wan-AI/Wan2.1-T2V-14B-Diffusers")
    ]
    assert plans[1].sampling_flops / plans[0].sampling_flops == pytest.approx(1678 / 283, rel=1e-3)


def test_a_teacher_that_no_table_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected a teacher that is a folder or one of .*--set teacher=FOLDER"):
        read_subject(with_overrides(recipe_config("wan_1_3b"), ["teacher=some/other"]))


def test_a_lora_student_of_14b_costs_frozen_weights_and_adapters(subject_14b: Subject) -> None:
    full = make_plan(subject_14b, fitting_14b())
    plan = make_plan(subject_14b, dataclasses.replace(fitting_14b(), lora_student_rank=64))
    memory, adapters = plan.memory["student update"], 306_708_480
    assert memory["student weights"] == pytest.approx((2 * 14.288e9 + 4 * adapters) / 8, rel=0.01)
    assert memory["EMA"] == -(-4 * adapters // 8)
    assert memory["gradients"] == -(-4 * adapters // 8)
    assert plan.totals[plan.peak_phase] < 0.75 * full.totals[full.peak_phase]
    # Attention, which has no weights, stays.
    assert plan.flops["student backward"] < 0.85 * full.flops["student backward"]
    assert any("frozen weights of its own, bf16" in note for note in plan_notes(plan))
    # rcm derives its student in float32.
    rcm = make_plan(read_subject(recipe_config("wan_14b", "rcm")), dataclasses.replace(EIGHT, lora_student_rank=64))
    assert rcm.memory["student update"]["student weights"] == pytest.approx((4 * 14.288e9 + 4 * adapters) / 8, rel=0.01)


def test_14b_fits_eight_gpus_with_full_critic_and_both_moments(subject_14b: Subject) -> None:
    plan = make_plan(subject_14b, fitting_14b())
    assert plan.fits
    assert plan.load.samples * plan.options.data_parallel * plan.options.accumulate == 32
    # fp32 student, critic, their moments and the average, bf16 teacher: 14.29 G x (8 + 16 + 4 + 2) B over 8 GPUs.
    states = sum(plan.memory["critic update"][part] for part in STATES)
    assert states == pytest.approx(14.288e9 * 30 / 8, rel=0.01)


def test_suggestion_is_the_least_change_that_fits(subject_14b: Subject) -> None:
    assert not make_plan(subject_14b, EIGHT).fits
    suggestion = suggest(subject_14b, EIGHT)
    assert suggestion is not None and suggestion.plan.fits
    assert suggestion.changes == ("--context-parallel 4", "--accumulate 16")
    # Less memory: what is trained has to change too.
    small = suggest(subject_14b, dataclasses.replace(EIGHT, gpu_gib=56.0))
    assert small is not None and small.plan.fits
    assert any("lora" in change for change in small.changes)


def test_nothing_fits_one_consumer_gpu_and_the_report_says_the_least(subject_14b: Subject) -> None:
    options = PlanOptions(gpus=1, gpu_gib=24.0)
    assert suggest(subject_14b, options) is None
    least = smallest(subject_14b, options)
    assert least.options.activation_checkpointing and least.options.lora_critic_rank > 0
    plan = make_plan(subject_14b, options)
    text = plan_text(PlanReport(plan=plan, suggestion=None, smallest=least, reference=None, command="x"))
    assert "No option makes it fit: the least is" in text


def test_authors_layout_does_not_fit_8_and_fits_32(subject_14b: Subject, authors_on_8: ReferenceLayout) -> None:
    assert authors_on_8.headroom_bytes < 0
    # 537 GB of weights, moments and gradients (14.29 G x 36 B + 23 GB of text encoder).
    states = sum(size for part, size in authors_on_8.parts.items() if part.split(":")[0] in AUTHORS_STATES)
    assert 8 * states == pytest.approx(537e9, rel=0.01)
    inputs = authors_on_8.parts["activations: inputs of checkpointed blocks, bf16"]
    assert inputs == 40 * 32_760 * 5_120 * 2
    on_32 = reference_layout(subject_14b, dataclasses.replace(EIGHT, gpus=32))
    assert on_32 is not None and on_32.headroom_bytes > 0


def test_a_recipe_of_ours_has_no_authors_layout() -> None:
    assert reference_layout(read_subject(recipe_config()), PlanOptions()) is None
    assert reference_layout(read_subject(recipe_config("wan_1_3b", "rcm")), PlanOptions()) is None


def test_time_follows_rate_gpus_and_work(subject_14b: Subject) -> None:
    plan = make_plan(subject_14b, fitting_14b())
    faster = make_plan(subject_14b, dataclasses.replace(fitting_14b(), tflops=800.0))
    assert faster.seconds_per_iteration == pytest.approx(plan.seconds_per_iteration / 2)
    assert plan.hours_per_1000_iterations == pytest.approx(plan.seconds_per_iteration / 3.6)
    total = sum(plan.flops.values())
    # 8.2 forwards of 1.678 PFLOP for each of 32 samples; attention's backward is 2.5 forwards, not 2.
    assert 1.0 < total / (8.2 * 32 * 1.678e15) < 1.15
    without = make_plan(subject_14b, dataclasses.replace(fitting_14b(), activation_checkpointing=False))
    assert "recomputation" in without.flops and without.flops["recomputation"] == 0
    lora = make_plan(subject_14b, dataclasses.replace(fitting_14b(), lora_critic_rank=64))
    assert lora.flops["critic backward"] < plan.flops["critic backward"]


def test_fsdp_traffic_grows_with_micro_batches_and_is_none_on_one_gpu(subject_14b: Subject) -> None:
    few, many = (
        make_plan(subject_14b, dataclasses.replace(EIGHT, context_parallel=8, accumulate=count)) for count in (16, 32)
    )
    assert many.gathered_bytes == pytest.approx(2 * few.gathered_bytes)
    assert make_plan(subject_14b, PlanOptions()).gathered_bytes == 0


def test_replicas_shard_less_and_exchange_gradients_alone(subject_14b: Subject) -> None:
    """HSDP: states are those of a smaller group, and what crosses replicas is one all-reduce of gradient shards."""
    whole, hybrid = (make_plan(subject_14b, PlanOptions(gpus=32, gpu_gib=180.0, shard_group=group)) for group in (0, 8))
    for part in (*STATES, "gradients"):
        assert hybrid.memory["critic update"][part] == pytest.approx(4 * whole.memory["critic update"][part], rel=1e-6)
    assert hybrid.memory["student scores"]["weight copies"] == whole.memory["student scores"]["weight copies"]
    assert whole.replica_bytes == 0
    # 1.2 updates of 14.288 G float32 gradients, an eighth each, twice around a ring of four.
    assert hybrid.replica_bytes == pytest.approx(1.2 * 4 * 14.288e9 / 8 * 2 * 3 / 4, rel=1e-3)
    assert hybrid.gathered_bytes - hybrid.replica_bytes == pytest.approx(
        whole.gathered_bytes * (7 / 8) / (31 / 32), rel=1e-6
    )
    text = plan_text(PlanReport(plan=hybrid, suggestion=None, smallest=None, reference=None, command="x"))
    assert "replicas  4 of 8 GPUs each" in text
    assert "GiB come from the other 3 replicas, the rest from the 8 GPUs of its own" in text


def test_gradients_that_wait_for_the_last_micro_batch_are_whole(subject_14b: Subject) -> None:
    each, last = (
        make_plan(subject_14b, dataclasses.replace(fitting_14b(), gradient_sync=sync)) for sync in ("each", "last")
    )
    for phase in ("student scores", "critic backward"):
        assert each.memory[phase]["gradients"] == pytest.approx(4 * 14.288e9 / 8, rel=1e-4)
        assert last.memory[phase]["gradients"] == pytest.approx(4 * 14.288e9, rel=1e-4)
    assert each.memory["critic update"] == last.memory["critic update"]
    assert each.fits and not last.fits
    # Fifteen of sixteen reductions are saved: 1.2 backwards of an iteration, 7/8 of 4 bytes per parameter.
    saved = each.gathered_bytes - last.gathered_bytes
    assert saved == pytest.approx(15 * 1.2 * 4 * 14.288e9 * 7 / 8, rel=1e-3)


def test_a_plan_says_where_one_reduction_per_update_fits() -> None:
    subject = read_subject(recipe_config("wan_1_3b"))
    options = dataclasses.replace(EIGHT, accumulate=4)
    (note,) = plan_notes(make_plan(subject, options))
    assert note.startswith("--gradient-sync last fits too: ") and "less traffic to each GPU" in note
    once = make_plan(subject, dataclasses.replace(options, gradient_sync="last"))
    assert once.fits and plan_notes(once) == []


def test_a_bf16_residual_stream_halves_what_checkpointed_blocks_keep(subject_14b: Subject) -> None:
    narrow = dataclasses.replace(subject_14b, config=with_overrides(subject_14b.config, ["residual_dtype=bf16"]))
    wide, half = (make_plan(subject, fitting_14b()) for subject in (subject_14b, narrow))
    saved = wide.memory["student scores"]["activations"] - half.memory["student scores"]["activations"]
    assert saved == 40 * 2 * (32_760 // 4) * 5120
    assert half.totals["student backward"] < wide.totals["student backward"]
    # It is a change that a suggestion names, as settings do.
    finest = dataclasses.replace(EIGHT, context_parallel=8, accumulate=32)
    least = make_plan(narrow, finest)
    found = suggest(subject_14b, dataclasses.replace(finest, gpu_gib=least.totals[least.peak_phase] / GIB))
    assert found is not None and found.changes == ("--set residual_dtype=bf16",)


def test_settings_that_are_options_are_read_from_either(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    for words in (["--accumulate", "4", "--shard-group", "4"], ["--set", "accumulate=4", "shard_group=4"]):
        assert main(["plan", "--recipe", "wan_1_3b", "--gpus", "8", "--json", *words]) == 0
        seen.append(json.loads(capsys.readouterr().out))
    assert seen[0] == seen[1]
    assert seen[0]["options"]["accumulate"] == 4


def test_text_and_json_say_the_same(subject_14b: Subject, authors_on_8: ReferenceLayout) -> None:
    plan, suggestion = make_plan(subject_14b, EIGHT), suggest(subject_14b, EIGHT)
    report = PlanReport(
        plan=plan, suggestion=suggestion, smallest=None, reference=authors_on_8, command="codmd-distill plan"
    )
    text, data = plan_text(report), json.loads(json.dumps(plan_json(report)))
    assert "DOES NOT FIT" in text and f"{-plan.headroom_bytes / GIB:,.1f} GiB more than 80 GiB" in text
    assert "codmd-distill plan --context-parallel 4 --accumulate 16" in text
    assert "the authors' layout on these GPUs" in text and "Why: weights, moments and gradients take" in text
    assert data["fits"] is False and data["suggestion"]["plan"]["fits"] is True
    assert data["reference"]["fits"] is False
    assert tuple(data["memory_bytes"]) == PHASES
    assert data["total_bytes"][data["peak_phase"]] == 80 * GIB - data["headroom_bytes"]
    assert all(len(line) <= 120 for line in text.splitlines())


def test_notes_name_what_the_numbers_leave_open(subject_14b: Subject) -> None:
    (relations,) = plan_notes(make_plan(subject_14b, fitting_14b()))
    assert "relates all 32 samples over 16 micro-batches: one more student forward per sample" in relations
    options = dataclasses.replace(fitting_14b(), lora_critic_rank=64, master_dtype="bf16")
    text = " ".join(plan_notes(make_plan(subject_14b, options)))
    for words in ("shares the teacher's weights", "bf16 master weights"):
        assert words in text


def test_betas_of_zero_save_no_memory(subject_14b: Subject) -> None:
    """torch keeps the first moment that nothing reads."""
    lean = with_overrides(subject_14b.config, ["optimizer.betas=[0,0.999]"])
    plans = [make_plan(dataclasses.replace(subject_14b, config=one), EIGHT) for one in (subject_14b.config, lean)]
    assert plans[0].memory == plans[1].memory


def test_relating_micro_batches_costs_one_more_student_forward(subject_14b: Subject) -> None:
    alone = with_overrides(subject_14b.config, ["copula.weight_batch=0"])
    related, plain = (
        make_plan(dataclasses.replace(subject_14b, config=config), fitting_14b())
        for config in (subject_14b.config, alone)
    )
    more = related.flops["rollout"] - plain.flops["rollout"]
    assert more == pytest.approx(related.flops["student forward"])
    assert {key: value for key, value in related.flops.items() if key != "rollout"} == {
        key: value for key, value in plain.flops.items() if key != "rollout"
    }


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("recipe", ["shapeworld", "wan_1_3b", "wan_14b"])
def test_every_method_of_every_recipe_is_planned(recipe: str, method: str) -> None:
    config = recipe_config(recipe, method)
    plan = make_plan(read_subject(config), PlanOptions(gpus=8, gpu_gib=1e5))
    assert (plan.flops["derivative"] > 0) == (plan.passes["student"].derivatives > 0) == (method == "rcm")
    needs_samples = method not in ("codmd", "dmd", "dp-dmd")
    assert (plan.flops["discriminator"] > 0) == (method in ("dmd2", "f-distill", "vdot"))
    assert (plan.sampling_flops > 0) == needs_samples
    text = plan_text(PlanReport(plan=plan, suggestion=None, smallest=None, reference=None, command="x"))
    assert f"plan of {recipe} by {method} on 8 x" in text
    assert ("the GPUs sample the teacher, each its share" in text) == needs_samples


def test_a_regressed_start_is_counted_with_its_paths() -> None:
    options = PlanOptions(gpus=8, gpu_gib=1e5, activation_checkpointing=False)
    plain = make_plan(read_subject(recipe_config("wan_1_3b", "dmd")), options)
    started = recipe_config("wan_1_3b", "dmd")
    started = with_overrides(started, ["start.updates=500", "start.paths=1024", "start.teacher_steps=50"])
    plan = make_plan(read_subject(started), options)
    assert plain.sampling_flops == plain.start_flops == 0.0
    forward = plain.flops["teacher"] / (64 * plain.passes["student"].turns * 2)
    # 50 steps and the three levels of the student that are none of them, guided, 128 paths on each GPU.
    assert plan.sampling_flops == pytest.approx(128 * 53 * 2 * forward)
    assert 2 * forward < plan.start_flops / (500 * 8) < 4 * forward
    assert "500 updates of the regressed start" in plan_text(
        PlanReport(plan=plan, suggestion=None, smallest=None, reference=None, command="x")
    )
    assert plan.flops == plain.flops


def test_samples_of_the_teacher_are_counted_for_the_prompts_that_are_named(tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("a cat\na dog\n")
    config = recipe_config("wan_1_3b", "rcm")
    named = with_overrides(config, [f"prompts={tmp_path / 'two.txt'}"])
    plans = [make_plan(read_subject(one), PlanOptions(gpu_gib=1e5)) for one in (config, named)]
    assert plans[0].sampling_flops == pytest.approx(2048 * plans[1].sampling_flops)


def test_a_layout_that_a_method_cannot_train_in_is_refused() -> None:
    with pytest.raises(ConfigError, match="context_parallel must be 1 for method rcm"):
        make_plan(read_subject(recipe_config("wan_1_3b", "rcm")), PlanOptions(gpus=8, context_parallel=2))


def test_the_derivative_of_rcm_does_not_fit_at_wan_size() -> None:
    """Attention as plain products has matrices of 32,760 x 32,760 for every head."""
    subject = read_subject(recipe_config("wan_1_3b", "rcm"))
    assert not make_plan(subject, EIGHT).fits
    assert suggest(subject, EIGHT) is None
    assert smallest(subject, EIGHT).memory["student scores"]["working set"] > 200 * GIB


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 0}, r"--gpus must be in 1\.\.1000000, got 0"),
        ({"gpus": 8, "context_parallel": 3}, "--context-parallel must divide the 8 GPUs, got 3: use one of 1, 2, 4, 8"),
        ({"gpu_gib": 0.0}, "--gpu-gib must be"),
        ({"gpus": 8, "shard_group": 3}, "--shard-group must divide the 8 GPUs, got 3: use one of 1, 2, 4, 8"),
        ({"gradient_sync": "never"}, "--gradient-sync must be one of each, last, got 'never'"),
        ({"lora_critic_rank": -1}, "--lora-critic-rank must be"),
        ({"master_dtype": "fp8"}, "--master-dtype must be one of fp32, bf16, got 'fp8'"),
        ({"prompt_tokens": 513}, "--prompt-tokens must be"),
        ({"tflops": 0.0}, "--tflops must be"),
        ({"reserve_gib": 90.0}, "--reserve-gib must be"),
    ],
)
def test_options_out_of_range_name_the_option(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PlanOptions(**changes)


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("wan_1_3b", {"gpus": 8, "context_parallel": 8}, "12 heads and 32760 tokens, got 8: use one of 1, 2, 4"),
        ("wan_14b", {"gpus": 16, "context_parallel": 16}, "40 heads"),
        ("wan_14b", {"gpus": 6}, "batch_size 32 must split evenly over 6 .* batch_size=36"),
        ("wan_14b", {"gpus": 8, "accumulate": 3}, "use --accumulate 1 or 2 or 4, or --set batch_size=48"),
        ("shapeworld", {"lora_critic_rank": 512}, "at most the width 256"),
    ],
)
def test_layouts_that_do_not_divide_say_what_would(recipe: str, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(read_subject(recipe_config(recipe)), PlanOptions(**changes))


def test_unknown_base_is_refused_without_asking_a_hub() -> None:
    with pytest.raises(ConfigError, match="a plan downloads nothing"):
        read_subject(with_overrides(recipe_config("wan_14b"), ["base=somebody/some-wan"]))


def test_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
