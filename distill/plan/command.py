"""`codmd-distill plan`: options in, table or JSON out; imports nothing heavy until it runs."""

import argparse
import dataclasses
import json
import shlex

from distill.plan.options import LAYOUT, PlanOptions, flag

PLAN_HELP = {
    "gpus": "GPUs; from 2 on every network is sharded, block by block",
    "gpu_gib": "memory of one GPU, GiB",
    "reserve_gib": "of it kept free for the CUDA context, NCCL, workspaces and fragmentation, GiB",
    "activation_checkpointing": "keep only the input of each block, and compute the block again before its backward",
    "lora_critic_rank": "train LoRA of this rank on the teacher's frozen weights as the critic; 0 is a full critic",
    "lora_student_rank": "train LoRA of this rank on frozen weights as the student; 0 is a full student",
    "master_dtype": "fp32 or bf16: weights, gradients and moments of student and critic",
    "context_parallel": "GPUs that share the tokens of one sample",
    "shard_group": "GPUs that shard one copy of the networks, HSDP; 0 shards over all of them",
    "gradient_sync": "each or last: micro-batches that reduce their gradients; last keeps whole ones until then",
    "accumulate": "micro-batches whose gradients are added up for one update",
    "prompt_tokens": "positions of a prompt, at most 512, which is Wan's padded length",
    "tflops": "rate that one GPU is taken to reach, TFLOP/s",
}


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `codmd-distill plan`: recipe, method and settings as for train, and those of PlanOptions."""
    parser.add_argument("--recipe", help="shapeworld (default), wan_1_3b or wan_14b")
    parser.add_argument(
        "--method", help="with the settings published for it (default codmd); an unknown name lists all"
    )
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="KEY=VALUE",
        action="extend",
        nargs="+",
        default=[],
        help="any setting of the recipe, for example batch_size=16 or native.num_frames=41",
    )
    for field in dataclasses.fields(PlanOptions):
        kind = type(field.default)
        text = f"{PLAN_HELP[field.name]} (default {field.default})"
        if kind is bool:
            parser.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            parser.add_argument(flag(field.name), type=kind, metavar=field.name.split("_")[-1].upper(), help=text)
    parser.add_argument("--json", action="store_true", help="print everything as JSON, sizes in bytes")


def run_plan(args: argparse.Namespace) -> int:
    """Run `codmd-distill plan`.

    Returns:
        0 with the plan printed, whether it fits or not.

    Raises:
        ConfigError, CheckpointError: settings, options or a base that cannot work.
    """
    names = [field.name for field in dataclasses.fields(PlanOptions)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    from codmd_serve.wan.checkpoint import silence_libraries
    from distill.config import with_overrides
    from distill.methods.registry import recipe_config
    from distill.plan.architecture import read_subject
    from distill.plan.planner import make_plan, smallest, suggest
    from distill.plan.reference import reference_layout
    from distill.plan.report import PlanReport, plan_json, plan_text

    config = with_overrides(recipe_config(args.recipe, args.method), args.settings)
    # An option that is given as a setting of the run, as `train` takes it.
    named = {setting.partition("=")[0] for setting in args.settings} & set(LAYOUT) - given.keys()
    options = PlanOptions(**{name: getattr(config, name) for name in named} | given)
    silence_libraries()
    subject = read_subject(config)
    plan = make_plan(subject, options)
    suggestion = None if plan.fits else suggest(subject, options)
    report = PlanReport(
        plan=plan,
        suggestion=suggestion,
        smallest=None if plan.fits or suggestion else smallest(subject, options),
        reference=reference_layout(subject, options),
        command=_typed_command(args, given),
    )
    print(json.dumps(plan_json(report), indent=2) if args.json else plan_text(report))
    return 0


def _typed_command(args: argparse.Namespace, given: dict[str, object]) -> str:
    words = ["codmd-distill", "plan"]
    for name in ("recipe", "method"):
        words += [flag(name), getattr(args, name)] if getattr(args, name) is not None else []
    for name, value in given.items():
        if isinstance(value, bool):
            words.append(flag(name) if value else flag("no_" + name))
        else:
            words += [flag(name), f"{value:g}" if isinstance(value, float) else str(value)]
    if args.settings:
        words += ["--set", *args.settings]
    return shlex.join(words)
