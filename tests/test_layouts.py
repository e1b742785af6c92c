"""Layouts for accelerators, on the CPU: the same results, few sizes, and no question to the device in a step."""

import gc
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location

import lightning as L
import pytest
import torch
from test_forward import LLAMA, MODELS, assert_equals_one_by_one, batch_of, build, one_by_one, picked, sft_loss
from test_patcher import ATTACKER, data
from test_sbr import rows_of
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from toy import ROOT, toy_data, toy_trainer
from transformers import AutoTokenizer

from casehard import Backbone, Defense, Optimizer, PatcherModule, SBRModule
from casehard.datamodules.batches import Batches
from casehard.datamodules.chat import IGNORED, collate, encode_rows
from casehard.datamodules.order import permutation, uniform
from casehard.datamodules.sources import read_rows
from casehard.engine import layouts, varlen
from casehard.engine.forward import laid_out, placed, run, takes_rows_end_to_end, use_layout
from casehard.engine.generation import _draws, generate
from casehard.engine.layouts import LAYOUTS, Packed, end_to_end, known, labels_of, padded, rounded_up
from casehard.engine.prefix_tree import pack
from casehard.engine.private import Unasked
from casehard.lightning_modules import defense

FAMILIES = {
    "llama": "llama, tied",
    "qwen2": ("qwen2", LLAMA),
    "gemma3, narrow window": ("gemma3_text", LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}),
    "gpt_neox": ("gpt_neox", {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}),
}
TAKES = {  # rows end to end; of MODELS
    "llama, tied": True,
    "llama, untied": True,
    "llama, eager": False,
    "gpt2, learned positions": True,
    "gemma2, soft-capped": False,
    "granite, scaled": True,
    "mistral, narrow window": True,
    "lfm2, convolutions": False,
    "bloom, no positions": False,
    "mamba, recurrent": False,
}


@pytest.fixture(params=FAMILIES)
def family(request, monkeypatch):
    name = FAMILIES[request.param]
    if isinstance(name, tuple):
        monkeypatch.setitem(MODELS, request.param, (*name, True))
        name = request.param
    return lambda **settings: build(name, **settings)


# ---- sizes


def test_sizes_are_few_and_near():
    sizes = [rounded_up(number) for number in range(1, 70_000)]
    assert all(size >= number for number, size in enumerate(sizes, start=1))
    assert all(size % 8 == 0 for size in sizes)
    assert all(rounded_up(size) == size for size in set(sizes))
    assert {2**power for power in range(3, 17)} <= set(sizes)
    for power in range(8, 16):
        between = [size for size in set(sizes) if 2**power < size <= 2 ** (power + 1)]
        assert len(between) == 6
    assert max(size / number for number, size in enumerate(sizes, start=1) if number > 200) < 1.16


def test_rows_lie_end_to_end_by_hand():
    ids = torch.tensor([[5, 6, 7, 0], [0, 0, 8, 9]])
    found = end_to_end(ids, torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]]))
    assert found.input_ids.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0]]
    assert found.positions.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0]]
    assert found.token_index.tolist() == [[0, 1, 2, 0], [0, 0, 3, 4]]
    assert found.starts is not None
    assert found.starts.tolist() == [0, 3, 5, 8]
    assert found.attention_mask is None
    assert found.longest == 4
    assert end_to_end(ids, torch.ones_like(ids), at_least=24).input_ids.shape == (1, 24)


def test_padded_rows_may_keep_their_width():
    ids, mask = torch.tensor([[5, 6, 7, 0, 0], [0, 0, 8, 9, 0]]), torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 0]])
    for width, filler in ((None, []), (5, [0, 0])):
        found = padded(ids, mask, width)
        assert found.input_ids.tolist() == [[5, 6, 7, *filler], [8, 9, 0, *filler]]
        assert found.token_index.tolist() == [[0, 1, 2, 0, 0], [0, 0, 3 + len(filler), 4 + len(filler), 0]]


# ---- the same results


@pytest.mark.parametrize("name", MODELS)
def test_models_are_tried_on_rows_end_to_end(name):
    model = build(name)
    before = model.config._attn_implementation
    assert takes_rows_end_to_end(model) == TAKES[name]
    assert model.config._attn_implementation == ("casehard_varlen" if TAKES[name] else before)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_states_and_logits_are_those_of_rows_one_by_one(family, layout, padding_side):
    model = family()
    use_layout(model, layout, torch.float32)
    assert_equals_one_by_one(model, batch_of(3, padding_side), layers=(-1, 1))
    assert_equals_one_by_one(model, placed(model, batch_of(3, padding_side)), layers=(-1, 1))


