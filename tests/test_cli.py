"""The command ``normuon plan``: what it prints for which model, and one sentence for every mistake."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import transformers

from normuon_plugins import cli, plan_parameters
from normuon_plugins.cli import main
from tests.models import tiny_llama

REMOTE_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

print("printed by the code of the model")


class OwnConfig(PretrainedConfig):
    model_type = "own"


class OwnTrunk(PreTrainedModel):
    config_class = OwnConfig


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.body = torch.nn.Linear(16, 32)
        self.head = torch.nn.Linear(32, 8)
        self.post_init()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder ``model`` with the config of ``tiny_llama()``, seen from the folder above it."""
    monkeypatch.chdir(tmp_path)
    config = tiny_llama().config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained("model")
    return tmp_path / "model"


@pytest.fixture
def change(folder):
    """A function that writes changes into the config of ``folder``."""

    def write(**changes):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return write


@pytest.fixture
def planned(monkeypatch):
    """A list of what ``plan_parameters`` was called with: the model and its options."""
    calls = []

    def record(model, **options):
        calls.append((model, options))
        return plan_parameters(tiny_llama())

    monkeypatch.setattr(cli, "plan_parameters", record)
    return calls


def printed(capsys, *words):
    """Return what ``normuon plan`` prints."""
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out


def refusal(capsys, *words):
    """Return the one line of an error that is no mistake of the command line."""
    assert main(["plan", *words]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = [line for line in output.err.splitlines() if not line.startswith("normuon plan: this is the default")]
    start = "normuon plan: error: "
    assert line.startswith(start)
    return line.removeprefix(start)


def on_meta(architecture, config):
    with torch.device("meta"):
        return getattr(transformers, architecture)(config)


@pytest.mark.parametrize("model", ["model", "model/", "./model", "model/config.json", "elsewhere.json"])
def test_folder_and_file_print_the_plan_of_their_model(folder, capsys, model):
    (folder.parent / "elsewhere.json").write_bytes((folder / "config.json").read_bytes())
    assert printed(capsys, model) == f"{plan_parameters(tiny_llama())}\n"


def test_nothing_is_said_when_the_config_says_everything(folder, capsys):
    main(["plan", "model"])
    assert capsys.readouterr().err == ""


def test_a_plan_without_a_matrix_is_printed_and_a_note_says_so(folder, capsys):
    assert main(["plan", "model", "--override", "_proj=adamw"]) == 0
    output = capsys.readouterr()
    assert not re.search("^model.* normuon ", output.out, re.MULTILINE)
    assert output.err.startswith("normuon plan: There is no matrix for NorMuon: all 21 trainable parameters went to")
    assert output.err.count("\n") == 1


def test_model_type_means_its_default_config_and_says_so(capsys):
    assert main(["plan", "gpt2"]) == 0
    output = capsys.readouterr()
    assert output.out == f"{plan_parameters(on_meta('GPT2LMHeadModel', transformers.GPT2Config()))}\n"
    assert "the default config of the model type 'gpt2'" in output.err


def test_a_folder_comes_before_a_model_type_of_its_name(folder, capsys):
    folder.rename("gpt2")
    assert printed(capsys, "gpt2") == f"{plan_parameters(tiny_llama())}\n"


def test_hub_id_is_asked_at_its_revision_without_trust(monkeypatch, capsys):
    asked = {}

    def answer(name, **options):
        asked.update(options, name=name)
        return tiny_llama().config

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", answer)
    assert printed(capsys, "organization/name", "--revision", "v2") == f"{plan_parameters(tiny_llama())}\n"
    assert asked == {"name": "organization/name", "revision": "v2", "trust_remote_code": False}


def test_json_has_the_rows(folder, capsys):
    assert json.loads(printed(capsys, "model", "--json")) == plan_parameters(tiny_llama()).to_dict()


def test_overrides_are_divided_at_the_first_equals_sign(folder, capsys):
    shown = printed(capsys, "model", "--override", "q_proj=o=16+16 i", "--override", r"\.down_proj\.=adamw")
    overrides = {"q_proj": "o=16+16 i", r"\.down_proj\.": "adamw"}
    assert shown == f"{plan_parameters(tiny_llama(), overrides=overrides)}\n"


def test_switches_change_the_plan_as_the_options_do(capsys):
    model = on_meta("GPTNeoXForCausalLM", transformers.GPTNeoXConfig())
    whole, split = plan_parameters(model, split_fused=False), plan_parameters(model)
    assert printed(capsys, "gpt_neox", "--no-split-fused") == f"{whole}\n" != f"{split}\n"


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], {}),
        (["--no-split-fused"], {"split_fused": False}),
        (["--per-head", "--strict"], {"per_head": True, "strict": True}),
        (["--override", "a=adamw"], {"overrides": {"a": "adamw"}}),
    ],
)
def test_options_of_the_plan_are_passed_on_and_only_those_that_were_given(folder, planned, words, options):
    assert main(["plan", "model", *words]) == 0
    assert planned[0][1] == options


