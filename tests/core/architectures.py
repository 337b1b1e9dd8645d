"""What every parameter of every architecture of transformers is, without the package: by class, identity and position.

Ground truth for the plan. It shares no code with the rules: it asks isinstance of the classes of torch and transformers
(the rules may not import the latter) and marks heads by giving every model an odd number of labels.
"""

import re
import warnings

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

# No other size in a default config is this one, so that an output of so many numbers is a head.
LABELS = 1013
MAPPINGS = (
    "CAUSAL_LM",
    "MASKED_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_CLASSIFICATION",
    "SEQUENCE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "CTC",
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_TEXT_TO_TEXT",
)
# Experts stored (experts, in, out), read off their forward.
TRANSPOSED_EXPERTS = {"AriaExperts", "GptOssExperts", "Llama4TextExperts", "OpenAIPrivacyFilterExperts"}
# Raw parameters that tokens are multiplied with, and the dimension of their neurons.
RAW_PROJECTIONS = {
    ("Gemma3MultiModalProjector", "mm_input_projection_weight"): 1,
    ("T5Gemma2MultiModalProjector", "mm_input_projection_weight"): 1,
    ("ZambaMambaMixer", "x_proj_weight"): 1,
    ("ZambaMambaMixer", "dt_proj_weight"): 1,
    ("RecurrentGemmaRglru", "input_gate_weight"): 2,
    ("RecurrentGemmaRglru", "recurrent_gate_weight"): 2,
    ("XLNetRelativeAttention", "q"): 2,
    ("XLNetRelativeAttention", "k"): 2,
    ("XLNetRelativeAttention", "v"): 2,
    ("XLNetRelativeAttention", "r"): 2,
    ("XLNetRelativeAttention", "o"): 0,
    ("FunnelRelMultiheadAttention", "r_kernel"): 2,
}
_LAYER = re.compile(r"\.(layers?|h|blocks?|block|stages?|resblocks|groups|conformer\w*|\w*layers?)\.\d+\.")


def architectures():
    """Return class name -> model type, for every class that the mappings name."""
    found = {}
    for mapping in MAPPINGS:
        for model_type, names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, model_type)
    return found


def build(name, model_type):
    """Return the model of the default config on the meta device, or the error of transformers that there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of default configs, about themselves
            model_class = getattr(transformers, name)
            config = CONFIG_MAPPING[model_type]()
            if not isinstance(config, model_class.config_class):
                config = model_class.config_class()
            config.num_labels = LABELS
            with torch.device("meta"):
                return model_class(config)
    except Exception as error:  # default configs that need another package, or that are no whole config
        return error


def expected(model):
    """Return name -> "adamw", or the dimension of the neurons of a matrix parameter; None where both would be right."""
    modules = dict(model.named_modules())
    heads = _heads(model, modules)
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(parameter, []).append(name)
    return {
        name: _expected(model, modules, heads, name, parameter, tied[parameter])
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _heads(model, modules):
    heads = set()
    for module in modules.values():
        if isinstance(module, transformers.PreTrainedModel):
            try:
                heads.add(module.get_output_embeddings())
            except (NotImplementedError, AttributeError):
                continue
    return heads - {None}


def _expected(model, modules, heads, name, parameter, names):
    owners = [modules[each.rpartition(".")[0]] for each in names]
    owner, attribute = owners[0], name.rpartition(".")[2]
    if parameter.ndim < 2 or any(isinstance(each, nn.Embedding) or each in heads for each in owners):
        return "adamw"
    above = [type(modules[name[:end]]).__name__ for end in (dot.start() for dot in re.finditer(r"\.", name))]
    if any(re.search("Router|TopKGat|TokenChoice", kind) for kind in above) or "router" in name:
        return "adamw"
    if isinstance(owner, nn.Linear) and any("PatchEmbed" in kind for kind in above):
        return "adamw"
    if type(owner).__name__ == "QuantLinear" and attribute == "weight":  # of I-BERT, which has an nn.Linear of its own
        return 0
    if type(owner).__name__.endswith(("Experts", "ParallelExperts")) and parameter.ndim == 3:
        return 2 if type(owner).__name__ in TRANSPOSED_EXPERTS else 1
    if isinstance(owner, Conv1D):
        return 1
    if isinstance(owner, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)):
        return _expected_of_layer(model, owner, name, parameter)
    if isinstance(owner, nn.MultiheadAttention):
        return 0
    return RAW_PROJECTIONS.get((type(owner).__name__, attribute), "adamw")


def _expected_of_layer(model, owner, name, parameter):
    transposed = isinstance(owner, (nn.ConvTranspose1d, nn.ConvTranspose2d))
    rows, cols = parameter.shape[int(transposed)], parameter.shape[1 - int(transposed)]
    if name.endswith("gate.weight") and rows == getattr(model.config, "num_experts", None):
        return "adamw"
    if min(rows, cols * parameter[0, 0].numel()) <= 1 or 0 in parameter.shape:
        return "adamw"  # no matrix
    if not isinstance(owner, nn.Linear):
        if owner.in_channels == owner.groups or (transposed and owner.groups > 1):
            return "adamw"
        if owner.in_channels <= 4 and owner.kernel_size == owner.stride and max(owner.kernel_size) > 1:
            return "adamw"  # a patch of pixels
        if owner.in_channels <= 4:
            return None  # the first layer of a convolutional stem, or overlapping patches
    if LABELS in (rows, cols):
        return "adamw"
    if _LAYER.search(f".{name}"):
        return int(transposed)
    prefix = model.base_model_prefix
    beside = hasattr(model, prefix) and not name.startswith(f"{prefix}.")
    return "adamw" if beside and isinstance(owner, nn.Linear) else None