def test_loss_and_gradient_are_the_same_in_every_layout(family):
    model, found = family(), {}
    for layout in LAYOUTS:
        use_layout(model, layout, torch.float32)
        model.zero_grad()
        loss = sft_loss(model, placed(model, batch_of(5)))
        loss.backward()
        found[layout] = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    for layout in LAYOUTS[1:]:
        assert_close(found[layout], found["prefix_tree"], rtol=1e-4, atol=1e-5)


def test_answers_are_the_same_in_every_layout(family, checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = family(vocab_size=len(tokenizer))
    prompts = [list(range(4 + i, 11 + 3 * i)) for i in range(7)]
    found = []
    for layout in LAYOUTS:
        use_layout(model, layout, torch.float32)
        found.append(generate(model, tokenizer, prompts, 7, batch_size=4))
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) > 3


def test_padded_rows_lie_end_to_end_where_that_is_less_to_compute():
    model = build("llama, tied")
    use_layout(model, "padded", torch.float32)
    lengths = {"like": [31, 32, 32, 32, 32, 32, 31, 30], "unlike": [5, 6, 7, 5, 6, 7, 8, 60]}
    found = {}
    for name, several in lengths.items():
        rows = [{"input_ids": [3 + i % 50 for i in range(n)], "labels": [-100] * (n - 1) + [4]} for n in several]
        batch = placed(model, collate(rows, 0, "left"))
        found[name] = laid_out(model, batch).starts is not None
        assert laid_out(model, placed(model, batch)) is laid_out(model, batch)  # twice is once
        assert_equals_one_by_one(model, batch)
    assert found == {"like": False, "unlike": True}


def test_a_window_narrower_than_the_rows_is_kept_to_end_to_end():
    model = build("mistral, narrow window")
    use_layout(model, "varlen", torch.float32)
    batch = batch_of(1)
    assert batch["attention_mask"].sum(dim=1).max() > 2 * 8
    with torch.no_grad():
        states = run(model, batch, states_at=batch["attention_mask"].bool()).states[0]
    assert_close(states, picked(one_by_one(model, batch)[0], batch, batch["attention_mask"].bool()), rtol=1e-4, atol=1e-4)


def test_rows_end_to_end_see_nothing_of_each_other():
    model = build("llama, tied")
    use_layout(model, "varlen", torch.float32)
    batch = batch_of(2, num_rows=3)
    other = batch | {"input_ids": batch["input_ids"].clone()}
    other["input_ids"][0] = 7
    later = torch.arange(3)[:, None] > 0
    with torch.no_grad():
        ours, others = (run(model, b, states_at=b["attention_mask"].bool() & later).states[0] for b in (batch, other))
    assert torch.equal(ours, others)


def test_a_masked_pass_of_a_model_with_rows_end_to_end_is_transformers_own():
    model, plain = build("llama, tied"), build("llama, tied")
    use_layout(model, "varlen", torch.float32)
    batch = batch_of(4, "left")
    ours, theirs = (m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits for m in (model, plain))
    assert torch.equal(ours, theirs)


def test_what_the_kernel_lacks_is_refused():
    x = torch.ones(1, 2, 4, 8)
    for settings in ({"dropout": 0.1}, {"softcap": 2.0}, {"s_aux": torch.ones(2)}):
        with pytest.raises(NotImplementedError, match="has no dropout"):
            varlen.attention(torch.nn.Identity(), x, x, x, None, cu_seq_lens_q=torch.tensor([0, 4]), **settings)


# ---- what is known of a batch


def test_a_layout_is_worked_out_once_and_anew_where_the_batch_was_changed():
    model = build("llama, tied")
    for layout in LAYOUTS[:2]:
        use_layout(model, layout, torch.float32)
        batch = batch_of(6)
        first = laid_out(model, batch)
        assert laid_out(model, batch | {"labels": torch.full_like(batch["labels"], -100)}) is first
        assert laid_out(model, batch | {"attention_mask": batch["attention_mask"].clone()}) is not first
        again = laid_out(model, batch)
        batch["input_ids"][0, 0] = 9
        assert laid_out(model, batch) is not again
        assert 9 in laid_out(model, batch).input_ids


