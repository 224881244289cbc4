"""The command line: `mxfp4-rl train`, `report`, `eval`, `ptq`, `export`, `decompose` and `doctor`.

Exit codes: 0 done; 1 the run failed; 2 it could not start (a mistake in the configuration, told in one sentence);
130 Ctrl-C; 143 SIGTERM. MXFP4_RL_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import mxfp4_rl
from mxfp4_rl.launch import LaunchError

EXAMPLES = """\
useful overrides (any key of verl's and of the mxfp4 block; --print-config shows all):
  trainer.total_training_steps=50           length of the run
  trainer.experiment_name=mine              its name and, by default, its folder runs/mine
  actor_rollout_ref.model.path=PATH         a folder or a hub id
  data.train_files=a.parquet                your data (with mxfp4.task=null), data.val_files too
  mxfp4.recipe.macro_block=null             no macro-block scaling; "static" or "dynamic"
  mxfp4.recipe.fallback_alpha=null          no outlier fallback; or alpha in (0, 1]
  mxfp4.aqn.enable=true                     exploration noise
  mxfp4.enable=false                        plain verl in BF16
"""


def main(argv: Sequence[str] | None = None, child_command: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: the arguments; the process's own by default.
        child_command: what `train` starts instead of verl (see `launch.run.launch`).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["doctor"]:  # what the other commands' parsers import may be what is broken
        from mxfp4_rl import doctor

        return doctor.main(arguments[1:])
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    try:
        if options.command == "train":
            # argparse gives up on positional arguments after an option; hydra's users mix them.
            unknown = [argument for argument in rest if argument.startswith("-")]
            if unknown:
                raise LaunchError(f"unknown option {unknown[0]}; see mxfp4-rl train --help")
            return _train(options, [*options.overrides, *rest], arguments, child_command)
        if rest:
            raise LaunchError(f"unexpected argument {rest[0]}; see mxfp4-rl {options.command} --help")
        if options.command == "decompose":
            from mxfp4_rl.analysis import command

            return command.run(options)
        if options.command == "eval":
            from mxfp4_rl.evaluation import command as evaluation

            return evaluation.run(options, arguments)
        if options.command == "export":
            from mxfp4_rl.export import command as export

            return export.run(options)
        if options.command == "ptq":
            from mxfp4_rl.ptq import command as ptq

            return ptq.run(options, arguments)
        return _report(options)
    except LaunchError as error:
        return _refuse(error, str(error))
    except KeyboardInterrupt:
        print("interrupted before the run started", file=sys.stderr)
        return 130
    except Exception as error:
        return _refuse(error, f"{type(error).__name__}: {error} (MXFP4_RL_DEBUG=1 shows where)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mxfp4-rl", description=mxfp4_rl.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mxfp4-rl {mxfp4_rl.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a model",
        description="Train a model with verl in MXFP4. Configuration and overrides are hydra's.",
        epilog=f"{_configs_help()}\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    train.add_argument("--config-name", "-cn", default="quickstart", metavar="NAME", help="default: quickstart")
    train.add_argument("--config-dir", "-cd", metavar="DIR", help="a folder with configurations of your own")
    train.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    train.add_argument("--dry-run", action="store_true", help="check everything that can be checked and stop")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="hydra overrides")

    report = commands.add_parser("report", help="plots of a run", description="Write a run's report, also while it runs.")
    report.add_argument("run_dir", help="the run's directory")
    report.add_argument("--overlay", metavar="RUN_DIR", help="a second run, drawn dashed in the same plots")
    report.add_argument(
        "--watch", action="store_true", help="serve a page on this machine that follows the run; writes nothing"
    )
    report.add_argument("--port", type=int, help="of that page; default: 8766, 0 takes any that is free")

    commands.add_parser("doctor", help="check this machine: what is there, what to install")  # see `main`

    from mxfp4_rl.analysis.command import add_arguments
    from mxfp4_rl.evaluation.command import add_arguments as add_eval_arguments

    what = "Measure how many of a task's held-out problems a checkpoint answers, with and without the quantiser."
    add_eval_arguments(commands.add_parser("eval", help="accuracy of a checkpoint", description=what, allow_abbrev=False))

    from mxfp4_rl.export.command import add_arguments as add_export_arguments

    what = "Write a model's weights, quantised, as a checkpoint that vLLM and transformers load."
    add_export_arguments(commands.add_parser("export", help="a checkpoint to serve", description=what, allow_abbrev=False))

    from mxfp4_rl.ptq.command import add_arguments as add_ptq_arguments

    what = "Quantise a model's weights with several scale rules, and measure what each leaves of it and costs."
    add_ptq_arguments(commands.add_parser("ptq", help="scale rules side by side", description=what, allow_abbrev=False))

    what = "Split a checkpoint's quantisation error into its parts, and measure what each correction repairs."
    add_arguments(commands.add_parser("decompose", help="what MXFP4 does to a model", description=what, allow_abbrev=False))
    return parser


def _configs_help() -> str:
    from mxfp4_rl.launch.compose import list_configs

    lines = [f"  {name:<20} {first_line}" for name, first_line in list_configs().items()]
    return "\n".join(["configurations in this package:", *lines, ""])


def _train(options, overrides: list[str], arguments: list[str], child_command: Sequence[str] | None) -> int:
    from mxfp4_rl.launch.compose import added_keys, compose_config, resolved

    config = compose_config(options.config_name, overrides, options.config_dir)
    if options.print_config:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(OmegaConf.create(resolved(config))), end="")
        return 0

    from mxfp4_rl.launch.preflight import prepare
    from mxfp4_rl.launch.records import print_header
    from mxfp4_rl.launch.run import CHILD_COMMAND, launch

    run = prepare(config, say=lambda text: print(text, flush=True), added=added_keys(overrides))
    if options.dry_run:
        print_header(run)
        run.run_dir.release(unused=True)
        print("everything that can be checked without starting Ray is fine")
        return 0
    return launch(run, child_command or CHILD_COMMAND, arguments)


def _report(options) -> int:
    if options.watch:
        from mxfp4_rl.monitor.watch import DEFAULT_PORT, watch

        return watch(options.run_dir, DEFAULT_PORT if options.port is None else options.port, options.overlay)
    if options.port is not None:
        raise LaunchError(f"--port {options.port} is of the page that --watch serves: give --watch too")
    from mxfp4_rl.monitor.report import write_report

    try:
        print(write_report(options.run_dir, overlay=options.overlay))
    except (OSError, ValueError) as error:
        raise LaunchError(str(error)) from error
    return 0


def _refuse(error: Exception, message: str) -> int:
    if os.environ.get("MXFP4_RL_DEBUG") == "1":
        raise error
    print(f"mxfp4-rl: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
