"""`generate()`: whatever the strategy, the cache and the batch, the tokens are those of a plain full recomputation."""

import json
import shutil
import threading

import peft
import pytest
import torch
from conftest import BASE, note_results
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    StaticCache,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from modeling_mmgpt import MMGPTCache, MMGPTConfig, MMGPTForConditionalGeneration, MMGPTVisionConfig


PICTURE = str(BASE.parents[1] / "records" / "two_pictures-0.png")
MODES = ("preceding", "all_preceding", "following")
NEW = 10


def greedy(model, batch, **kwargs):
    kwargs = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, **kwargs}
    out = model.generate(**batch, **kwargs)
    return out if isinstance(out, torch.Tensor) else out.sequences


def new_tokens(model, batch, **kwargs):
    return greedy(model, batch, **kwargs)[:, batch["input_ids"].shape[1] :]


def turn(cached, sequences, added):
    """The ids and mask of the next turn: what was cached and generated, and the new turn's tokens."""
    input_ids = torch.cat([sequences, added["input_ids"]], dim=1)
    generated = cached["attention_mask"].new_ones(
        sequences.shape[0], sequences.shape[1] - cached["input_ids"].shape[1]
    )
    mask = torch.cat([cached["attention_mask"], generated, added["attention_mask"]], dim=1)
    return {"input_ids": input_ids, "attention_mask": mask}


STRATEGIES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 0.8, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cached_equals_uncached(make_model, ids, pixels, mode, strategy):
    model, batch = make_model(media_attention=mode), ids("ab#cd#ef", "__abcdef", "____#abc")
    found = []
    for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        torch.manual_seed(0)
        found.append(greedy(model, batch, pixel_values=pixels(3, 2), **STRATEGIES[strategy], **how))
    cached, uncached, static = found
    assert len(cached) == 3 * STRATEGIES[strategy].get("num_return_sequences", 1)
    assert torch.equal(cached, uncached) and torch.equal(cached, static)
    torch.manual_seed(0)
    assert not torch.equal(cached, greedy(model, batch, pixel_values=pixels(3, 2, seed=1), **STRATEGIES[strategy]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("row", ["ab#cd#ef", "abcde##", "abcdef"])
def test_greedy_is_the_best_token_of_a_full_forward_each_time(make_model, ids, pixels, mode, row):
    model, batch, given = make_model(media_attention=mode), ids(row), pixels(1, 2)
    expected = batch["input_ids"]
    for _ in range(NEW):
        logits = model(expected, pixel_values=given, use_cache=False).logits[:, -1]
        logits[:, [257, 259]] = float("-inf")
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(greedy(model, batch, pixel_values=given), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_a_row_alone_gets_the_tokens_it_gets_in_a_batch(make_model, ids, pixels, mode, how):
    model, given = make_model(media_attention=mode), pixels(3, 2)
    rows = ("__#cd#ef", "abcdefgh", "____#abc")
    together = new_tokens(model, ids(*rows), pixel_values=given, **how)
    for number, row in enumerate(rows):
        alone = ids(row.replace("_", ""))
        pictures = given[number : number + 1, : row.count("#")] if "#" in row else None
        assert torch.equal(together[number], new_tokens(model, alone, pixel_values=pictures, **how)[0])


def test_surplus_pictures_and_videos_generate_as_without_the_surplus(model, ids, pixels):
    batch, given = ids("a#b#", "#abc"), pixels(2, 2, 3)
    num_frames = torch.tensor([[3, 2], [1, 1]])
    expected = greedy(model, batch, pixel_values=given, num_frames=num_frames, num_beams=2)
    noise = given.clone()
    noise[0, 1, 2:], noise[1, 0, 1:], noise[1, 1:] = 9.0, 9.0, 9.0
    assert torch.equal(greedy(model, batch, pixel_values=noise, num_frames=num_frames, num_beams=2), expected)
    assert torch.equal(
        greedy(model, batch, pixel_values=given, num_frames=num_frames, num_beams=2, use_cache=False), expected
    )


@pytest.mark.parametrize("mode", MODES)
def test_speculation_gives_the_greedy_tokens(make_model, ids, pixels, mode):
    model, batch, given = make_model(media_attention=mode), ids("ab#ab#abab"), pixels(1, 2)
    expected = greedy(model, batch, pixel_values=given, max_new_tokens=20)
    looked_up = greedy(model, batch, pixel_values=given, max_new_tokens=20, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, expected)
    assistant = make_model(media_attention=mode, seed=1)
    drafted = greedy(model, batch, pixel_values=given, max_new_tokens=20, assistant_model=assistant)
    assert torch.equal(drafted, expected)


def test_an_assistant_sees_the_pictures(make_model, ids, pixels):
    """As its own assistant the model drafts what it will say: twice nine tokens and one of its own each time."""
    model, assistant, batch, given = make_model(), make_model(), ids("ab#cd#ef"), pixels(1, 2)
    assistant.generation_config.update(
        num_assistant_tokens=9, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    lengths, encoded = [], []
    model.model.text_model.register_forward_hook(lambda *args: lengths.append(args[-1].logits.shape[1]))
    assistant.model.vision_tower.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    greedy(model, batch, pixel_values=given, max_new_tokens=20, min_new_tokens=20, assistant_model=assistant)
    assert lengths == [10, 10] and encoded == []  # it is handed what the model has encoded


def test_an_assistant_that_cannot_draft_is_refused_by_name(make_model, make_lm, model, ids, pixels):
    fewer = {"depth": 2, "num_heads": 2, "head_dim": 8, "num_latents": 3}
    for how, named in [
        ({"assistant_model": make_lm(model)}, "LlamaForCausalLM, which sees no pictures"),
        ({"assistant_model": make_model(resampler=fewer)}, r"\(3, 16\), not \(4, 16\)"),
        ({"assistant_model": make_model(vision={"width": 32})}, r"\(4, 32\), not \(4, 16\)"),
        ({"assistant_early_exit": 2}, "assistant_early_exit"),
    ]:
        with pytest.raises(ValueError, match=named):
            greedy(model, ids("ab#c"), pixel_values=pixels(1, 1), **how)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "Contrastive Search"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, "Group Beam Search"),
        ({"dola_layers": "low"}, "Dola"),
        ({"num_beams": 2, "force_words_ids": [[5]]}, "Constrained Beam Search"),
    ],
)
def test_a_mode_that_left_transformers_raises_by_name(model, ids, pixels, how, named):
    with pytest.raises(ValueError, match=named):
        greedy(model, ids("ab#c"), pixel_values=pixels(1, 1), **how)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.bars) for size in (1, 3, 5))])