def test_seventy_billion_parameters_take_no_memory(planned, change):
    def total():
        assert main(["plan", "model"]) == 0
        parameters = list(planned.pop()[0].parameters())
        assert all(parameter.is_meta for parameter in parameters)
        return sum(parameter.numel() for parameter in parameters)

    assert total() < 1e6  # where a failure costs nothing
    change(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, head_dim=128)
    assert total() > 65e9


def test_the_class_that_the_config_names_is_the_one_shown(change, capsys):
    change(architectures=["LlamaForSequenceClassification"])
    expected = on_meta("LlamaForSequenceClassification", tiny_llama().config)
    assert printed(capsys, "model") == f"{plan_parameters(expected)}\n"


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "AutoModelForSequenceClassification"])
def test_architecture_replaces_the_class_of_the_config(folder, capsys, name):
    expected = on_meta("LlamaForSequenceClassification", tiny_llama().config)
    assert printed(capsys, "model", "--architecture", name) == f"{plan_parameters(expected)}\n"


def test_a_decoder_is_built_from_the_text_part_of_a_config(planned):
    assert main(["plan", "llama4", "--architecture", "Llama4ForCausalLM"]) == 0
    assert isinstance(planned[0][0].config, transformers.Llama4TextConfig)


def test_of_several_classes_for_one_config_the_usual_one_is_shown(planned):
    # AutoModel knows two for a Funnel, with and without its decoder
    assert main(["plan", "funnel", "--architecture", "AutoModel"]) == 0
    assert type(planned[0][0]).__name__ == "FunnelModel"


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "LlamaForCausalLM"),
        # an encoder, though it can be made a decoder
        ("bert", "BertForMaskedLM"),
        # the whole, not its decoder
        ("bart", "BartForConditionalGeneration"),
        ("whisper", "WhisperForConditionalGeneration"),
        ("llama4", "Llama4ForConditionalGeneration"),
        ("vit", "ViTForImageClassification"),
        ("siglip", "SiglipModel"),
        ("sam", "SamModel"),
        # known to no AutoModel
        ("superpoint", "SuperPointForKeypointDetection"),
    ],
)
def test_a_config_that_names_no_class_gets_the_usual_one_and_says_so(planned, capsys, model_type, name):
    assert main(["plan", model_type]) == 0
    assert type(planned[0][0]).__name__ == name
    assert f"names no class; this is the plan of {name} " in capsys.readouterr().err


def test_a_class_that_transformers_lacks_is_replaced_and_named(change, capsys):
    change(architectures=["LLaMAForCausalLM"])
    assert main(["plan", "model"]) == 0
    output = capsys.readouterr()
    assert output.out == f"{plan_parameters(tiny_llama())}\n"
    assert "fits 'LLaMAForCausalLM' of the config; this is the plan of LlamaForCausalLM" in output.err


def test_a_class_of_the_model_itself_is_replaced_and_the_option_that_builds_it_is_named(change, capsys):
    change(architectures=["OwnModel"], auto_map={"AutoModelForCausalLM": "code.OwnModel"})
    assert main(["plan", "model"]) == 0
    output = capsys.readouterr()
    assert output.out == f"{plan_parameters(tiny_llama())}\n"
    assert "this is the plan of LlamaForCausalLM (--trust-remote-code builds the config's own)" in output.err


def test_a_quantized_config_is_planned_unquantized_and_says_so(change, capsys):
    change(quantization_config={"quant_method": "fp8"}, dtype="float8_e4m3fn")
    assert main(["plan", "model"]) == 0
    output = capsys.readouterr()
    assert output.out == f"{plan_parameters(tiny_llama())}\n"
    assert output.err == "normuon plan: the config is quantized; this is the plan of the unquantized architecture.\n"


def test_a_kernel_that_is_not_installed_is_not_needed(change, capsys):
    change(attn_implementation="flash_attention_2")
    assert printed(capsys, "model") == f"{plan_parameters(tiny_llama())}\n"


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A folder with a config whose classes are in a file beside it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "remote"
    folder.mkdir()
    names = {"AutoConfig": "code.OwnConfig", "AutoModel": "code.OwnTrunk", "AutoModelForCausalLM": "code.OwnModel"}
    config = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(REMOTE_CODE)
    return folder


@pytest.mark.parametrize("name", ["remote", "remote/config.json"])
def test_code_of_a_model_is_not_run_unless_trusted(remote, capsys, name):
    assert "add --trust-remote-code" in refusal(capsys, name)


def test_module_prints_a_model_with_code_of_its_own_and_nothing_else(remote, root, tmp_path):
    command = [sys.executable, "-m", "normuon_plugins", "plan", "remote/config.json", "--trust-remote-code"]
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    spec = importlib.util.spec_from_file_location("own_code", remote / "code.py")
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    assert (done.returncode, done.stdout) == (0, f"{plan_parameters(code.OwnModel(code.OwnConfig()))}\n")
    assert "printed by the code of the model" in done.stderr


