"""Private names of dependencies that ``engine/private.py`` uses are still there; each failure names its dependency."""

import re

import torch
from toy import ROOT
from transformers import AutoModelForCausalLM, PreTrainedModel

from casehard.engine import private

PRIVATE = r"_no_split|__dict__|_compiled_call_impl|\._attn_implementation|_supports_att|_hf_peft|_step_supports|\._parameters|_foreach|\._version"


def test_the_private_names_of_torch_transformers_and_peft_are_there_and_in_one_file(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert private.layer_classes(model) == {"LlamaDecoderLayer"}, "transformers: _no_split_modules"
    assert private.attention_takes_masks(model), "transformers: _supports_attention_backend, config._attn_implementation"
    assert hasattr(PreTrainedModel, "_hf_peft_config_loaded"), "transformers: _hf_peft_config_loaded"
    model._hf_peft_config_loaded = model.peft_config = True
    private.forget_adapters(model)
    assert not model._hf_peft_config_loaded, "transformers: _hf_peft_config_loaded"
    assert not hasattr(model, "peft_config"), "peft: peft_config"
    layer = torch.nn.Linear(2, 2)
    assert list(private.parameters_of(layer)) == ["weight", "bias"], "torch: Module._parameters"
    assert not private.runs_compiled(layer), "torch: Module._compiled_call_impl"
    layer.compile(backend="eager")
    assert private.runs_compiled(layer), "torch: Module._compiled_call_impl"
    adamw = torch.optim.AdamW(layer.parameters(), fused=True)
    assert adamw._step_supports_amp_scaling, "torch: Optimizer._step_supports_amp_scaling"
    private.clip_unscaled(adamw)
    assert not adamw._step_supports_amp_scaling, "torch: Optimizer._step_supports_amp_scaling"
    pair = [torch.ones(2), torch.ones(3)]
    private.copy_all(pair, [torch.full((2,), 2.0), torch.full((3,), 3.0)])
    private.add_all(pair, pair, 0.5)
    found = private.subtract_all(private.multiply_all(pair, 2.0), pair)
    assert [t.tolist() for t in found] == [[3.0, 3.0], [4.5, 4.5, 4.5]], "torch: _foreach_copy_, _add_, _mul, _sub"
    users = {file.name for file in (ROOT / "engine").glob("*.py") if re.search(PRIVATE, file.read_text())}
    assert users == {"private.py"}
