"""Answers in few shapes are those of every other layout, and a device sees few shapes, few questions and no moving tensor."""

import gc
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import combinations, pairwise

import pytest
import torch
import torch.distributed as dist
from test_forward import LLAMA, MODELS, build
from test_generation import NUM_TOKENS, SANDBOX, by_hand
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from toy import ROOT, on_ranks, save_toy_checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from casehard import LoRA
from casehard.datamodules.chat import prompt_ids
from casehard.datamodules.sources import read_rows
from casehard.engine import decode_step, few_shapes, generation, layouts
from casehard.engine.adapters import add_adapter
from casehard.engine.checkpoint import load_model, load_tokenizer
from casehard.engine.few_shapes import dealt, passes, places
from casehard.engine.forward import additive, takes_prefix_trees
from casehard.engine.generation import generate, sample
from casehard.engine.sharding import sharded
from casehard.engine.weights import reshard

CPU = torch.device("cpu")
MORE = {
    "qwen2": ("qwen2", LLAMA | {"max_position_embeddings": 128}, True),
    "gemma3, some layers with a window": (
        "gemma3_text",
        LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
        True,
    ),
    "gpt_neox": ("gpt_neox", {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}, True),
}


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    rows = [row for kind in ("harmful", "howto", "sums", "repeat") for row in read_rows(f"sandbox:test/{kind}#train[:3]", False)]
    return [prompt_ids(row, tokenizer) for row in rows]


@pytest.fixture
def model(checkpoint) -> PreTrainedModel:
    return padded(load_model(checkpoint))


def padded(model: PreTrainedModel) -> PreTrainedModel:
    layouts.choose(model, "padded")
    takes_prefix_trees(model, 0)  # which makes two passes
    return model


Shape = tuple[tuple[int, ...], tuple[int, ...] | None]


def shapes_of(model: PreTrainedModel) -> list[Shape]:
    """Grows with every pass: the shapes of ids and of the mask, None where there is none."""
    seen: list[Shape] = []

    def note(_: object, __: object, given: dict) -> None:
        mask = given.get("attention_mask")
        seen.append((tuple(given["input_ids"].shape), None if mask is None else tuple(mask.shape)))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


# ---- the same answers


@pytest.mark.parametrize("name", [*MODELS, *MORE])
def test_answers_are_the_likeliest_tokens_of_every_architecture(name, tokenizer, prompts, monkeypatch):
    monkeypatch.setitem(MODELS, name, (MODELS | MORE)[name])
    model = padded(build(name, vocab_size=len(tokenizer)))
    calls, real = [], GenerationMixin.generate
    monkeypatch.setattr(GenerationMixin, "generate", lambda self, **settings: calls.append(self) or real(self, **settings))
    expected = by_hand(model, tokenizer, prompts, ends=[2])
    assert len(set(expected)) > 4
    shapes = shapes_of(model)
    for batch_size in (1, 5, 64):
        assert generate(model, tokenizer, prompts, NUM_TOKENS, batch_size) == expected
    assert bool(calls) != MODELS[name][2]
    assert calls or {mask for _, mask in shapes} >= {None, (12, 1, 1, 64)}


@pytest.mark.parametrize("name", ["llama, tied", *MORE])
def test_samples_are_those_of_the_other_layout(name, tokenizer, prompts, monkeypatch):
    monkeypatch.setitem(MODELS, name, (MODELS | MORE)[name])
    model, seeds = build(name, vocab_size=len(tokenizer)), list(range(len(prompts)))
    expected = sample(model, tokenizer, prompts, NUM_TOKENS, 1.0, seeds)
    shapes = shapes_of(padded(model))
    for batch_size in (1, 5, 64):
        assert sample(model, tokenizer, prompts, NUM_TOKENS, 1.0, seeds, batch_size) == expected
    assert shapes[-1] == ((12, 1), (12, 1, 1, 64))


