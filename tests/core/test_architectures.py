"""The plan over every architecture of transformers that instantiates, against ``tests/core/architectures.py``."""

from functools import cache

import pytest
import transformers

from normuon_plugins import NorMuon, plan_parameters
from normuon_plugins.core.layout import parse_layout
from tests.core.architectures import architectures, build, expected
from tests.core.fused_truth import FUSED

PARTS = 8
# Of 562 classes; the rest say what they lack (timm, natten, ...) or have default configs that are no whole config.
INSTANTIATE = 520


@pytest.fixture(scope="module")
def models():
    """Return the classes in parts, so that a failure does not hide the others, and count what is built."""
    transformers.logging.set_verbosity_error()
    names = sorted(architectures().items())
    return [names[part::PARTS] for part in range(PARTS)], {"built": 0, "fused": set()}


@pytest.mark.parametrize("part", range(PARTS))
def test_every_parameter_is_where_class_and_identity_say(models, part):
    parts, counts = models
    wrong = []
    for name, model_type in parts[part]:
        model = build(name, model_type)
        if isinstance(model, Exception):
            continue
        counts["built"] += 1
        rows = {row.name: row for row in plan_parameters(model)}
        truth = expected(model)
        assert rows.keys() == truth.keys()  # every trainable parameter once, tied ones under their first name
        for parameter, want in truth.items():
            found = _neuron_dimension(rows[parameter])
            if want is not None and found != want:
                wrong.append((name, parameter, want, rows[parameter]))
        wrong += _wrongly_divided(model, rows, counts["fused"])
    assert not wrong


def test_the_sweep_saw_all_that_instantiates_and_nearly_all_fused_weights(models):
    _, counts = models
    assert counts["built"] >= INSTANTIATE
    assert len(counts["fused"]) >= 190


def test_groups_of_an_awkward_architecture_hold_every_parameter_once():
    model = build("DeepseekV3ForCausalLM", "deepseek_v3")
    optimizer = NorMuon(plan_parameters(model).param_groups())
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len({*held}) == sum(1 for _ in model.parameters())


def _neuron_dimension(row):
    if row.layout is None:
        return "adamw"
    return parse_layout(row.layout).axes.index("o")


def _wrongly_divided(model, rows, seen):
    """Return the fused weights of ``model`` whose blocks are not those that its forward makes."""
    wrong = []
    for path, module in model.named_modules():
        for attribute, (interleaved, sizes) in _facts().get(type(module).__name__, {}).items():
            prefix = f"{path}.{attribute}" if path else attribute
            row = rows.get(f"{prefix}.weight", rows.get(prefix))
            if row is None or row.layout is None:
                continue
            want = [size for size in sizes(module) if size]
            neurons = row.shape[_neuron_dimension(row)]
            turns = neurons // sum(want) if interleaved else 1
            found = parse_layout(row.layout)
            seen.add((type(module).__name__, attribute))
            if len(want) > 1 and (found.blocks, found.interleaved) != (tuple(want), turns > 1):
                wrong.append((path, attribute, want, row))
    return wrong


@cache
def _facts():
    """Return FUSED by holder."""
    facts = {}
    for (holder, attribute), fact in FUSED.items():
        facts.setdefault(holder, {})[attribute] = fact
    return facts