@pytest.mark.parametrize("rows", [("ab#cd#ef",), ("abcdef##",), ("#a#bcdef", "abcdefgh", "__abcd#e")])
def test_a_prefill_in_chunks_equals_a_whole_one(make_model, ids, pixels, mode, size, rows):
    model, batch, given = make_model(media_attention=mode), ids(*rows), pixels(len(rows), 2)
    expected = greedy(model, batch, pixel_values=given)
    assert torch.equal(greedy(model, batch, pixel_values=given, prefill_chunk_size=size), expected)


@pytest.mark.parametrize("how", [*STRATEGIES.values(), {"prefill_chunk_size": 3}, {"use_cache": False}])
def test_each_real_picture_goes_through_the_tower_once(make_model, ids, pixels, how):
    model = make_model()
    passed = []
    model.model.vision_tower.register_forward_pre_hook(lambda _, args: passed.append(len(args[0])))
    greedy(model, ids("ab#cd#ef", "__abcdef", "____#abc"), pixel_values=pixels(3, 2), **how)
    assert passed == [3]


# Turns; `test_properties.py` tries random ones

OTHER_TURNS = ({"num_beams": 3}, {"prefill_chunk_size": 2}, {"prompt_lookup_num_tokens": 2})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", [{}, *(pytest.param(how, marks=pytest.mark.bars) for how in OTHER_TURNS)])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(("ab#c",), ("de#f",), id="second picture"),
        pytest.param(("ab#c",), ("##ef",), id="second and third picture"),
        pytest.param(("ab#c",), ("defg",), id="no new picture"),
        pytest.param(("abcd",), ("e#fg",), id="first picture late"),
        pytest.param(("abcd",), ("efgh",), id="never a picture"),
        pytest.param(("ab#c", "__#b", "a##b"), ("de#f", "_abc", "##de"), id="rows differ"),
        pytest.param(("ab#c", "__ab"), ("de#f", "_ab#"), id="first picture late in one row"),
        pytest.param(("ab#c", "__ab"), ("defg", "_ab#"), id="first picture late in one row, none new in the other"),
    ],
)
def test_a_later_turn_from_the_cache_equals_a_full_recomputation(make_model, ids, pixels, mode, how, first, second):
    model, start = make_model(media_attention=mode), ids(*first)
    counts = [(a.count("#"), b.count("#")) for a, b in zip(first, second, strict=True)]
    old, new = (pixels(len(first), max(c[k] for c in counts), seed=k) for k in (0, 1))
    both = torch.zeros(len(first), max(map(sum, counts)), 3, 24, 24)
    for row, (before, after) in enumerate(counts):
        both[row, : before + after] = torch.cat([old[row, :before], new[row, :after]])
    old, new, both = (given if given.shape[1] else None for given in (old, new, both))
    out = model.generate(
        **start, pixel_values=old, do_sample=False, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True
    )
    batch = turn(start, out.sequences, ids(*second))
    if "prompt_lookup_num_tokens" in how and len(first) > 1:
        return  # takes one row
    expected = greedy(model, batch, pixel_values=both, **(how if "num_beams" in how else {}))
    cache, passed = out.cache, []
    if "num_beams" in how:
        cache.batch_repeat_interleave(how["num_beams"])  # transformers leaves a given cache to its owner
    handle = model.model.vision_tower.register_forward_pre_hook(lambda _, args: passed.append(len(args[0])))
    ours = greedy(model, batch, pixel_values=new, cache=cache, **how)
    handle.remove()
    assert torch.equal(ours, expected)
    assert sum(passed) == sum(after for _, after in counts)