def on_two_ranks(rank: int, checkpoint: str, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """Each rank holds half of every weight; one has three chunks of prompts, the other one, of other lengths.

    Then each has shards of its own, which are all of the weights.
    """
    meshes, tokenizer = init_device_mesh("cpu", (2, 1), mesh_dim_names=("both", "own")), load_tokenizer(checkpoint)
    model, _ = sharded(load_model(checkpoint) if rank == 0 else None, meshes["both"], CPU, MixedPrecisionPolicy())
    share = slice(9) if rank == 0 else slice(9, None)
    seeds, shapes = list(range(len(prompts))), shapes_of(model)
    for layout in ("prefix_tree", "padded"):
        layouts.choose(model, layout)
        shapes.clear()
        assert sample(model, tokenizer, prompts[share], NUM_TOKENS, 1.0, seeds[share], batch_size=3) == expected[share]
        numbers = [None, None]
        dist.all_gather_object(numbers, len(shapes))
        assert numbers[0] == numbers[1]

    whole = load_model(checkpoint)
    model, _ = sharded(whole, meshes["own"], CPU, MixedPrecisionPolicy(torch.bfloat16))
    padded(model)
    answers, cast = [], []
    for context in (decode_step._weights_together, lambda model: nullcontext()):
        with pytest.MonkeyPatch.context() as patch, Seen() as seen:
            patch.setattr(decode_step, "_weights_together", context)
            patch.setattr(few_shapes, "graph_for", lambda model: pytest.fail("a graph where FSDP2's hooks act"))
            answers.append(generate(model, tokenizer, prompts, NUM_TOKENS))
        cast.append(seen.cast)
        reshard(model)
        assert all(isinstance(p, DTensor) for p in model.parameters())
    assert answers[0] == answers[1]
    assert cast[0] + 10 * sum(p.numel() for p in whole.model.layers.parameters()) < cast[1]  # once, not at each of 12 passes
    model(torch.tensor(prompts[:1]))
    assert all(isinstance(p, DTensor) for p in model.model.layers.parameters())  # apart again after a pass,
    assert not isinstance(model.lm_head.weight, DTensor)  # but for what a backward pass needs first


def test_two_ranks_sample_what_one_does(checkpoint, model, tokenizer, prompts, tmp_path):
    expected = sample(model, tokenizer, prompts, NUM_TOKENS, 1.0, range(len(prompts)))
    on_ranks(on_two_ranks, tmp_path, checkpoint, prompts, expected)


def test_no_prompts_have_no_answers(model, tokenizer):
    assert generate(model, tokenizer, [], NUM_TOKENS) == []


def test_a_device_without_float64_samples_the_same_in_float32(model, tokenizer, prompts, monkeypatch):
    seeds = list(range(len(prompts)))
    expected = sample(model, tokenizer, prompts, NUM_TOKENS, 1.0, seeds)
    monkeypatch.setattr(generation, "_most_precise", lambda device: torch.float32)
    assert sample(model, tokenizer, prompts, NUM_TOKENS, 1.0, seeds) == expected
    draws = generation._draws(seeds, 5, torch.device("cpu"))
    assert draws.dtype == torch.float32
    with Seen() as seen:
        generation._Choice(1.0, draws)(torch.randn(len(seeds), 30), torch.arange(len(seeds)), 0)
    assert torch.float64 not in seen.dtypes


# ---- few shapes, questions and steps


class Seen(TorchDispatchMode):
    """What operations ran, and in which dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.dtypes: set[torch.dtype] = set()
        self.cast = 0  # numbers

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        self.cast += out.numel() if self.names[-1] == "_to_copy" else 0
        self.dtypes |= {each.dtype for each in (*args, out) if isinstance(each, Tensor)}
        return out


@pytest.mark.skipif(not (SANDBOX / "model.safetensors").exists(), reason="the sandbox's aligned model is not there")
@pytest.mark.parametrize("batch_size", [128, 34])  # of three chunks two have a row less
def test_answers_to_a_hundred_prompts_take_few_shapes_and_little_padding(batch_size):
    model, tokenizer = load_model(str(SANDBOX)), load_tokenizer(str(SANDBOX))
    asked = [prompt_ids(row, tokenizer) for row in read_rows("sandbox:test/harmful#train[:100]", False)]
    expected = generate(model, tokenizer, asked, 64)
    shapes = shapes_of(padded(model))
    assert generate(model, tokenizer, asked, 64, batch_size) == expected
    assert len(set(shapes)) <= 8
    computed = sum(rows * width for (rows, width), mask in shapes if mask is None)
    assert sum(map(len, asked)) <= computed <= 1.1 * sum(map(len, asked))
    steps, longest = [mask for _, mask in shapes if mask], max(len(tokenizer(said).input_ids) for said in expected)
    num_chunks = -(-100 // batch_size)
    assert len(steps) < num_chunks * (longest + 4)
    assert num_chunks > 1 or len(steps) >= longest - 1


def test_the_device_is_asked_every_few_steps_alone(model, tokenizer, prompts):
    asked = {}
    for num_tokens in (9, 17):
        with Seen() as seen:
            sample(model, tokenizer, prompts, num_tokens, 1.0, range(len(prompts)))
        asked[num_tokens] = sum(name in ("_local_scalar_dense", "nonzero") for name in seen.names)
    assert asked[17] - asked[9] <= 2


def test_rows_leave_and_places_grow_only_where_that_lasts(checkpoint, model, tokenizer, prompts, monkeypatch):
    expected = by_hand(model, tokenizer, prompts, 40)
    free = [tokenizer(text, add_special_tokens=False).input_ids for text in expected]
    model.generation_config.eos_token_id = sorted({ids[3] for ids in free[:10]})
    expected = by_hand(model, tokenizer, prompts, 40, ends=model.generation_config.eos_token_id)
    shapes = shapes_of(model)
    assert generate(model, tokenizer, prompts, 40) == expected
    assert len({shape for shape in shapes if shape[1]}) == 1
    shapes.clear()
    monkeypatch.setattr(few_shapes, "WORTH_A_SHAPE", 4)
    monkeypatch.setattr(few_shapes, "MULTIPLE", 8)
    assert generate(model, tokenizer, prompts, 40) == expected
    steps = [(rows, mask[-1]) for (rows, _), mask in shapes if mask]
    assert {rows for rows, _ in steps} == {12, 3}
    assert len({length for _, length in steps}) == 2
    assert all(a[0] >= b[0] and a[1] <= b[1] for a, b in pairwise(steps))


def test_chunks_are_alike_and_passes_pad_least():
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 30) for _ in range(rng.randint(1, 12))]
        chunks = dealt(lengths, 3)
        assert sorted(i for chunk in chunks for i in chunk) == list(range(len(lengths)))
        assert max(map(len, chunks)) - min(map(len, chunks)) <= 1
        assert all(lengths[a] <= lengths[b] for chunk in chunks for a, b in pairwise(chunk))
        ordered, n = sorted(lengths), len(lengths)
        least = {}
        for number in range(1, 5):
            cuts = [(0, *cut, n) for k in range(number) for cut in combinations(range(1, n), k)]
            least[number] = min(sum((b - a) * ordered[b - 1] for a, b in pairwise(cut)) for cut in cuts)
        found = passes(ordered, 4, 0.1)
        assert sum(rows for rows, _ in found) == n
        assert sum(rows * width for rows, width in found) == least[len(found)]
        assert least[len(found)] <= 1.1 * sum(lengths) or least[len(found)] == least[4]
        assert len(found) == 1 or least[len(found) - 1] > 1.1 * sum(lengths)


def test_half_of_the_places_is_taken_first_where_it_serves_for_long():
    assert places(60, 64) == [128]
    assert places(60, 512) == [320, 576]
    assert places(500, 512) == [1024]


@pytest.mark.parametrize("by_graph", [False, True])
def test_no_room_is_left_behind(by_graph, model, tokenizer, prompts, monkeypatch, graphs):
    made = []

    class Watched(decode_step.Room):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            made.append(weakref.ref(self))

    monkeypatch.setattr(few_shapes, "Room", Watched)
    if by_graph:
        graphs(Traced)
    gc.collect()
    gc.disable()  # a device's memory is not what Python's collector waits for
    try:
        generate(model, tokenizer, prompts, NUM_TOKENS, 5)
        (room,) = made
        assert room() is None
        assert not [each for each in gc.get_objects() if isinstance(each, decode_step.Step)]
    finally:
        gc.enable()


# ---- done once


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_weights_cast_once_give_the_bits_of_autocast(tokenizer, prompts, tied, grad):
    model = build(f"llama, {'tied' if tied else 'untied'}", vocab_size=len(tokenizer))
    add_adapter(model, LoRA(rank=2), "defense")
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    before, ids = dict(model.named_parameters(remove_duplicate=False)), torch.tensor(prompts[:1])
    with grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(ids).logits
        with decode_step.settled(model):
            cast = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
            assert torch.equal(model(ids).logits, expected)
    assert {name for name in cast if "embed" in name or "norm" in name} == set()
    assert len(cast) == 2 * (7 + 2 * sum("lora_A" in name for name in before) // 2) + 1
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(before)
    assert all(after[name] is p for name, p in before.items())


def test_heads_that_share_keys_do_so_without_a_copy(tokenizer, monkeypatch):
    model = build("llama, tied", vocab_size=len(tokenizer))
    torch.manual_seed(0)
    query, keys, values = torch.randn(3, 4, 1, 8), torch.randn(3, 2, 16, 8), torch.randn(3, 2, 16, 8)
    mask = additive(torch.rand(3, 1, 16) < 0.5, model)
    attention = model.model.layers[0].self_attn
    expected, _ = sdpa_attention_forward(attention, query, keys, values, mask, scaling=0.3)
    monkeypatch.setattr(decode_step, "sdpa_attention_forward", None)
    with Seen() as seen:
        ours, _ = decode_step._grouped(attention, query, keys, values, mask, scaling=0.3)
    torch.testing.assert_close(ours, expected)
    assert not {"clone", "copy_", "_unsafe_view", "cat"} & set(seen.names)
    with decode_step.settled(model):
        assert model.config._attn_implementation == decode_step.GROUPED
    assert model.config._attn_implementation == "sdpa"


# ---- what it takes


@pytest.mark.parametrize("tied", [True, False])
def test_scoring_says_how_far_it_is_from_what_memory_allows(tmp_path, monkeypatch, capsys, tied):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import scoring

    def paired(first, second, *_) -> list[tuple[float, float]]:
        first(), second()
        return [(8.0, 2.0) if first.__name__ == "one_by_one" else (0.5, 2.0)]

    monkeypatch.setattr(scoring, "paired", paired)
    monkeypatch.setattr(scoring, "bandwidth", lambda device: 2e9)
    folder = save_toy_checkpoint(tmp_path, tied)
    prompts = "sandbox:test/harmful#train[:5]"
    scoring.main(folder, prompts, 6, 3, num_pairs=1, num_warmup=0, num_alone=2, layout="padded", precision="bf16-mixed")
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "5 prompts, padded, bf16-mixed; 2 of 2 answers the same"
    said = {line[:12].strip(): line[12:].split() for line in lines[:-1]}
    rate, ratio, step = (float(said[name][0]) for name in ("tokens/s", "over bound", "a step"))
    at_most, megabytes = float(said["at most"][0][:-1]), float(said["at most"][4])
    layer = 4 * 32 * 32 + 3 * 32 * 64
    assert megabytes == pytest.approx(1e-6 * (2 * (2 * layer + 700 * 32) + 4 * 5 * 32), rel=0.01)
    passes = 2 * 6  # two batches of six tokens
    assert at_most == pytest.approx(5 * 6 / (passes * megabytes * 1e6 / 2e9), rel=0.01)
    assert [rate, ratio] == pytest.approx([5 * 6 / 2.0, at_most / 15], rel=0.01)
    assert step == pytest.approx(1e3 * 1.5 / (passes / 2), rel=0.01)
    assert float(lines[-1].split()[2]) == pytest.approx(0.25 / (megabytes * 1e6 / 2e9), rel=0.01)


# ---- graphs


class Traced:
    """Stands in for a CUDA graph: the operations of one call on the tensors of that call, and nothing of Python."""

    captured = 0

    def warm_up(self, function: Callable[[], Tensor]) -> Tensor:
        return function()

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        Traced.captured += 1
        self.program, self.none = make_fx(lambda _: function())(torch.zeros(())), torch.zeros(())
        self.output = torch.full_like(self._again(), torch.nan)
        return self.output

    def replay(self) -> None:
        self.output.copy_(self._again())

    def _again(self) -> Tensor:
        with torch.autocast("cpu", enabled=False):  # its casts are in the program
            return self.program(self.none)


class Again(Traced):
    """Is no graph: Python does it all again, by the operations that a trace has."""

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        self.function, self.output = function, torch.full_like(function(), torch.nan)
        return self.output

    def replay(self) -> None:
        with Seen():
            self.output.copy_(self.function())


class Stale(Traced):
    """Has taken the inputs for constants."""

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        output = super().capture(function)
        super().replay()
        return output

    def replay(self) -> None:
        pass


class Failing(Traced):
    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        Traced.captured += 1
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.fixture
def graphs(monkeypatch) -> Iterator[Callable[[type], None]]:
    """Go by graphs of this kind where CUDA would by its own."""
    monkeypatch.setattr(Traced, "captured", 0)

    def go_by(kind: type) -> None:
        monkeypatch.setattr(few_shapes, "graph_for", lambda model: None if model in few_shapes._WITHOUT_GRAPHS else kind())

    return go_by


@pytest.mark.parametrize("precision", ["float32", "bf16-mixed"])
@pytest.mark.parametrize("name", ["llama, tied", "gpt2, learned positions", "qwen2", "gpt_neox"])
def test_a_replayed_step_needs_no_python_and_no_tensor_that_moves(name, precision, tokenizer, prompts, graphs, monkeypatch):
    monkeypatch.setitem(MODELS, name, (MODELS | MORE)[name])
    model = padded(build(name, vocab_size=len(tokenizer)))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        graphs(Again)
        expected = generate(model, tokenizer, prompts, NUM_TOKENS, 5)
        assert precision == "bf16-mixed" or expected == generate(model, tokenizer, prompts, NUM_TOKENS, 5, graphs=False)
        graphs(Traced)
        shapes, addresses, real = shapes_of(model), set(), decode_step.Step.__call__

        def watched(step: decode_step.Step, *inputs: Tensor) -> Tensor:
            held = [step.ids, step.positions, *(part for layer in step.cache.layers for part in layer.parts)]
            addresses.add(tuple(each.data_ptr() for each in held))
            return real(step, *inputs)

        monkeypatch.setattr(decode_step.Step, "__call__", watched)
        assert generate(model, tokenizer, prompts, NUM_TOKENS, 5) == expected
    assert Traced.captured == len(addresses) == 1
    assert len([mask for _, mask in shapes if mask]) == 3 + 3  # plain; then to warm up, to capture, and beside the first replay


@pytest.mark.parametrize(
    ("kind", "why"), [(Failing, r"be captured \(operation not permitted.*capturing\)"), (Stale, "other log")]
)
def test_a_graph_that_fails_is_said_and_gone_without(kind, why, model, tokenizer, prompts, graphs):
    expected = generate(model, tokenizer, prompts, NUM_TOKENS)
    graphs(kind)
    with pytest.warns(UserWarning, match=f"without CUDA graphs, which is slower: a .*{why}") as warned:
        assert generate(model, tokenizer, prompts, NUM_TOKENS) == expected
    assert generate(model, tokenizer, prompts, NUM_TOKENS) == expected
    assert len(warned) == Traced.captured == 1


@pytest.mark.parametrize("ask", [lambda x: x.sum().item(), lambda x: x[x > 0], torch.nonzero])
def test_a_step_that_asks_the_device_is_not_captured(ask, model, tokenizer, prompts, graphs):
    expected = generate(model, tokenizer, prompts, NUM_TOKENS)
    graphs(Traced)
    model.model.norm.register_forward_pre_hook(lambda _, args: (ask(args[0]), None)[1])
    with pytest.warns(UserWarning, match=r"a step cannot be captured \(aten.* makes the host wait"):
        assert generate(model, tokenizer, prompts, NUM_TOKENS) == expected
    assert Traced.captured == 0


def test_no_graph_is_made_where_none_is_asked_for_or_can_be(model, tokenizer, prompts, graphs):
    assert few_shapes.graph_for(model) is None  # on a CPU
    graphs(Traced)
    generate(model, tokenizer, prompts, NUM_TOKENS, graphs=False)
    generate(model, tokenizer, prompts, 4)  # so few that a graph does not pay
    assert Traced.captured == 0
    generate(model, tokenizer, prompts, 5)
    assert Traced.captured == 1


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bf16-mixed", "bf16"])
def test_a_gpu_writes_the_same_with_graphs_and_without(checkpoint, tokenizer, prompts, precision, recwarn):
    model = load_model(checkpoint).to("cuda", torch.bfloat16 if precision == "bf16" else torch.float32)
    state, seeds = torch.cuda.get_rng_state(), range(len(prompts))
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16-mixed"):
        for batch_size in (64, 5):
            plain = generate(model, tokenizer, prompts, 32, batch_size, graphs=False)
            passes = shapes_of(model)
            assert generate(model, tokenizer, prompts, 32, batch_size) == plain
            assert len([mask for _, mask in passes if mask]) == 3 + 3
        by_graph = sample(model, tokenizer, prompts, 32, 1.0, seeds)
        assert by_graph == sample(model, tokenizer, prompts, 32, 1.0, seeds, graphs=False)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(-1)  # in place: a graph of before would not know under autocast
        changed = generate(model, tokenizer, prompts, 32, graphs=False)
        assert generate(model, tokenizer, prompts, 32) == changed != plain
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert not [str(w.message) for w in recwarn if "CUDA graphs" in str(w.message)]


@pytest.mark.gpu
def test_a_gpu_goes_on_where_a_step_asks_it_something(checkpoint, tokenizer, prompts):
    model = load_model(checkpoint).cuda()
    expected = generate(model, tokenizer, prompts, NUM_TOKENS)
    model.model.norm.register_forward_pre_hook(lambda _, args: (args[0].sum().item(), None)[1])
    stream = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="a step cannot be captured"):
        assert generate(model, tokenizer, prompts, NUM_TOKENS) == expected
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()


@pytest.mark.gpu
def test_a_gpu_writes_what_a_cpu_does(checkpoint, model, tokenizer, prompts):
    expected = generate(model, tokenizer, prompts, NUM_TOKENS)
    assert generate(load_model(checkpoint).cuda(), tokenizer, prompts, NUM_TOKENS) == expected