def test_labels_are_found_anew_where_they_were_changed():
    batch = batch_of(6)
    first = labels_of(batch["labels"])
    assert labels_of(batch["labels"]) is first
    batch["labels"][0] = -100
    assert len(labels_of(batch["labels"]).at) < len(first.at)


def test_nothing_is_known_of_a_batch_that_is_gone():
    model = build("llama, tied")
    use_layout(model, "varlen", torch.float32)
    gc.collect()
    before = len(layouts._KNOWN)
    batch = placed(model, batch_of(6))
    assert len(layouts._KNOWN) == before + 2
    del batch
    gc.collect()
    assert len(layouts._KNOWN) == before


def test_what_is_known_moves_along():
    model = build("llama, tied")
    use_layout(model, "varlen", torch.float32)
    batch = placed(model, batch_of(6))
    there = layouts.moved(batch, torch.device("meta"))
    moved = known(there["input_ids"], layouts.END_TO_END, there["attention_mask"])
    assert isinstance(moved, Packed)
    assert moved.input_ids.is_meta
    assert labels_of(there["labels"]).at.is_meta
    assert known(there["input_ids"], layouts.END_TO_END, batch["attention_mask"]) is None


# ---- a step


class Asked(Unasked):
    """Notes what a host would wait for, if it were a device that was asked."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.names: list[str] = []

    def refuse(self, operation: str) -> None:
        self.names.append(operation)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("defense", ["sft", "sbr", "sbr in turns"])
def test_a_step_asks_the_device_nothing(checkpoint, monkeypatch, layout, defense):
    settings = {"anchors": "sandbox:defender/refusals#train[:6]", "anchors_per_step": 2 if "turns" in defense else None}
    backbone = Backbone(layout=layout)
    module = SBRModule(checkpoint, backbone=backbone, **settings) if "sbr" in defense else Defense(checkpoint, backbone=backbone)
    module.configure_model()
    job = module.job()
    job.begin()
    batch = module.placed(collate(rows_of(), 0, "right") | {"num_labels": torch.tensor(9.0)})
    if "turns" in defense:  # those of a turn come from the host, as a batch does
        anchors = job.anchors.batch(module.model, job.anchors.turn(2, 0))
        monkeypatch.setattr(job.anchors, "batch", lambda model, turn: anchors)
    with Asked() as asked:
        job.loss(batch, 0).backward()
    assert asked.names == []
    monkeypatch.setattr(layouts, "_KNOWN", type(layouts._KNOWN)())
    with Asked() as asked:
        job.loss(batch, 0).backward()
    assert asked.names != []  # it does see what is asked


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 40])
def test_the_kernel_gives_the_sums_under_the_mask(window):
    torch.manual_seed(0)
    starts = torch.tensor([0, 100, 101, 160, 192], dtype=torch.int32, device="cuda")
    q = torch.randn(1, 4, 192, 64, device="cuda", requires_grad=True)
    k, v = torch.randn(2, 1, 2, 192, 64, device="cuda", requires_grad=True)
    found = []
    for dtype in (torch.float32, torch.bfloat16):  # under the mask, by the kernel
        rows = {"cu_seq_lens_q": starts, "max_length_q": 128, "sliding_window": window, "scaling": 0.1}
        out, _ = varlen.attention(torch.nn.Identity(), q.to(dtype), k.to(dtype), v.to(dtype), None, **rows)
        found.append([out.float(), *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    for ours, others in zip(found[1], found[0], strict=True):  # one number may be what is left of large ones, rounded
        assert (ours - others).norm() <= 1e-2 * others.norm()


def test_no_list_is_sent_to_the_device_as_an_index(checkpoint):
    module = SBRModule(checkpoint, anchors="sandbox:defender/refusals#train[:6]", anchors_per_step=2)
    module.configure_model()
    job, lists = module.job(), []

    class Lists(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.__getitem__ and isinstance(args[1], list):
                lists.append(args[0])
            return func(*args, **(kwargs or {}))

    job.begin()
    batch = module.placed(collate(rows_of(), 0, "right") | {"num_labels": torch.tensor(9.0)})
    with Lists():
        job.loss(batch, 0)
    assert any(indexed is job.anchors.ids for indexed in lists)  # on the host
    assert not any(indexed is job.state["aligned_states"] for indexed in lists)


@pytest.mark.gpu
@pytest.mark.parametrize("anchors_per_step", [None, 2])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_a_step_on_a_gpu_waits_for_nothing(checkpoint, layout, anchors_per_step):
    settings = {"anchors": "sandbox:defender/refusals#train[:6]", "anchors_per_step": anchors_per_step}
    module = SBRModule(checkpoint, backbone=Backbone(layout=layout), **settings)
    module.configure_model()
    module.to("cuda")
    job = module.job()
    with torch.autocast("cuda", torch.bfloat16):
        job.begin()
        for step in range(3):
            batch = module.placed(collate(rows_of(), 0, "right") | {"num_labels": torch.tensor(9.0)})
            torch.cuda.set_sync_debug_mode("error" if step else "default")  # first there is something to load
            try:
                job.loss(batch, step).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_auto_is_rows_end_to_end_on_a_gpu_in_half_precision(checkpoint):
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        model = Defense(checkpoint)._whole().to("cuda")
        use_layout(model, "auto", dtype)
        found.append(layouts.layout_of(model))
    assert found == ["varlen", "padded"]


class Watch(L.Callback):
    """What is asked of the device in each step of ``fit``, from the batch on the device to the end of the optimizer's step."""

    def __init__(self) -> None:
        self.names: list[list[str]] = []

    def on_train_batch_start(self, *_: object) -> None:
        self.mode = Asked()
        self.mode.__enter__()

    def on_train_batch_end(self, *_: object) -> None:
        self.mode.__exit__(None, None, None)
        self.names.append(self.mode.names)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("defense", ["sft", "sbr", "patcher"])