def test_a_reader_that_stops_early_causes_no_traceback(folder, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["plan", "model", "--json"]) == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "normuon: error: the following arguments are required: COMMAND"),
        (["plans"], "normuon: error: argument COMMAND: invalid choice: 'plans'"),
        (["plan"], "normuon plan: error: the following arguments are required: MODEL_OR_CONFIG"),
        (["plan", "model", "--overide", "a=adamw"], "normuon plan: error: unrecognized arguments: --overide a=adamw"),
        (["plan", "model", "--over", "a=adamw"], "normuon plan: error: unrecognized arguments: --over a=adamw"),
        (["plan", "model", "--override", "q_proj"], "'q_proj' is not PATTERN=TARGET, such as 'down_proj=adamw'"),
        (["plan", "model", "--override", "=adamw"], "'=adamw' is not PATTERN=TARGET"),
        (["plan", "model", "--override", "q_proj="], "'q_proj=' is not PATTERN=TARGET"),
        (["plan", "model", "--override", "a=adamw", "--override", "a=normuon"], "the pattern 'a' is given twice"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_exits_with_2(capsys, words, sentence):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    output = capsys.readouterr()
    assert (stopped.value.code, output.out, output.err.count("\n")) == (2, "", 1)
    assert sentence in output.err
    assert output.err.endswith("--help\n")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model", "--override", "nothing=adamw"], "override 'nothing' matches no trainable parameter"),
        (["model", "--override", "(=adamw"], "override '(' is no regular expression"),
        (["model", "--override", "q_proj=adam"], "layout 'adam' is not understood"),
        (["model", "--override", "q_proj=o=8+8 i"], "add up to 16; shape (32, 32) has 32"),
        (["model", "--override", "_proj=adamw", "--strict"], "strict=True: There is no matrix for NorMuon"),
        (["model", "--architecture", "llamaforcausallm"], "no model class 'llamaforcausallm'; did you mean LlamaForC"),
        (["model", "--architecture", "LlamaConfig"], "transformers has no model class 'LlamaConfig'"),
        (["model", "--architecture", "BertForMaskedLM"], "BertForMaskedLM cannot be built from the LlamaConfig of"),
        (["model", "--architecture", "AutoModelForCTC"], "AutoModelForCTC cannot be built from the LlamaConfig of"),
        (["model", "--architecture", "LlamaPreTrainedModel"], "the model has no parameters"),
        (["siglip_text_model"], "no auto class of transformers knows the SiglipTextConfig of 'siglip_text_model'"),
        (["model/gone.json"], "there is no file or folder 'model/gone.json'"),
        (["./gone"], "there is no file or folder './gone'"),
        (["organization/name"], "no file or folder is called 'organization/name'; of the hub, transformers says: We "),
        (["lama"], "no file or folder is called 'lama' (similar model types: llama, "),
    ],
)
def test_a_refusal_is_one_sentence_and_exits_with_1(folder, capsys, words, sentence):
    assert sentence in refusal(capsys, *words)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("broken.json", "{", "is not a valid JSON file"),
        ("list.json", "[]", "Should have a `model_type` key"),
        ("unknown.json", '{"model_type": "lama"}', "has model type `lama` but Transformers does not recognize"),
        ("text.json", '{"model_type": "llama", "hidden_size": "32"}', "Field 'hidden_size' expected int, got str"),
        ("model.safetensors", "weights", "'model.safetensors' is no JSON file; name a config.json or its folder"),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_line(tmp_path, monkeypatch, capsys, name, text, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(text)
    assert sentence in refusal(capsys, name)


@pytest.mark.parametrize(
    ("file", "sentence"),
    [("model.safetensors", "has no config.json"), ("adapter_config.json", "holds an adapter only")],
)
def test_a_folder_without_a_config_is_refused(tmp_path, capsys, file, sentence):
    (tmp_path / file).touch()
    assert sentence in refusal(capsys, str(tmp_path))


def test_a_missing_package_is_named_in_the_words_of_transformers(folder, monkeypatch, capsys):
    def refuse(model, config):
        raise ImportError("\nLlamaForCausalLM requires the timm library but it was not found.\n`pip install timm`\n")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", refuse)
    words = "LlamaForCausalLM requires the timm library but it was not found. `pip install timm`"
    assert refusal(capsys, "model") == f"no model can be built from 'model': {words}"


def test_missing_transformers_is_a_command_to_run(monkeypatch, capsys):
    monkeypatch.setattr("normuon_plugins.extras.find_spec", lambda package: None)
    assert 'transformers is not installed; run: pip install "normuon-plugins[hf]"' in refusal(capsys, "llama")


def test_help_shows_two_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.count("\n  normuon plan ") == 2