@pytest.mark.parametrize("mode", ["preceding", "all_preceding"])
@pytest.mark.parametrize("sizes", [{}, {"max_num_images": 3}])
def test_three_turns_of_bare_forwards_equal_one(make_model, ids, pixels, mode, sizes):
    resampler = {"depth": 2, "num_heads": 2, "head_dim": 8, "num_latents": 4, **sizes}
    model, given = make_model(media_attention=mode, resampler=resampler), pixels(2, 3)
    rows = ids("ab#cde#f#", "ab#cdefgh")["input_ids"]
    whole = model(rows, pixel_values=given).logits
    cache, parts = None, []
    for start, stop, pictures in ((0, 4, (0, 1)), (4, 6, None), (6, 9, (1, 3))):
        now = None if pictures is None else given[:, pictures[0] : pictures[1]]
        out = model(rows[:, start:stop], pixel_values=now, cache=cache, use_cache=True)
        cache = out.cache
        parts.append(out.logits)
    assert isinstance(cache, MMGPTCache)
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-4


def test_a_cache_is_read_also_where_none_is_asked_for(model, ids, pixels):
    rows, given = ids("ab#cd")["input_ids"], pixels(1, 1)
    whole = model(rows, pixel_values=given).logits
    cache = model(rows[:, :4], pixel_values=given, use_cache=True).cache
    last = model(rows[:, 4:], cache=cache, use_cache=False).logits
    assert (last[:, -1] - whole[:, -1]).abs().max() < 1e-4


def test_text_goes_on_from_a_cache_in_following_and_a_new_picture_does_not(make_model, ids, pixels):
    model, given = make_model(media_attention="following"), pixels(1, 2)
    whole = model(**ids("ab#cd"), pixel_values=given[:, :1]).logits
    cache = model(**ids("ab#c"), pixel_values=given[:, :1], use_cache=True).cache
    last = model(ids("d")["input_ids"], cache=cache).logits
    assert (last[:, -1] - whole[:, -1]).abs().max() < 1e-4
    with pytest.raises(ValueError, match="following"):
        model(ids("e#")["input_ids"], pixel_values=given[:, 1:], cache=cache)


def test_a_late_first_picture_is_refused_by_a_bare_forward(model, ids, pixels):
    for before, pictures in (("abc", None), ("abc", pixels(1, 1))):
        cache = model(**ids(before), pixel_values=pictures, use_cache=True).cache
        with pytest.raises(ValueError, match="first picture"):
            model(ids("d#")["input_ids"], pixel_values=pixels(1, 1), cache=cache)


