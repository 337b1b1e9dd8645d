"""The command ``normuon``.

``normuon plan`` prints the plan of a Hugging Face model from its config, without weights. ``normuon diagnose`` makes a
report of the optimizer state in a checkpoint. ``normuon tune`` searches for both learning rates.

Only what was asked for goes to stdout; notes and errors, one sentence each, go to stderr. A wrong command line exits
with 2, a model that cannot be built or a plan that is refused with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from normuon_plugins.config_model import Refused, build_model
from normuon_plugins.core.parameter_plan import plan_parameters
from normuon_plugins.tuning import command

EXAMPLES = r"""examples:
  normuon plan meta-llama/Llama-3.1-8B
  normuon plan ./checkpoint --override '\.down_proj\.=adamw' --override 'fused_qkv=o=4096+1024+1024 i'
"""
DIAGNOSE_EXAMPLES = r"""examples:
  normuon diagnose out/checkpoint-1000 --out report.html
  normuon diagnose run/last.ckpt --match '\.(0|15|31)\.mlp\.' --out report.png
"""
PLAN_OPTIONS = ("overrides", "split_fused", "per_head", "strict")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command ``normuon``.

    Args:
        arguments: Words of the command line after the command's own name; None reads them from ``sys.argv``.

    Returns:
        Exit code: 0, or 1 after the reason was written to stderr.

    Raises:
        SystemExit: With 2 for a wrong command line, with 0 after ``--help``.
    """
    options, unknown = _parser().parse_known_args(arguments)
    if unknown:  # said by the command itself, since its help has the options
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        text = options.run(options)
    except Refused as refusal:
        print(f"normuon {options.command}: error: {refusal}", file=sys.stderr)
        return 1
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The reader has seen enough (| head). Python would try to flush the rest at exit and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


class _Parser(argparse.ArgumentParser):
    """A parser that answers a mistake with one sentence, not with the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


class _Override(argparse.Action):
    """Collects ``PATTERN=TARGET`` into a dict; divided at the first ``=``, since a layout may contain others."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        pattern, _, target = values.partition("=")
        if not pattern or not target:
            example = "'down_proj=adamw' or 'fused_qkv=o=128+64+64 i'"
            raise argparse.ArgumentError(self, f"{values!r} is not PATTERN=TARGET, such as {example}")
        overrides = getattr(namespace, self.dest, {})
        if pattern in overrides:
            raise argparse.ArgumentError(self, f"the pattern {pattern!r} is given twice")
        setattr(namespace, self.dest, {**overrides, pattern: target})


def _parser() -> argparse.ArgumentParser:
    """Return the parser: one subparser per command, each with the function that runs it and returns its output."""
    parser = _Parser(prog="normuon", description="Tools of the NorMuon optimizer.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_plan(commands)
    _add_diagnose(commands)
    _add_tune(commands)
    return parser


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="print which parameters of a model go to NorMuon, and why",
        description="Print which parameters of a Hugging Face model go to NorMuon and which to AdamW, and why.\n"
        "The config is enough: no weights are loaded or allocated.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        # an option that is not given keeps the default that plan_parameters has for it
        argument_default=argparse.SUPPRESS,
    )
    plan.set_defaults(run=_plan, parser=plan)
    plan.add_argument(
        "model",
        metavar="MODEL_OR_CONFIG",
        help="folder with a config.json, path of a JSON config, id on the hub, or a model type of transformers such as"
        " llama, which means that type's default config",
    )
    plan.add_argument(
        "--override",
        dest="overrides",
        action=_Override,
        metavar="PATTERN=TARGET",
        help="send the parameters whose name has a match of the regular expression PATTERN to TARGET: normuon, adamw or"
        " a layout. The first = ends PATTERN, so it cannot contain one. May be repeated",
    )
    plan.add_argument(
        "--no-split-fused", dest="split_fused", action="store_false", help="keep fused projections whole matrices"
    )
    plan.add_argument("--per-head", action="store_true", help="treat every query, key and value head as its own matrix")
    plan.add_argument("--strict", action="store_true", help="fail when no rule recognises a parameter")
    plan.add_argument("--json", action="store_true", default=False, help="print the rows as JSON, one object each")
    plan.add_argument(
        "--architecture",
        metavar="CLASS",
        default=None,
        help="class of transformers to build, such as LlamaForSequenceClassification or AutoModelForCTC; the default is"
        " the one that the config names",
    )
    plan.add_argument(
        "--trust-remote-code", action="store_true", default=False, help="run the model code that comes with the config"
    )
    plan.add_argument("--revision", metavar="R", default=None, help="branch, tag or commit on the hub")


