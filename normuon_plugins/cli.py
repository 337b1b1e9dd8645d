"""The command ``normuon``. ``normuon plan`` prints the plan of a Hugging Face model from its config, without weights.

Only what was asked for goes to stdout; notes and errors, one sentence each, go to stderr. A wrong command line exits
with 2, a model that cannot be built or a plan that is refused with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any, NoReturn

from normuon_plugins.config_model import Refused, build_model
from normuon_plugins.core.parameter_plan import plan_parameters

EXAMPLES = r"""examples:
  normuon plan meta-llama/Llama-3.1-8B
  normuon plan ./checkpoint --override '\.down_proj\.=adamw' --override 'fused_qkv=o=4096+1024+1024 i'
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
    return parser


def _plan(options: argparse.Namespace) -> str:
    """Return what ``normuon plan`` prints."""
    with redirect_stdout(sys.stderr):  # where anything belongs that transformers or a model's own code prints
        model = build_model(options)
    given = {name: value for name, value in vars(options).items() if name in PLAN_OPTIONS}
    try:
        plan = plan_parameters(model, **given)
    except ValueError as error:
        raise Refused(str(error)) from error
    return json.dumps(plan.to_dict(), indent=2) if options.json else str(plan)