@pytest.mark.parametrize(
    ("second", "pictures", "numbers"),
    [("de#f", 0, ("1", "0")), ("d##f", 1, ("2", "1")), ("defg", 1, ("1", "0")), ("de#f", 2, ("2", "1"))],
)
def test_wrong_numbers_of_new_pictures_are_refused(model, ids, pixels, second, pictures, numbers):
    start, given = ids("ab#c"), pixels(1, pictures) if pictures else None
    out = model.generate(
        **start, pixel_values=pixels(1, 1), max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    with pytest.raises(ValueError) as error:
        greedy(model, turn(start, out.sequences, ids(second)), pixel_values=given, cache=out.cache)
    assert all(number in str(error.value) for number in numbers)
    cache = model(**start, pixel_values=pixels(1, 1), use_cache=True).cache
    with pytest.raises(ValueError):
        model(ids(second)["input_ids"], pixel_values=given, cache=cache)


def test_a_dropped_picture_is_never_used_later(model, ids, pixels):
    cache = model(**ids("ab#c"), pixel_values=pixels(1, 2), use_cache=True).cache
    with pytest.raises(ValueError, match="Row 0"):
        model(ids("#d")["input_ids"], cache=cache)
    cache = model(**ids("ab#c"), pixel_values=pixels(1, 2), use_cache=True).cache
    ours = model(ids("#d")["input_ids"], pixel_values=pixels(1, 1, seed=3), cache=cache).logits
    both = torch.cat([pixels(1, 2)[:, :1], pixels(1, 1, seed=3)], dim=1)
    assert (ours - model(**ids("ab#c#d"), pixel_values=both).logits[:, -2:]).abs().max() < 1e-4


# Caches of other kinds


def test_a_foreign_cache_with_tokens_is_refused_and_an_empty_one_taken(model, make_lm, ids, pixels):
    batch = ids("ab#c")
    foreign = make_lm(model)(**batch, use_cache=True).cache
    assert isinstance(foreign, DynamicCache)
    for run in (model, model.model, model.generate):
        with pytest.raises(ValueError, match="DynamicCache that holds 4 tokens"):
            run(input_ids=ids("ab#cde")["input_ids"], pixel_values=pixels(1, 1), cache=foreign)
    expected = greedy(model, batch, pixel_values=pixels(1, 1))
    assert torch.equal(greedy(model, batch, pixel_values=pixels(1, 1), cache=DynamicCache()), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_static_cache_without_room_is_refused_with_both_lengths(make_model, ids, pixels, family):
    model = make_model(family)
    batch, given = ids("ab#cdefghijk"), pixels(1, 1)
    for run in (model, model.model):
        with pytest.raises(ValueError, match="(?s)10.*12"):
            run(**batch, pixel_values=given, cache=StaticCache(model.config.text_config, max_cache_len=10))
    with pytest.raises(ValueError, match="(?s)14.*15"):
        greedy(model, batch, pixel_values=given, cache=StaticCache(model.config.text_config, max_cache_len=14))
    roomy = StaticCache(model.config.text_config, max_cache_len=32)
    expected = greedy(model, batch, pixel_values=given)
    assert torch.equal(greedy(model, batch, pixel_values=given, cache=roomy), expected)


# The image token, threads, streams


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"do_sample": True}, {"prompt_lookup_num_tokens": 2}])
def test_the_image_token_is_generated_only_if_asked_for(model, ids, pixels, how):
    batch, wished = ids("ab#c"), {"sequence_bias": {(259,): 1000.0}, "pixel_values": pixels(1, 1)}
    assert 259 not in new_tokens(model, batch, **wished, **how)
    asked = [
        new_tokens(model, batch, **wished, **how, suppress_tokens=[], use_cache=u)
        for u in (True, False)
        if u or "prompt_lookup_num_tokens" not in how
    ]
    assert all((tokens == 259).all() for tokens in asked)


def stale(folder, suppressed):
    """A copy of the shipped base with another list of what is suppressed; `None` for no generation config."""
    shutil.copytree(BASE, folder)
    path = folder / "generation_config.json"
    config = json.loads(path.read_text())
    path.unlink() if suppressed is None else path.write_text(json.dumps(config | {"suppress_tokens": suppressed}))
    return folder


