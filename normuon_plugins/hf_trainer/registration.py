"""The only file that touches transformers' internals: an optimizer name, its handler, and a default callback."""

from __future__ import annotations

from typing import Any

from transformers import trainer, trainer_optimizer
from transformers.training_args import OptimizerNames

from normuon_plugins.hf_trainer.arguments import normuon_options
from normuon_plugins.hf_trainer.factory import bind_model
from normuon_plugins.hf_trainer.rates import AdamWLearningRate

NAME = "normuon"
MEMBER = "NORMUON"


def register_normuon() -> None:
    """Make ``TrainingArguments(optim="normuon")`` known to transformers in this process. Calling it again does nothing.

    transformers has no hook for this: optimizer names are an enum (``OptimizerNames``), and the Trainer looks up a
    handler by member (``trainer_optimizer._OPTIMIZER_HANDLERS``, since 5.2). A default callback
    (``trainer.DEFAULT_CALLBACKS``) logs the second learning rate in Trainers built from now on. Undone by
    ``unregister_normuon``.
    """
    if NAME not in OptimizerNames._value2member_map_:
        _add_member()
    trainer_optimizer._OPTIMIZER_HANDLERS[NAME] = _handler
    if AdamWLearningRate not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(AdamWLearningRate)


def unregister_normuon() -> None:
    """Undo ``register_normuon``. Calling it again does nothing."""
    trainer_optimizer._OPTIMIZER_HANDLERS.pop(NAME, None)
    if AdamWLearningRate in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.remove(AdamWLearningRate)
    if NAME in OptimizerNames._value2member_map_:
        del OptimizerNames._value2member_map_[NAME]
        OptimizerNames._member_names_.remove(MEMBER)
        del OptimizerNames._member_map_[MEMBER]
        type.__delattr__(OptimizerNames, MEMBER)


def restore_member() -> Any:
    """Return the enum member, registering it first: what ``training_args.bin`` calls when it is loaded."""
    register_normuon()
    return OptimizerNames(NAME)


def _add_member() -> None:
    """Do what ``class OptimizerNames`` does for each of its lines; an enum cannot be subclassed once it has members."""
    member = str.__new__(OptimizerNames, NAME)
    member._name_, member._value_ = MEMBER, NAME
    member.__objclass__ = OptimizerNames
    member._sort_order_ = len(OptimizerNames._member_names_)
    # pickle would store OptimizerNames("normuon"), which fails in a process that has not registered.
    member.__reduce_ex__ = lambda protocol: (restore_member, ())
    type.__setattr__(OptimizerNames, MEMBER, member)
    OptimizerNames._member_map_[MEMBER] = member
    OptimizerNames._member_names_.append(MEMBER)
    OptimizerNames._value2member_map_[NAME] = member


def _handler(context: trainer_optimizer.OptimizerContext) -> tuple[Any, dict[str, Any]]:
    return bind_model(context.model), normuon_options(context.args)