def test_no_step_of_fit_asks_the_device_anything_but_those_with_an_inner_attack(checkpoint, tmp_path, layout, defense):
    patcher = {"attacker": ATTACKER, "num_outer_steps": 8, "num_sft_steps": 1}
    kinds = {"sft": (Defense, {}, toy_data), "sbr": (SBRModule, {}, toy_data), "patcher": (PatcherModule, patcher, data)}
    kind, settings, rows = kinds[defense]
    module, watch = kind(checkpoint, backbone=Backbone(layout=layout), **settings), Watch()
    toy_trainer(tmp_path, max_steps=4, callbacks=[watch]).fit(module, datamodule=rows())
    assert [bool(names) for names in watch.names] == [False, defense == "patcher", False, False]  # its rows come from the host


def test_anchors_in_turns_have_one_size(checkpoint):
    anchors = "sandbox:defender/refusals#train[:12]"
    module = SBRModule(checkpoint, anchors=anchors, anchors_per_step=3, backbone=Backbone(layout="varlen"))
    module.configure_model()
    job, batch, sizes = module.job(), module.placed(collate(rows_of(), 0, "right")), set()
    job.begin()
    alone = laid_out(module.model, batch).input_ids.shape[1]
    module.model.register_forward_pre_hook(lambda _, args, kwargs: sizes.add(kwargs["input_ids"].shape), with_kwargs=True)
    for step in range(12):
        job.loss(batch, step)
    longest = job.anchors.mask.sum(dim=1).sort().values[-3:].sum()
    assert len(sizes) == 1
    assert alone + longest <= next(iter(sizes))[1] < alone + longest + 8


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("defense", ["sft", "sbr", "patcher", "patcher, one pass a row"])
def test_training_ends_at_the_same_weights_in_every_layout(checkpoint, tmp_path, layout, defense):
    patcher = {"attacker": ATTACKER, "num_outer_steps": 2, "num_sft_steps": 1, "one_pass_per_row": "one pass" in defense}
    kinds = {"sft": (Defense, {}, toy_data), "sbr": (SBRModule, {"anchors_per_step": 3}, toy_data)}
    kind, settings, rows = kinds.get(defense, (PatcherModule, patcher, data))
    found = []
    for each in ("prefix_tree", layout):
        module = kind(checkpoint, optimizer=Optimizer(1e-2, "sgd"), backbone=Backbone(layout=each), **settings)
        toy_trainer(tmp_path, max_steps=4).fit(module, datamodule=rows())
        found.append({name: p.detach() for name, p in module.model.named_parameters()})
    assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


# ---- the setting


def test_auto_is_the_prefix_tree_on_a_cpu(checkpoint):
    module = Defense(checkpoint)
    module.configure_model()
    assert layouts.layout_of(module.model) == "prefix_tree"
    assert layouts.layout_of(module.model.to("meta")) == "padded"  # moved without a word, it gets what every device takes
    assert module.model.config._attn_implementation == "sdpa"