@pytest.mark.parametrize(
    ("suppressed", "expected"),
    [([755], [763]), (None, [763]), ([763], [763]), ([], [763]), ([755, 763], [755, 763]), ([5, 7], [5, 7, 763])],
)
@pytest.mark.parametrize("auto", [False, True])
def test_what_an_older_release_suppresses_in_place_of_the_image_is_healed(
    tmp_path, caplog, suppressed, expected, auto
):
    folder = stale(tmp_path / "base", suppressed)
    loader = AutoModelForImageTextToText if auto else MMGPTForConditionalGeneration
    with caplog.at_level("WARNING"):
        model = loader.from_pretrained(folder)
    assert model.generation_config.suppress_tokens == expected
    model.save_pretrained(tmp_path / "saved")
    assert loader.from_pretrained(tmp_path / "saved").generation_config.suppress_tokens == expected


def test_a_stale_base_is_healed_under_an_adapter_and_in_each_way_of_loading(make_adapter, tmp_path):
    folder = stale(tmp_path / "base", [755])
    adapter = make_adapter(folder, tmp_path / "adapter")
    base = MMGPTForConditionalGeneration.from_pretrained(folder, output_loading_info=True)[0]
    models = [base, peft.PeftModel.from_pretrained(base, adapter)]
    models += [auto.from_pretrained(adapter) for auto in (AutoModelForImageTextToText, AutoModel)]
    models += [MMGPTForConditionalGeneration.from_pretrained(adapter)]
    assert all(model.generation_config.suppress_tokens == [763] for model in models)
    given = GenerationConfig(suppress_tokens=[5])
    asked = MMGPTForConditionalGeneration.from_pretrained(folder, generation_config=given)
    assert asked.generation_config.suppress_tokens == [5, 763]


def test_the_shipped_base_says_all_of_its_words():
    model, processor = AutoModelForImageTextToText.from_pretrained(BASE), AutoProcessor.from_pretrained(BASE)
    assert model.generation_config.suppress_tokens == [processor.image_token_id]
    prompt = processor(text="<image>this is a zemp<|endofchunk|>" * 3 + "<image>this is a", images=[PICTURE] * 4)
    said = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert processor.decode(said[0, -1]) == "zemp"


def test_generation_in_checkpointed_training_gives_the_same_tokens(make_model, ids, pixels):
    model = make_model()
    batch, given = ids("ab#c"), pixels(1, 1)
    expected = greedy(model, batch, pixel_values=given)
    model.train()
    assert torch.equal(greedy(model, batch, pixel_values=given), expected)
    model.activation_checkpointing_enable()
    assert torch.equal(greedy(model, batch, pixel_values=given), expected)
    assert torch.equal(greedy(model, batch, pixel_values=given, use_cache=False), expected)


def test_a_generated_image_token_stands_for_no_picture(make_model, ids, pixels):
    for mode in MODES:
        model = make_model(media_attention=mode)
        batch, given = ids("ab#c#d"), pixels(1, 2)
        every_other = {"suppress_tokens": [], "sequence_bias": {(259,): 3.0}, "no_repeat_ngram_size": 2}
        cached, uncached = (
            new_tokens(model, batch, pixel_values=given, use_cache=u, **every_other) for u in (True, False)
        )
        assert 1 <= (cached == 259).sum() < NEW and torch.equal(cached, uncached)


@pytest.mark.parametrize("rounds", [20, pytest.param(100, marks=pytest.mark.bars)])
@pytest.mark.parametrize("family", ["llama", "mpt"])
def test_two_threads_may_generate_with_one_model(make_model, ids, pixels, family, rounds):
    model = make_model(family)
    work = [(ids("ab#cd#ef"), pixels(1, 2)), (ids("abcdef", "_#cdef"), pixels(2, 1, seed=1))]
    expected = [greedy(model, batch, pixel_values=given) for batch, given in work]
    found = [[], []]

    def run(number):
        torch.set_num_threads(1)
        batch, given = work[number]
        for _ in range(rounds):
            found[number].append(greedy(model, batch, pixel_values=given))

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if rounds == 100:
        equal = sum(torch.equal(tokens, expected[n]) for n in (0, 1) for tokens in found[n])
        note_results("generation", {f"threads, {family}": {"rounds of each thread": rounds, "equal": equal}})
    for number in (0, 1):
        assert len(found[number]) == rounds and all(torch.equal(tokens, expected[number]) for tokens in found[number])


def test_no_layer_keeps_anything_between_calls(make_model, ids, pixels):
    model = make_model()
    before = greedy(model, ids("abcd"))
    greedy(model, ids("ab#c"), pixel_values=pixels(1, 1))
    assert torch.equal(greedy(model, ids("abcd")), before)


