"""A Hugging Face model from its config alone, on the meta device: modules and shapes, no memory, no weights."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import nn

from normuon_plugins.extras import require

# For a config that names no class of its own. An encoder-decoder and a multimodal model come before the decoder that
# is one half of them, an encoder before the decoder that it can be made into.
AUTO_CLASSES = (
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForCTC",
    "AutoModelForZeroShotImageClassification",
    "AutoModelForImageClassification",
    "AutoModelForObjectDetection",
    "AutoModelForUniversalSegmentation",
    "AutoModelForSemanticSegmentation",
    "AutoModelForDepthEstimation",
    "AutoModelForVideoClassification",
    "AutoModelForAudioClassification",
    "AutoModelForPreTraining",
    "AutoModel",
    "AutoModelForKeypointDetection",
    "AutoModelForPoseEstimation",
    "AutoModelForImageMatting",
)


class Refused(Exception):
    """An expected failure; its message is all that the user sees."""


def _note(message: str) -> None:
    print(f"normuon plan: {message}", file=sys.stderr)


def build_model(options: argparse.Namespace) -> nn.Module:
    """Return the model that a command line means.

    Args:
        options: ``model`` (folder, config file, model type or hub id), ``architecture`` and ``revision`` (or None), and
            ``trust_remote_code``.

    Raises:
        Refused: If there is no such model, or transformers cannot build it; one sentence.
    """
    try:
        require("transformers", extra="hf")
        asked = None if options.architecture is None else _asked_class(options.architecture)
        config = _load_config(options)
        if getattr(config, "quantization_config", None) is not None:
            _note("the config is quantized; this is the plan of the unquantized architecture.")
        model_class, part = _choose_class(config, asked, options)
        # The plan depends on neither, while a config may name a kernel or a dtype that this machine cannot use.
        arguments = {"attn_implementation": "eager", "dtype": torch.float32}
        with torch.device("meta"):
            if _is_auto(model_class):
                model: nn.Module = model_class.from_config(
                    part, trust_remote_code=options.trust_remote_code, **arguments
                )
            else:
                model = model_class._from_config(part, **arguments)
        return model
    except Refused:
        raise
    except Exception as error:  # transformers, its hub client and the code of any model may raise anything
        raise Refused(f"no model can be built from {options.model!r}: {_in_one_line(error)}") from error


def _load_config(options: argparse.Namespace) -> Any:
    """Return the config that ``MODEL_OR_CONFIG`` means: of a folder, a file, a model type or the hub, in this order.

    Model types come before the hub: without a network the hub client tries for 23 s before it gives up, and the few
    hub ids that are model types too (gpt2, ctrl, openai-gpt) are the models that the default configs describe.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    model, path = options.model, Path(options.model)
    local = path.exists()
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise Refused(f"{model!r} holds an adapter only; load it on its model and print plan_parameters(model)")
        raise Refused(f"the folder {model!r} has no config.json; name the folder that save_pretrained() wrote")
    if path.is_file() and path.suffix != ".json":
        raise Refused(f"{model!r} is no JSON file; name a config.json or its folder")
    if not local and (path.suffix == ".json" or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model)):
        raise Refused(f"there is no file or folder {model!r}, and a hub id would read organization/name")
    if not local and model in CONFIG_MAPPING and options.revision is None:
        _note(f"this is the default config of the model type {model!r}.")
        return AutoConfig.for_model(model)
    # transformers finds the model code beside a config only from the folder
    source = str(path.parent) if local and path.name == "config.json" else model
    try:
        return AutoConfig.from_pretrained(
            source, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise Refused(f"{model!r} needs code of its own; read that code, then add --trust-remote-code") from error
        if local:
            raise Refused(f"no config in {model!r}: {_in_one_line(error)}") from error
        near = [] if "/" in model else _close(model, CONFIG_MAPPING)
        hint = f" (similar model types: {', '.join(near)})" if near else ""
        raise Refused(
            f"no file or folder is called {model!r}{hint}; of the hub, transformers says: {_in_one_line(error)}"
        ) from error


def _choose_class(config: Any, asked: Any, options: argparse.Namespace) -> tuple[Any, Any]:
    """Return the class to build and the part of ``config`` that it is built from.

    Args:
        config: Of the whole model.
        asked: The class of ``--architecture``, or None: then the class that the config names, since that is the one
            people train; else the first of ``AUTO_CLASSES`` that knows the config.
        options: Of the command line.

    Returns:
        A model class; or, where the model brings its own code, the auto class that finds it.
    """
    import transformers

    auto_map = getattr(config, "auto_map", None) or {}
    own = {name: str(reference) for name, reference in auto_map.items() if name.startswith("AutoModel")}
    remote = own if options.trust_remote_code else {}
    if asked is not None:
        found = (asked, config) if asked.__name__ in remote else _local_class(asked, config)
        if found is None:
            raise Refused(
                f"{asked.__name__} cannot be built from the {type(config).__name__} of {options.model!r};"
                " leave --architecture out or name a class of this model"
            )
        return found
    named = next(iter(config.architectures or []), None)
    if remote:
        known = [name for name in AUTO_CLASSES if name in remote] or list(remote)
        chosen = next((name for name in remote if remote[name].split(".")[-1] == named), known[0])
        return getattr(transformers, chosen), config
    if named is not None and (found := _local_class(_model_class(named), config)):
        return found
    for name in AUTO_CLASSES:
        if found := _local_class(getattr(transformers, name, None), config):
            why = f"no class of transformers fits {named!r} of the config" if named else "the config names no class"
            remedy = "--trust-remote-code builds the config's own" if own else "--architecture names another"
            _note(f"{why}; this is the plan of {found[0].__name__} ({remedy}).")
            return found
    raise Refused(
        f"no auto class of transformers knows the {type(config).__name__} of {options.model!r}; name a model class with"
        " --architecture"
    )


def _local_class(model_class: Any, config: Any) -> tuple[Any, Any] | None:
    """Return the class that transformers itself has for ``config`` and the part of it that is built from; or None.

    Args:
        model_class: A model class, an auto class, or None.
        config: Of the whole model; a decoder may be built from its text part only.
    """
    if model_class is not None and _is_auto(model_class):
        model_class = model_class._model_mapping.get(type(config), None)
        if isinstance(model_class, tuple):  # several heads, the usual one first
            model_class = model_class[0]
    expected = getattr(model_class, "config_class", None)
    if expected is None:
        return None
    if isinstance(config, expected):
        return model_class, config
    text = getattr(config, "text_config", None)
    return (model_class, text) if isinstance(text, expected) else None


def _asked_class(name: str) -> Any:
    """Return the class that ``--architecture`` names."""
    import transformers

    found = _model_class(name)
    if found is None:
        near = [other for other in _close(name, dir(transformers), count=10) if _model_class(other) is not None][:3]
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise Refused(f"transformers has no model class {name!r}{hint}")
    return found


def _model_class(name: str) -> Any:
    """Return the model class or auto class of transformers called ``name``, or None."""
    import transformers

    found = getattr(transformers, name, None)
    is_model = isinstance(found, type) and (issubclass(found, transformers.PreTrainedModel) or _is_auto(found))
    return found if is_model else None


def _is_auto(model_class: Any) -> bool:
    return hasattr(model_class, "_model_mapping")


def _close(word: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Return the names nearest to ``word``, whatever their case."""
    spelled = {name.lower(): name for name in names}
    return [spelled[name] for name in get_close_matches(word.lower(), spelled, n=count)]


def _in_one_line(error: Exception) -> str:
    """Return the error's own words, with its type where they make no sentence alone."""
    words = shorten(str(error), width=500, placeholder=" ...")
    return words if isinstance(error, (OSError, ImportError, ValueError)) else f"{type(error).__name__}: {words}"