def everything_of_the_host(rows: Batches) -> list[torch.Tensor]:
    batch = rows(0)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    found = [pack(ids, mask, torch.inf), end_to_end(ids, mask), padded(ids, mask)]
    labels, draws = labels_of(batch["labels"].clone()), _draws([1, 2], 3, torch.device("cpu"))
    return [*batch.values(), *(t for packed in found for t in packed if isinstance(t, torch.Tensor)), *labels, draws]


def test_what_the_host_makes_stays_there_whatever_the_default_device_is():
    """Lightning makes that of the model the default while it loads."""
    examples = [{"input_ids": [1, 2, *range(3, 5 + i)], "labels": [IGNORED, 2, *range(3, 5 + i)]} for i in range(3)]
    rows = [Batches(examples, 3, seed, "default device", 0) for seed in (0, 0)]
    expected = everything_of_the_host(rows[0])
    permutation.cache_clear()
    with torch.device("meta"):
        found, number = everything_of_the_host(rows[1]), uniform(0, "default device", 0)
    assert number == uniform(0, "default device", 0)
    assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("bf16-true", torch.bfloat16)]
)
def test_the_layout_is_that_of_the_precision_that_a_trainer_passes_in(checkpoint, tmp_path, monkeypatch, precision, dtype):
    asked = []
    monkeypatch.setattr(defense, "use_layout", lambda model, layout, dtype: asked.append((layout, dtype)))
    toy_trainer(tmp_path, max_steps=1, precision=precision).fit(Defense(checkpoint), toy_data())
    assert asked == [("auto", dtype)]


def test_a_torch_without_the_kernel_has_the_sums_under_a_mask(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    spec = spec_from_file_location("of_an_older_torch", varlen.__file__)
    monkeypatch.setattr(varlen.ALL_ATTENTION_FUNCTIONS, "register", lambda *_: None)
    monkeypatch.setattr(varlen.ALL_MASK_ATTENTION_FUNCTIONS, "register", lambda *_: None)
    older = module_from_spec(spec)
    spec.loader.exec_module(older)
    assert (varlen.HAS_KERNEL, older.HAS_KERNEL) == (True, False)
    q, rows = torch.randn(1, 2, 9, 8), {"cu_seq_lens_q": torch.tensor([0, 4, 9], dtype=torch.int32), "max_length_q": 8}
    ours, others = (each.attention(torch.nn.Identity(), q, q, q, None, **rows)[0] for each in (older, varlen))
    assert torch.equal(ours, others)


def test_a_wrong_layout_is_refused():
    with pytest.raises(ValueError, match="layout must be one of auto, prefix_tree, varlen, padded, got 'flat'"):
        Backbone(layout="flat")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layout must be auto, prefix_tree or padded for Gemma2ForCausalLM, got varlen"):
        use_layout(build("gemma2, soft-capped"), "varlen", torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_an_export_says_nothing_of_the_layout(checkpoint, tmp_path, layout):
    module = Defense(checkpoint, backbone=replace(Backbone(), layout=layout))
    module.configure_model()
    module.exported().save_pretrained(tmp_path / layout)
    assert "varlen" not in (tmp_path / layout / "config.json").read_text()


# ---- what a device would see


@pytest.fixture
def shapes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import shapes

    return shapes


@pytest.mark.parametrize("rows", ["attacker/mood", "attacker/harmful", "defender/refusals", "attacker/mood + attacker/harmful"])
def test_a_training_run_has_few_sizes_and_little_padding(shapes, rows):
    module = Defense(str(ROOT / "models/sandbox/aligned"))
    module.configure_model()
    examples = [e for part in rows.split(" + ") for e in encode_rows(read_rows(f"sandbox:{part}"), module.tokenizer, 512)[0]]
    draw, found = Batches(examples, 8, 0, "shapes", module.tokenizer.pad_token_id), {}
    for layout in ("prefix_tree", "varlen"):
        use_layout(module.model, layout, torch.float32)
        found[layout] = shapes.of_training(module.model, draw, 300 if layout == "varlen" else 60)
    assert len(found["prefix_tree"].sizes) > 20  # of 60 steps
    assert len(found["varlen"].sizes) <= 8
    assert found["varlen"].padding <= 0.1
    assert all(mask is None for _, mask in found["varlen"].sizes)