def test_streamers_yield_the_text(model, processor, ids, pixels, capsys):
    batch, given = ids("ab#c"), pixels(1, 1)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    tokens = new_tokens(model, batch, pixel_values=given, streamer=streamer)
    text = processor.tokenizer.decode(tokens[0])
    assert "".join(streamer) == text
    greedy(model, batch, pixel_values=given, streamer=TextStreamer(processor.tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == text + "\n"


# Compiled


BACKENDS = ("aot_eager", "inductor")


def compiled(fullgraph=True, backend="eager"):
    compile_config = CompileConfig(fullgraph=fullgraph, backend=backend, mode=None)
    compile_config._compile_all_devices = True  # by itself transformers compiles on a GPU only
    return {"cache_implementation": "static", "compile_config": compile_config}


@pytest.mark.parametrize("backend", ["eager", *(pytest.param(b, marks=pytest.mark.bars) for b in BACKENDS)])
def test_a_compiled_forward_gives_the_same_tokens(model, ids, pixels, backend):
    torch.compiler.reset()
    for batch, given in ((ids("ab#cd#ef", "__abcdef", "____#abc"), pixels(3, 2)), (ids("abcdef"), None)):
        expected = greedy(model, batch, pixel_values=given)
        assert torch.equal(greedy(model, batch, pixel_values=given, **compiled(backend=backend)), expected)
        if backend == "eager":
            return  # the second graph takes as long again


def test_a_family_that_swallows_keywords_is_compiled_around_and_never_loses_the_picture(make_model, ids, pixels):
    torch.compiler.reset()
    model, batch, given = make_model("gptj"), ids("ab#c"), pixels(1, 1)
    expected = greedy(model, batch, pixel_values=given)
    assert torch.equal(greedy(model, batch, pixel_values=given, **compiled(fullgraph=False)), expected)
    torch.compiler.reset()
    with pytest.raises(Exception, match="_decode_by_context"):
        greedy(model, batch, pixel_values=given, **compiled())


# Ends, scores, processors


class At(LogitsProcessor):
    """Chooses a token for each row at a step of its own."""

    def __init__(self, prompt, token, steps):
        self.prompt, self.token, self.steps = prompt, token, steps

    def __call__(self, input_ids, scores):
        for row, step in enumerate(self.steps):
            if input_ids.shape[1] - self.prompt == step:
                scores[row] = float("-inf")
                scores[row, self.token] = 0.0
        return scores


@pytest.mark.parametrize("end", [257, 258], ids=["end of sequence", "end of chunk"])
def test_rows_stop_each_at_its_end_token_and_are_padded(model, ids, pixels, end):
    batch, given = ids("ab#cd", "__a#b"), pixels(2, 1)
    free = new_tokens(model, batch, pixel_values=given)
    for use_cache in (True, False):
        ended = new_tokens(
            model, batch, pixel_values=given, min_new_tokens=0, eos_token_id=[257, 258], use_cache=use_cache,
            logits_processor=[At(5, end, steps=(2, 5))],
        )  # fmt: skip
        assert ended.shape[1] == 6
        assert ended[0].tolist() == [*free[0, :2].tolist(), end, *3 * [260]]
        assert ended[1].tolist() == [*free[1, :5].tolist(), end]


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_a_stop_string_ends_a_row(model, processor, ids, pixels, how):
    batch, given = ids("ab#cd"), pixels(1, 1)
    stop = {"stop_strings": ["<|endofchunk|>"], "tokenizer": processor.tokenizer, "min_new_tokens": 0}
    tokens = new_tokens(model, batch, pixel_values=given, sequence_bias={(258,): 1000.0}, **stop, **how)
    assert tokens.tolist() == [[258]]


@pytest.mark.parametrize("how", [{"cache_implementation": "dynamic"}, {"cache_implementation": "static"}])
def test_scores_are_those_of_a_full_forward(model, ids, pixels, how):
    batch, given = ids("ab#cd#ef", "__abcdef"), pixels(2, 2)
    out = model.generate(
        **batch, pixel_values=given, do_sample=False, max_new_tokens=4, min_new_tokens=4, **how,
        return_dict_in_generate=True, output_scores=True, output_logits=True, output_hidden_states=True,
    )  # fmt: skip
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 4, dtype=torch.long)], dim=1)
    whole = model(out.sequences, attention_mask=mask, pixel_values=given, use_cache=False).logits[:, 7:-1]
    ours = torch.stack(out.logits, dim=1)
    assert (ours - whole).abs().max() < 1e-4
    scores = torch.stack(out.scores, dim=1)
    forbidden = scores == float("-inf")
    assert forbidden[..., [257, 259]].all() and forbidden.sum() == 2 * 4 * 2  # the end for now, and the image token
    assert torch.equal(scores[~forbidden], ours[~forbidden])
    assert isinstance(out.cache, MMGPTCache) and len(out.hidden_states) == 4