def _add_diagnose(commands: Any) -> None:
    diagnose = commands.add_parser(
        "diagnose",
        help="report what the optimizer state in a checkpoint says of the model's neurons",
        description="Write a report of a checkpoint: singular values and neuron norms of the momentum, of Muon's"
        " direction and of NorMuon's, for every hidden matrix. Needs neither the model nor a GPU.",
        epilog=DIAGNOSE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    diagnose.set_defaults(run=_diagnose, parser=diagnose)
    diagnose.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="file of torch.save, folder of torch.distributed.checkpoint, or checkpoint folder of the HF Trainer,"
        " Accelerate or Lightning",
    )
    diagnose.add_argument(
        "--out", type=Path, default=Path("report.html"), help="file to write: .html, .png or .json (report.html)"
    )
    diagnose.add_argument("--match", default="", metavar="REGEX", help="look only at parameters whose name has a match")
    diagnose.add_argument(
        "--per-parameter",
        type=int,
        default=None,
        metavar="N",
        help="of a parameter that holds several matrices (experts, heads), look at so many, evenly spaced",
    )
    diagnose.add_argument(
        "--no-weights-only",
        dest="weights_only",
        action="store_false",
        help="read a file that holds more than tensors and numbers: runs code that it may bring",
    )


def _add_tune(commands: Any) -> None:
    tune = commands.add_parser(
        "tune",
        help="search for both learning rates on a model and its data",
        description=command.DESCRIPTION,
        epilog=command.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    tune.set_defaults(run=_tune, parser=tune)
    command.add_arguments(tune)


def _plan(options: argparse.Namespace) -> str:
    """Return what ``normuon plan`` prints."""
    with redirect_stdout(sys.stderr):  # where anything belongs that transformers or a model's own code prints
        model = build_model(options)
    given = {name: value for name, value in vars(options).items() if name in PLAN_OPTIONS}
    try:
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            plan = plan_parameters(model, **given)
    except ValueError as error:
        raise Refused(str(error)) from error
    for note in notes:
        print(f"normuon plan: {note.message}", file=sys.stderr)
    return json.dumps(plan.to_dict(), indent=2) if options.json else str(plan)


def _diagnose(options: argparse.Namespace) -> str:
    """Write the report of ``normuon diagnose`` and return what it says in short."""
    # here, since reading checkpoints takes a second to import
    from normuon_plugins.diagnostics import read_checkpoint, write_report
    from normuon_plugins.diagnostics.report import check_target, reading

    chosen = {} if options.per_parameter is None else {"per_parameter": options.per_parameter}
    try:
        re.compile(options.match)
        check_target(options.out)
        diagnosis = read_checkpoint(
            options.checkpoint, match=options.match, weights_only=options.weights_only, progress=_say, **chosen
        )
        _say("drawing")
        written = write_report(diagnosis, options.out)
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError, re.error) as error:
        raise Refused(str(error) or type(error).__name__) from error
    finally:
        _say("")
    return "\n".join([*reading(diagnosis), f"wrote {written}"])


def _tune(options: argparse.Namespace) -> str:
    """Return what ``normuon tune`` prints."""
    try:
        return command.tune(options)
    except KeyboardInterrupt as stopped:
        raise Refused("interrupted") from stopped
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise Refused(str(error)) from error


def _say(name: str) -> None:
    """Show what is being worked on, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{name}", end="", file=sys.stderr, flush=True)
