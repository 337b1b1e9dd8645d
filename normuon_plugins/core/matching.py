"""Which parameter of a checkpoint is which of an optimizer: by name where both sides have names, else by place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from normuon_plugins.core.names import unwrapped_name
from normuon_plugins.core.optimizer_state import route, route_words

Group = Mapping[str, Any]
# How many names a message lists.
LISTED = 4
# Name -> (number of the saved group, the parameter's number in the checkpoint).
Numbers = dict[str, tuple[int, Any]]


def match_groups(param_groups: Sequence[Group], state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the groups of a checkpoint in the order of this optimizer's parameters.

    Where both sides have names, a parameter gets what was saved under its name: layers that are trained in another
    order, or next to others that are frozen, keep their own state. One of the sides may have a prefix, which a wrapper
    gave it (``module.``). Without names, and where the same names stand in the same places, places count, as in torch.

    Args:
        param_groups: Of this optimizer.
        state_dict: The checkpoint.

    Returns:
        One group for each of ``param_groups``, with the checkpoint's options; ``params`` are the checkpoint's numbers,
        None for a parameter that it does not know.

    Raises:
        ValueError: If another optimizer wrote the checkpoint, it lacks a trainable parameter or holds state of one that
            is not here, or divides them into other groups; the message lists the names.
    """
    saved_groups = state_dict["param_groups"]
    if any("algorithm" not in group for group in saved_groups if group["params"]):
        raise ValueError(
            "The checkpoint's groups have no 'algorithm': another optimizer wrote it. Resume with that one, or start"
            " NorMuon without its state."
        )
    saved = [_without_names(group) for group in saved_groups]
    if not all("param_names" in group for group in [*param_groups, *saved_groups] if group["params"]):
        for kept, saved_group in zip(saved, saved_groups, strict=True):
            if "param_names" in saved_group:
                kept["param_names"] = saved_group["param_names"]  # torch drops them where this optimizer has its own
        return _with_empty_groups(param_groups, saved)
    here = [[unwrapped_name(name) for name in group.get("param_names", ())] for group in param_groups]
    there = [[unwrapped_name(name) for name in group.get("param_names", ())] for group in saved_groups]
    if here == there:
        return _with_empty_groups(param_groups, saved)
    _refuse_ambiguous(param_groups, here, saved_groups, there)
    numbers = _numbers_by_name(here, there, saved_groups)
    _refuse_strangers(param_groups, here, state_dict["state"], numbers)
    for group, names in zip(param_groups, here, strict=True):
        for name in names:
            if name in numbers:
                check_route(name, group, saved_groups[numbers[name][0]])
    _refuse_other_groups(here, numbers)
    return [_matched(group, names, saved, numbers) for group, names in zip(param_groups, here, strict=True)]


def _without_names(group: Group) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "param_names"}