# The pipeline of transformers


def chat(text, *pictures):
    return [
        {
            "role": "user",
            "content": [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": text}],
        }
    ]


def test_the_pipeline_answers_one_by_one_and_in_batches(model, processor, picture):
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    chats = [chat("ab?", picture(0)), chat("cdefgh?", picture(1)), chat("text only")]
    options = {"max_new_tokens": NEW, "do_sample": False}

    def answers(chats, **kwargs):
        return [row[0]["generated_text"] for row in pipe(text=chats, **kwargs, **options, return_full_text=False)]

    expected = []
    for messages in chats:
        batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
        tokens = model.generate(**batch, **options)[0, batch["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.decode(tokens, skip_special_tokens=True))
    assert len(set(expected)) == 3
    assert answers(chats) == expected
    assert answers(chats[:2], batch_size=2) == expected[:2]  # of different length: padded on the left
    replies = pipe(text=chats, generate_kwargs=options, return_full_text=False)
    assert [row[0]["generated_text"] for row in replies] == expected
    with pytest.raises(TypeError, match="do_smaple"):
        pipe(text=chats[0], do_smaple=True)
    with pytest.raises(ValueError, match="pixel_values"):
        answers(chats[1:], batch_size=2)  # transformers batches chats with pictures, or chats without


# Many pictures


@pytest.mark.parametrize("mode", MODES)
def test_rows_with_no_one_and_32_pictures(make_model, ids, pixels, mode):
    """Each picture goes through the tower once, and a row gets what it gets alone."""
    model, given = make_model(media_attention=mode), pixels(3, 32)
    rows = ("#a" * 32, "_" * 60 + "b#cd", "_" * 58 + "abcdef")
    passed = []
    handle = model.model.vision_tower.register_forward_pre_hook(lambda _, args: passed.append(len(args[0])))
    together = new_tokens(model, ids(*rows), pixel_values=given)
    handle.remove()
    assert passed == [33]
    for number, row in enumerate(rows):
        pictures = given[number : number + 1, : row.count("#")] if "#" in row else None
        assert torch.equal(together[number], new_tokens(model, ids(row.strip("_")), pixel_values=pictures)[0])


def test_a_cached_picture_takes_two_vectors_a_latent_and_block(make_model, ids, pixels):
    """At OpenFlamingo-9B's shape in bfloat16 that is 1 MiB a picture, measured on a cache without memory."""

    def bytes_of(cache):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.cross_attention_cache.layers)

    def expected(config, blocks):
        sizes = config.cross_attention
        return 2 * blocks * config.resampler["num_latents"] * sizes["num_heads"] * sizes["head_dim"]

    model = make_model(dtype=torch.bfloat16)
    for count in (1, 32):
        cache = model(**ids("#a" * count), pixel_values=pixels(1, count), use_cache=True).cache
        assert bytes_of(cache) == 2 * count * expected(model.config, blocks=2)
    config = MMGPTConfig(
        vision_config=MMGPTVisionConfig.from_open_clip("ViT-L-14-quickgelu"),
        text_config=AutoConfig.for_model("llama"),  # LLaMA-7B's sizes are the defaults
        cross_attn_every_n_layers=4,
    )
    with torch.device("meta"):
        model = MMGPTForConditionalGeneration(config).to(torch.bfloat16).eval()
        cache = model(
            torch.ones(1, 64, dtype=torch.long),
            image_index=torch.ones(1, 64, dtype=torch.long),
            image_numbers=torch.ones(1, 32, dtype=torch.long),
            image_latents=torch.ones(1, 32, 64, 1024, dtype=torch.bfloat16),
            use_cache=True,
        ).cache
    assert bytes_of(cache) == 2 * 32 * expected(config, blocks=8) == 32 * 2**20
