"""Models whose linear layers are quantised, under a plan: the logits of that model under a mask, eager and compiled.

Loaded as the `zigzag` command does, by torchao, and by transformers with bitsandbytes or from MXFP4.
"""

import json

import pytest
import torch
from dense_oracle import dense_oracle, logits_of, next_logits, stock
from gpu import needs_cuda
from safetensors.torch import save_file
from tiny_models import new_model, padded_prompt, windowed_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

import zigzag_ext as zz
from zigzag_ext.study import loading, weights

KINDS = ["streaming", "retrieval"]
PLAN = zz.Plan(KINDS, sink=4, window=16)
BATCH = padded_prompt([40, 23])
TOKENS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama as a user has it. The output head, of 199 rows, has no shape that the int4 kernels take."""
    path = tmp_path_factory.mktemp("model")
    new_model("llama", num_hidden_layers=len(KINDS)).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))).save_pretrained(path)
    return path


def error_of(model, compile: bool) -> float:
    """Relative error of the logits of an enabled model, each behind the tokens that it chose before."""
    batch = {name: tensor.to(model.device) for name, tensor in BATCH.items()}
    with zz.zigzag(model, PLAN, max_len=128, compile=compile):
        answer, logits = logits_of(model, TOKENS, **batch)
    with dense_oracle(model, KINDS, PLAN.sink, PLAN.window):
        expected = next_logits(model, answer, **batch)
    return ((logits.float() - expected).norm() / expected.norm()).item()


def kinds_of_linear(model) -> dict[str, str]:
    return {name: type(m.weight).__name__ for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name, linear, dtype, most", [
    ("int8", "Int8Tensor", torch.float32, 1e-4),
    ("int4", "Int4OpaqueTensor", torch.bfloat16, 0.06),
])  # fmt: skip
def test_codes_of_torchao_on_the_cpu(folder, name, linear, dtype, most, compile):
    pytest.importorskip("torchao")
    model, _ = loading.load_model(str(folder), "cpu", weights=name)
    kinds = kinds_of_linear(model)
    assert kinds.pop("lm_head") == "Int8Tensor" and set(kinds.values()) == {linear}
    assert type(model.model.embed_tokens.weight) is torch.nn.Parameter and model.dtype == dtype
    assert error_of(model, compile) < most


@needs_cuda
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name, linear", [("int8", "Int8Tensor"), ("int4", "Int4TilePackedTo4dTensor")])
def test_codes_of_torchao_on_a_gpu(folder, name, linear, compile):
    pytest.importorskip("torchao")
    model, _ = loading.load_model(str(folder), "cuda", weights=name)
    kinds = kinds_of_linear(model)
    assert kinds.pop("lm_head") == "Int8Tensor" and set(kinds.values()) == {linear}
    assert model.dtype == torch.bfloat16 and {weight.device.type for weight in model.parameters()} == {"cuda"}
    assert error_of(model, compile) < 0.06


# One token is multiplied by another kernel than many, and which columns int8 multiplies in 16 bits depends on all tokens.
BITSANDBYTES = {
    "nf4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}, "Params4bit", 0.01),
    "int8": ({"load_in_8bit": True}, "Int8Params", 0.05),
}


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_codes_of_bitsandbytes(folder, name, compile):
    pytest.importorskip("bitsandbytes")
    options, linear, most = BITSANDBYTES[name]
    given = {"quantization_config": BitsAndBytesConfig(**options), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder, **given).eval()
    assert type(model.model.layers[0].self_attn.q_proj.weight).__name__ == linear
    assert error_of(model, compile) < most


def test_results_name_the_codes(folder):
    pytest.importorskip("torchao")
    model, _ = loading.load_model(str(folder), "cpu", weights="int4")
    assert zz.evaluate.task.describe(model)["dtype"] == "bfloat16, Int4OpaqueTensor, Int8Tensor"
    assert zz.evaluate.task.describe(new_model("llama"))["dtype"] == "float32"


@pytest.mark.parametrize("options, given, message", [
    ({}, {"weights": "int3"}, "unsupported weights 'int3'; use int8 or int4"),
    ({}, {"weights": "int4", "dtype": "float16"}, "int4 weights are multiplied in bfloat16, the dtype asked for is float16"),
    ({}, {"device_map": "auto"}, "weights are quantised on one device"),
    ({}, {"tp": True}, "weights are quantised on one device"),
    ({"family": "mixtral", "num_local_experts": 4}, {}, r"\d+% of the weights of .* are no linear layer's, such as .*experts"),
    ({"family": "gpt2"}, {}, r"\d+% of the weights of .* are no linear layer's, such as .*c_fc.weight: they cannot be quantised"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, {}, "are quantised already"),
])  # fmt: skip
def test_what_cannot_be_quantised_is_refused_before_weights_are_read(tmp_path, options, given, message):
    pytest.importorskip("torchao")
    options = dict(options)
    new_model(options.pop("family", "llama"), num_hidden_layers=1, **options).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        loading.load_model(str(tmp_path), **{"weights": "int8"} | given)


def test_a_missing_torchao_is_named(monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="need the package torchao:  pip install torchao"):
        weights.check_weights("int8", "a model", None, "auto")


def test_mxfp4_checkpoints_come_as_bfloat16_on_the_cpu(tmp_path):
    """transformers has kernels for them on GPUs, with a package of its own; elsewhere it reads experts of gpt-oss as bfloat16."""
    model, state = windowed_model("gpt_oss", 8, num_hidden_layers=2), {}
    model.save_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = weight.shape  # blocks of 32 codes share an exponent, here of 1/32
            state[f"{name}_blocks"] = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
            state[f"{name}_scales"] = torch.full((experts, outputs, inputs // 32), 127 - 5, dtype=torch.uint8)
        else:
            state[name] = weight
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.embed_tokens"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with zz.zigzag(model):
        answer, logits = logits_of(model, TOKENS, **BATCH)
    with stock(model):
        expected = next_logits(model, answer, **BATCH)
    assert ((logits.float() - expected).norm() / expected.norm()).item() < 0.06