def _with_empty_groups(param_groups: Sequence[Group], saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ``saved`` with our options where torch.distributed.checkpoint kept none, of a group without parameters."""
    if len(saved) != len(param_groups):
        return saved  # torch refuses that
    return [
        kept if kept["params"] or "algorithm" in kept else {**_without_names(group), **kept}
        for group, kept in zip(param_groups, saved, strict=True)
    ]


def _numbers_by_name(
    here: Sequence[Sequence[str]], there: Sequence[Sequence[str]], saved_groups: Sequence[Group]
) -> Numbers:
    """Return where the checkpoint has each of its parameters, by the names that they have here."""
    own = [name for names in here for name in names]
    known = [name for names in there for name in names]
    rename = _prefix_rule(own, known)
    return {
        rename(name): (number, saved_id)
        for number, (names, group) in enumerate(zip(there, saved_groups, strict=True))
        for name, saved_id in zip(names, group["params"], strict=True)
    }


def _refuse_ambiguous(
    param_groups: Sequence[Group],
    here: Sequence[Sequence[str]],
    saved_groups: Sequence[Group],
    there: Sequence[Sequence[str]],
) -> None:
    """Raise ``ValueError`` where two parameters of one side have the same name, and the other side has other ones.

    torch.distributed.checkpoint repeats the names of a group whose parameters were in several groups of the checkpoint;
    then one of them was on another algorithm, and is named.
    """
    for groups, whose in ((here, "this optimizer"), (there, "the checkpoint")):
        counts = Counter(name for names in groups for name in names)
        twice = [name for name, count in counts.items() if count > 1]
        if not twice:
            continue
        for names, group, saved_group in zip(here, param_groups, saved_groups, strict=False):
            for name in names[:1]:
                check_route(name, group, saved_group)
        raise ValueError(
            f"{whose} has several parameters called {twice[0]!r}, and the other side has other ones: no name says which"
            " is which. Build the groups of all models in the order of the checkpoint."
        )


def _prefix_rule(own: Sequence[str], known: Sequence[str]) -> Callable[[str], str]:
    """Return what makes a name of the checkpoint one of this optimizer: a wrapper's prefix is put before or taken away.

    A number is never a prefix: it is a place in a list, and layer 1 is not layer 0.
    """
    if set(own) & set(known):
        return lambda name: name
    for prefix in _prefixes(own):
        if {name[len(prefix) :] for name in own} & set(known):
            return lambda name: prefix + name
    for prefix in _prefixes(known):
        if {name[len(prefix) :] for name in known} & set(own):
            return lambda name: name[len(prefix) :]
    return lambda name: name


def _prefixes(names: Sequence[str]) -> Iterator[str]:
    """Yield the prefixes that all names share, the shortest first, as long as they could be a wrapper's."""
    parts = [name.split(".")[:-1] for name in names]
    prefix = ""
    for same in zip(*parts, strict=False):
        if len(set(same)) > 1 or same[0].isdigit():
            return
        prefix += f"{same[0]}."
        yield prefix


def _refuse_strangers(
    param_groups: Sequence[Group], here: Sequence[Sequence[str]], states: Mapping[Any, Any], numbers: Numbers
) -> None:
    """Raise ``ValueError`` where one side alone trained a parameter; one that has no state has nothing to lose."""
    trainable = {
        name: parameter.requires_grad
        for group, names in zip(param_groups, here, strict=True)
        for name, parameter in zip(names, group["params"], strict=True)
    }
    only_here = [name for name, trains in trainable.items() if trains and name not in numbers]
    only_saved = [name for name, (_, saved_id) in numbers.items() if name not in trainable and states.get(saved_id)]
    sides = [
        f"only {where}: {', '.join(map(repr, names[:LISTED]))}"
        + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
        for where, names in (("here", only_here), ("in the checkpoint", only_saved))
        if names
    ]
    if sides:
        raise ValueError(
            f"The checkpoint trained other parameters; {'; '.join(sides)}. Freeze and thaw as that run did, or begin"
            " without its optimizer state."
        )


def _refuse_other_groups(here: Sequence[Sequence[str]], numbers: Numbers) -> None:
    """Raise ``ValueError`` where the checkpoint divides the parameters into other groups: options belong to groups."""
    seen: dict[int, tuple[int, str]] = {}
    for number, names in enumerate(here):
        origins = {numbers[name][0]: name for name in names if name in numbers}
        for origin, name in origins.items():
            other = seen.setdefault(origin, (number, name))
            if other[0] != number or len(origins) > 1:
                pair = sorted({name, other[1], *origins.values()})[:2]
                raise ValueError(
                    f"{' and '.join(map(repr, pair))} are in one group on one side and in two on the other, whose"
                    " options may differ. Build the groups as the run did that wrote the checkpoint."
                )


def _matched(
    group: Group, names: Sequence[str], saved: Sequence[Mapping[str, Any]], numbers: Numbers
) -> dict[str, Any]:
    """Return the saved group that holds what is in ``group``, with its numbers in the order of ``names``."""
    found = [numbers.get(name, (None, None)) for name in names]
    origin = next((origin for origin, _ in found if origin is not None), None)
    options = _without_names(group if origin is None else saved[origin])
    return {**options, "params": [saved_id for _, saved_id in found]}


def check_route(name: str, group: Group, saved_group: Group) -> None:
    """Raise ``ValueError`` where a parameter was on another algorithm, or read by another layout."""
    if route(group) != route(saved_group):
        raise ValueError(
            f"{name!r} is on {route_words(group)} here and on {route_words(saved_group)} in the checkpoint."
            " Load with the plan (overrides) that the checkpoint was written with."
        )
