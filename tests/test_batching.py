"""Continuous batching: whatever else is in the batch, a request gets the tokens that `generate()` gives it alone."""

import asyncio
import importlib.util
import sys
import threading
import time
import types

import pytest
import torch
import transformers
from conftest import BASE, FAMILIES, IMAGE, note_results
from evaluate_benchmark import draw, encode, write_answers
from tiny_world import benchmarks
from transformers import AutoModelForImageTextToText, AutoProcessor, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from modeling_mmgpt.images_mmgpt import compute_image_index
from modeling_mmgpt.speed import batching
from modeling_mmgpt.speed.batching import BatchingEngine, check_settings, generate_batch
from modeling_mmgpt.speed.picture_pool import attended_slots
from modeling_mmgpt.speed.sampling import choose_by, disturb, sampling_numbers
from processing_mmgpt.evaluation.benchmarks import BENCHMARKS, read_samples


MODES = ("preceding", "all_preceding", "following")
REFUSED = ("stablelm", "falcon", "gpt_neo", "mpt", "bloom", "gpt_neox", "opt")
ROWS = ("ab#cd#ef", "abcdef", "#abc", "##", "a#b#c#d#" + "xyz" * 30, "hello world" * 9, "q#w#e", "ab#cd#ef")
ROWS += ("a" + "#" * 16, "just text", "#", "zz#" + "y" * 50, "ab#cd#efg", "# #", "some more text", "#!#?#")
SMALL = {"page_size": 16, "num_blocks": 128, "max_batch_tokens": 256}
WAYS = {
    "at once": {},
    "staggered": {},
    "prompts in chunks": {"config": ContinuousBatchingConfig(**{**SMALL, "max_batch_tokens": 40})},
    "few slots": {"num_slots": 16},
    "small cache": {"config": ContinuousBatchingConfig(**{**SMALL, "num_blocks": 12})},
}


@pytest.fixture
def make_requests(ids, pixels):
    """Make a request of each row: texts and pictures, two of them equal in both, several equal in one."""

    def make(rows=ROWS, new_tokens=10):
        requests = []
        for number, row in enumerate(rows):
            request = {"input_ids": ids(row)["input_ids"], "max_new_tokens": new_tokens + number % 5}
            if "#" in row:
                request["pixel_values"] = pixels(1, row.count("#"), seed=number % 7)
            requests.append(request)
        return requests

    return make


def alone(model, request, **kwargs):
    """The ids that `generate` gives one request."""
    ids = model.generate(**{"do_sample": False, **request, **kwargs})
    return ids[0, request["input_ids"].shape[1] :].tolist()


def finished(engine, count):
    """The next so many finished results, by name."""
    results = {}
    while len(results) < count:
        result = engine.get_result(timeout=5)
        assert result is not None and result.error is None, (engine.fatal_error, result)
        if result.is_finished():
            results[result.request_id] = result.generated_tokens
    return results


def in_turns(model, requests, **options):
    """Reply to requests of which each two come when the one before has its first token."""
    with BatchingEngine(model, **options) as engine:
        names, results = [], {}
        for first in range(0, len(requests), 2):
            names += [engine.add_request(**request, streaming=True) for request in requests[first : first + 2]]
            result = engine.get_result(timeout=5)
            results |= {result.request_id: result.generated_tokens} if result.is_finished() else {}
        results |= finished(engine, len(requests) - len(results))
    return [results[name] for name in names]


def answered(model, requests, way):
    """The replies in a way, and how often requests were thrown out of the cache."""
    evicted, offload = [], OffloadingManager.offload_requests
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OffloadingManager, "offload_requests", lambda self: evicted.append(self) or offload(self))
        if way == "staggered":
            return in_turns(model, requests), len(evicted)
        return [result.generated_tokens for result in generate_batch(model, requests, **WAYS[way])], len(evicted)


# Who sees what


@pytest.mark.parametrize("mode", MODES)
def test_tokens_of_a_packed_row_see_the_pictures_that_they_see_in_rows_of_their_own(ids, mode):
    rows, slots = ("ab#cd##e", "abc", "#", "a##b"), ([3, 1, 2], [], [5], [1, 1])
    pieces = [(0, 8), (1, 3), (0, 1), (2, 4)]  # of each row's tokens, as in prompts that come in chunks
    places, of_slots = torch.zeros(2, 4, len(rows), dtype=torch.int32)
    for number, (row, mine) in enumerate(zip(rows, slots, strict=True)):
        found = [place for place, letter in enumerate(row) if letter == "#"]
        places[: len(mine), number], of_slots[: len(mine), number] = torch.tensor(found), torch.tensor(mine)
    lengths = torch.tensor([end - start for start, end in pieces])
    positions = torch.cat([torch.arange(*piece) for piece in pieces])
    seen, has_images = attended_slots(places, of_slots, lengths.cumsum(0).int(), positions, mode, 7)
    token = 0
    for row, mine, (start, end) in zip(rows, slots, pieces, strict=True):
        index = compute_image_index(ids(row)["input_ids"] == IMAGE, mode)[0, start:end]
        for number in index.tolist():
            expected = set(
                mine[: max(0, number)] if mode == "all_preceding" else mine[number - 1 : number] if number > 0 else []
            )
            assert set(seen[token].nonzero().flatten().tolist()) == expected
            assert has_images[token] == (number >= 0)
            token += 1


@pytest.mark.parametrize(
    ("mode", "way"),
    [
        ("preceding", "at once"),
        ("all_preceding", "staggered"),
        ("following", "prompts in chunks"),
        ("all_preceding", "few slots"),
        ("preceding", "small cache"),
    ],
)
def test_requests_get_the_tokens_that_they_get_alone(make_model, make_requests, mode, way):
    model, requests = make_model(media_attention=mode), make_requests()
    replies, evictions = answered(model, requests, way)
    assert replies == [alone(model, request) for request in requests]
    assert (evictions > 0) == (way == "small cache")


@pytest.mark.bars
@pytest.mark.parametrize("mode", MODES)
def test_requests_get_the_tokens_that_they_get_alone_in_every_way(make_model, make_requests, mode):
    model, requests = make_model(media_attention=mode), make_requests(new_tokens=40)
    expected, figures = [alone(model, request) for request in requests], {}
    for way in WAYS:
        replies, evictions = answered(model, requests, way)
        assert replies == expected
        assert (evictions > 0) == (way == "small cache")
        figures[f"{mode}, {way}"] = {"equal": len(replies), "requests": len(requests), "evictions": evictions}
    note_results("batching", figures)


def test_text_in_a_mixed_batch_is_the_bare_lm_to_the_bit(make_model, make_requests):
    model = make_model()
    lm, compared = model.model.text_model, []
    forward = lm.forward

    def both(conditioning=None, **kwargs):
        bare, given = forward(**kwargs), forward(conditioning=conditioning, **kwargs)
        if conditioning is not None:
            is_text = ~conditioning.has_images[0, :, 0]
            compared.append((torch.equal(bare.logits[0, is_text], given.logits[0, is_text]), int(is_text.sum())))
            assert not torch.equal(bare.logits[0, ~is_text], given.logits[0, ~is_text])
        return given

    lm.forward = both
    generate_batch(model, make_requests(), do_sample=False)
    assert all(is_equal for is_equal, _ in compared) and sum(rows for _, rows in compared) > 100


def test_videos_surplus_pictures_and_padding(make_model, ids, pixels):
    model, given = make_model(resampler={"depth": 2, "num_latents": 4, "max_num_frames": 3}), pixels(1, 3, 3)
    num_frames = torch.tensor([[3, 1, 2]])
    requests = [{**ids(row), "pixel_values": given, "num_frames": num_frames} for row in ("a#b#c#", "a#", "__ab##c")]
    expected = [alone(model, request, max_new_tokens=8) for request in requests]
    given[0, 1, 1:] = given[0, 2, 2:] = 9.0
    replies = generate_batch(model, [{**request, "max_new_tokens": 8} for request in requests])
    assert [reply.generated_tokens for reply in replies] == expected


def test_a_picture_whose_number_tells_is_another_in_another_place(make_model, ids, pixels):
    model = make_model(resampler={"depth": 2, "num_latents": 4, "max_num_images": 4})
    same = pixels(1, 1).expand(1, 3, -1, -1, -1)
    requests = [{**ids(row), "pixel_values": same, "max_new_tokens": 8} for row in ("a#b", "a#b#", "#a#b#c")]
    with BatchingEngine(model) as engine:
        names = [engine.add_request(**request) for request in requests]
        replies = finished(engine, 3)
        assert engine.pool.encoded == 3
    assert [replies[name] for name in names] == [alone(model, request) for request in requests]


# The same picture once


@pytest.mark.parametrize("mode", MODES)
def test_equal_texts_with_different_pictures_and_different_texts_with_equal_pictures(make_model, ids, pixels, mode):
    model, requests = make_model(media_attention=mode), []
    for number in range(12):
        row, seed = ("ab#cd#", number) if number < 4 else (f"ab#{number}#", number % 2)
        requests.append({**ids(row), "pixel_values": pixels(1, 2, seed=seed), "max_new_tokens": 8})
    with BatchingEngine(model, num_slots=4) as engine:
        names = [engine.add_request(**request) for request in requests]
        replies = finished(engine, len(requests))
        asked, encoded = engine.pool.asked, engine.pool.encoded
    assert [replies[name] for name in names] == [alone(model, request) for request in requests]
    assert len({str(replies[name]) for name in names[:4]}) > 1
    assert (asked, encoded) == (24, 12)  # 8 of the first four requests; the slots are 4, so 4 come again


def test_a_picture_stays_until_its_slot_is_needed(model, ids, pixels):
    def ask(seed):
        before = engine.pool.encoded
        engine.add_request(**ids("a#b"), pixel_values=pixels(1, 1, seed=seed), max_new_tokens=2)
        finished(engine, 1)
        return engine.pool.encoded - before

    with BatchingEngine(model, num_slots=2) as engine:
        assert [ask(seed) for seed in (0, 0, 1, 0, 2, 0, 1)] == [1, 0, 1, 0, 1, 0, 1]


def test_the_same_picture_twice_in_a_request_counts_twice_where_all_are_attended_to(make_model, ids, pixels):
    model = make_model(media_attention="all_preceding")
    given = pixels(1, 2)[:, [0, 0, 0, 1, 0, 1]]
    requests = [
        {**ids(row), "pixel_values": given, "max_new_tokens": 12} for row in ("a##b##c##", "###a###d", "x####y")
    ]
    replies = [result.generated_tokens for result in generate_batch(model, requests)]
    assert replies == [alone(model, request) for request in requests]


@pytest.mark.bars
@pytest.mark.parametrize("mode", MODES)
def test_a_thousand_questions_about_a_few_pictures_encode_each_once(make_model, ids, pixels, mode):
    model, requests = make_model(media_attention=mode), []
    for number in range(1000):
        chosen = pixels(1, 8)[:, [number % 7, 7]][:, : 1 + number % 2]
        row = ids("ab#" + "cd#" * (number % 2) + chr(97 + number % 23))
        requests.append({**row, "pixel_values": chosen, "max_new_tokens": 6})
    with BatchingEngine(model, num_slots=16) as engine:
        replies = [result.generated_tokens for result in engine.generate(requests)]
        asked, encoded = engine.pool.asked, engine.pool.encoded
    assert replies[::20] == [alone(model, request) for request in requests[::20]]
    assert (asked, encoded) == (1500, 8)
    note_results("batching", {f"{mode}, pictures": {"asked": asked, "encoded": encoded, "saved": 1 - encoded / asked}})


def computed(model, requests, sharing, in_turn=7):
    """The replies to requests, so many at a time, and how many tokens the LM computed."""
    lm, count = model.model.text_model, []
    forward = lm.forward
    lm.forward = lambda **kwargs: count.append(kwargs["input_ids"].shape[1]) or forward(**kwargs)
    config = ContinuousBatchingConfig(page_size=4, num_blocks=512, max_batch_tokens=256, allow_block_sharing=sharing)
    with BatchingEngine(model, config=config) as engine:
        parts = [requests[start : start + in_turn] for start in range(0, len(requests), in_turn)]
        replies = [result.generated_tokens for part in parts for result in engine.generate(part)]
    lm.forward = forward
    return replies, sum(count)


@pytest.mark.parametrize("mode", MODES)
def test_prompts_that_begin_alike_with_the_same_pictures_are_computed_once(make_model, ids, pixels, mode):
    model, requests = make_model(media_attention=mode), []
    for number in range(21):
        row = ids(("abcd#efghijkl#mnopqrst" if number % 7 else "abcdefghijklmnopqrstuv") + "xyz" * (number // 7))
        given = torch.cat([pixels(1, 1, seed=number % 3), pixels(1, 1, seed=10 + number % 2)], dim=1)
        requests.append({**row, "pixel_values": given, "max_new_tokens": 8})
    expected = [alone(model, request) for request in requests]
    for sharing in (True, False):
        replies, tokens = computed(model, requests, sharing)
        assert replies == expected
        prompts = tokens - sum(len(reply) - 1 for reply in replies)
        assert (prompts < 300) == sharing and prompts <= sum(request["input_ids"].shape[1] for request in requests)


def test_a_chat_that_goes_on_computes_its_new_turn_and_encodes_its_new_picture(make_model, ids, pixels):
    model, given = make_model(media_attention="all_preceding"), pixels(1, 4)
    turns, pictures, asked = torch.zeros(1, 0, dtype=torch.long), 0, 0
    with BatchingEngine(model, config=ContinuousBatchingConfig(**{**SMALL, "page_size": 4})) as engine:
        for row in ("hello hello#", "what about # then?", "and now", "and # or #?"):
            turns, pictures = torch.cat([turns, ids(row)["input_ids"]], dim=1), pictures + row.count("#")
            asked += pictures
            request = {"input_ids": turns, "pixel_values": given[:, :pictures], "max_new_tokens": 8}
            (result,) = engine.generate([request])
            assert result.generated_tokens == alone(model, request)
            turns = torch.cat([turns, torch.tensor([result.generated_tokens])], dim=1)
        assert (engine.pool.asked, engine.pool.encoded) == (asked, 4)
        found = engine.manager.batch_processor.cache.search_prefix_match(
            "another", engine.pool.mark(turns[0].tolist(), [])
        )
        assert found == 0  # the same tokens without the pictures


def test_when_all_numbers_of_pictures_are_used_up_the_engine_begins_anew(model, ids, pixels):
    rows = [{**ids("abcd#efgh"), "pixel_values": pixels(1, 1, seed=seed), "max_new_tokens": 6} for seed in range(30)]
    rows += rows[:5]
    with BatchingEngine(model, config=ContinuousBatchingConfig(**{**SMALL, "page_size": 4})) as engine:
        engine.pool.vocabulary = 2**31 // 30
        replies = [result.generated_tokens for result in engine.generate(rows)]
        assert 0 < len(engine.pool.marks) < 15
    assert replies == [alone(model, row) for row in rows]


# Settings


def test_sampling_shuts_out_what_the_processors_of_transformers_shut_out():
    scores = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).mul(3).round(decimals=1)
    settings = [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.6, "top_k": 0}]
    settings.append({"temperature": 2.5, "top_k": 20, "top_p": 0.8})
    numbers = torch.tensor([sampling_numbers({"do_sample": True, **one}, 40) for one in settings], dtype=torch.int32)
    found = choose_by(scores, *numbers.T).softmax(-1)
    for row, one in enumerate(settings):
        warpers = LogitsProcessorList([TemperatureLogitsWarper(one.get("temperature", 1.0))])
        warpers += [TopKLogitsWarper(top_k)] if (top_k := one.get("top_k", 50)) else []
        warpers += [TopPLogitsWarper(one["top_p"])] if "top_p" in one else []
        torch.testing.assert_close(found[row], warpers(None, scores[row : row + 1])[0].softmax(-1))


def test_the_highest_of_disturbed_scores_is_a_draw_by_their_softmax():
    scores = torch.tensor([1.0, -torch.inf, 0.0, 2.0]).repeat(50_000, 1)
    found = disturb(scores).argmax(dim=1).bincount(minlength=4) / 50_000
    torch.testing.assert_close(found, scores[0].softmax(-1), atol=0.01, rtol=0)
    one = torch.tensor([[-torch.inf, -7.0, -torch.inf]]).repeat(1000, 1)
    assert disturb(one).argmax(dim=1).eq(1).all()


def test_greedy_among_sampled_requests_is_exact_and_sampled_ones_differ(model, ids, pixels):
    picture = pixels(1, 1)
    greedy = {**ids("ab#c"), "pixel_values": picture, "max_new_tokens": 12}
    wild = {**greedy, "do_sample": True, "temperature": 3.0, "top_k": 0}
    narrow = {**greedy, "do_sample": True, "top_p": 1e-6}
    replies = [reply.generated_tokens for reply in generate_batch(model, [greedy, wild, narrow, wild, greedy])]
    assert replies[0] == replies[2] == replies[4] == alone(model, greedy)
    assert replies[1] != replies[3] and replies[1] != replies[0]
    assert IMAGE not in replies[1] + replies[3]


def test_a_reply_ends_at_the_models_ends_and_at_those_of_a_request(model, ids):
    request = {**ids("abc"), "max_new_tokens": 12}
    whole = alone(model, request)
    ends = GenerationConfig(eos_token_id=[whole[5], 257])
    replies = generate_batch(model, [request, {**request, "eos_token_id": whole[3]}], ends)
    assert [reply.generated_tokens for reply in replies] == [
        alone(model, request, eos_token_id=[whole[5], 257]),
        alone(model, request, eos_token_id=whole[3]),
    ]
    assert len(replies[1].generated_tokens) < len(replies[0].generated_tokens) < 12


def test_the_image_token_is_never_generated_whatever_the_config_says(make_model, ids):
    model = make_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[IMAGE] = 50 * model.get_output_embeddings().weight.mean(0)
        model.get_output_embeddings().weight[IMAGE] += 10
    replies = generate_batch(model, [{**ids(row), "max_new_tokens": 8} for row in ("abc", "xyz")], GenerationConfig())
    assert all(IMAGE not in reply.generated_tokens for reply in replies)


def test_several_replies_to_one_request(model, ids, pixels):
    rows = [{**ids("ab#cd"), "pixel_values": pixels(1, 1)}, ids("hello"), {**ids("#"), "pixel_values": pixels(1, 1)}]
    requests = [{**row, "max_new_tokens": 10, "num_return_sequences": 3} for row in rows]
    replies = generate_batch(model, requests)
    expected = [alone(model, {**row, "max_new_tokens": 10}) for row in rows]
    assert [reply.generated_tokens for reply in replies] == [reply for reply in expected for _ in range(3)]
    sampled = generate_batch(model, [{**request, "do_sample": True, "temperature": 3.0} for request in requests])
    assert len({tuple(reply.generated_tokens) for reply in sampled}) == 9


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_beams": 3}, "num_beams"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"min_new_tokens": 1}, "min_new_tokens"),
        ({"stop_strings": ["a"]}, "stop_strings"),
        ({"unheard_of": 7}, "unheard_of"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(model, settings, named):
    with pytest.raises(ValueError, match=f"does not honour.*{named}"):
        check_settings({"max_new_tokens": 3, **settings})
    if named != "unheard_of":
        with pytest.raises(ValueError, match=named):
            BatchingEngine(model, GenerationConfig(**settings))


def test_what_changes_nothing_is_taken(model):
    neutral = {"num_beams": 1, "repetition_penalty": 1.0, "min_length": 0, "early_stopping": False, "use_cache": True}
    assert check_settings({**neutral, "top_k": None, "top_p": 0.5}) == {"top_p": 0.5}


def test_requests_that_cannot_be_answered_are_refused_and_the_others_go_on(model, ids, pixels):
    config = ContinuousBatchingConfig(**SMALL)
    row = ids("a#b#")
    with BatchingEngine(model, config=config, max_pictures=3, do_sample=False) as engine:
        for refused, named in (
            (row, "2 <image> tokens, and 0 pictures"),
            ({**row, "pixel_values": pixels(1, 1)}, "2 <image> tokens, and 1 pictures"),
            ({**ids("####"), "pixel_values": pixels(1, 4)}, "at most 3"),
            ({**row, "pixel_values": torch.zeros(1, 2, 3, 20, 20)}, "20 x 20"),
            ({**ids("a" * 2040)}, "room for 1 to 2048"),
            ({"input_ids": []}, "room for 1 to"),
            ({**ids("ab"), "do_sample": True}, "do_sample=False"),
            ({**ids("ab"), "num_beams": 2}, "num_beams"),
        ):
            with pytest.raises(ValueError, match=named):
                engine.add_request(**refused)
        engine.add_request(**ids("abc"), max_new_tokens=3)
        assert list(finished(engine, 1).values()) == [alone(model, {**ids("abc"), "max_new_tokens": 3})]
    with BatchingEngine(model) as engine, pytest.raises(ValueError, match="top_p=1.5"):
        engine.add_request(**ids("ab"), do_sample=True, top_p=1.5)


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_cannot_are_refused_by_name(make_model, family):
    model = make_model(family)
    with pytest.raises(ValueError, match=f"{type(model.model.text_model).__name__} cannot be batched"):
        generate_batch(model, [])


@pytest.mark.bars
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - set(REFUSED)))
def test_families_that_can_are_exact(make_model, make_requests, family):
    model, requests = make_model(family), make_requests()
    replies = [reply.generated_tokens for reply in generate_batch(model, requests)]
    assert replies == [alone(model, request) for request in requests]
    note_results("batching", {f"family {family}": {"equal": len(replies), "requests": len(requests)}})


def answers_by(how, size, ask):
    """The answers to the tiny VQA set, so many at a time, and the seconds of the CPU and of the clock."""
    model, processor, benchmark, queries, examples = ask
    answers, with_images = [], len(examples[0]) > 0
    ends = [processor.end_of_chunk_token_id, processor.tokenizer.eos_token_id]
    settings = {"do_sample": False, "max_new_tokens": benchmark.max_new_tokens, "eos_token_id": ends}
    with BatchingEngine(model, max_pictures=1 + len(examples[0]), do_sample=False) as engine:
        start, of_cpu = time.perf_counter(), time.process_time()
        for first in range(0, len(queries), size):
            part = slice(first, first + size)
            inputs = encode(processor, benchmark, "open_flamingo", examples[part], queries[part], with_images)
            if how == "engine":
                answers += write_answers(model, processor, inputs, benchmark, engine)
            else:
                ids = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
                answers += [benchmark.clean(text) for text in processor.batch_decode(ids, skip_special_tokens=True)]
        return answers, {"cpu_s": time.process_time() - of_cpu, "wall_s": time.perf_counter() - start}


@pytest.mark.bars
@pytest.mark.parametrize("shots", [0, 4])
def test_predictions_by_the_engine_are_those_of_padded_batches(tmp_path, shots):
    benchmarks.write_vqav2(tmp_path, {"train2014": 60, "val2014": 128})
    benchmark = BENCHMARKS["vqav2"]
    support, queries = (read_samples(benchmark, tmp_path, is_support=part) for part in (True, False))
    examples = [[support[number] for number in numbers] for numbers in draw(support)(queries, shots, 0)]
    model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32).eval()
    ask = model, AutoProcessor.from_pretrained(BASE), benchmark, queries, examples
    ways = [(how, size) for how in ("padded", "engine") for size in (8, 32)]
    runs = {f"{how}, {size} at a time": answers_by(how, size, ask) for how, size in ways}
    assert len({tuple(answers) for answers, _ in runs.values()}) == 1
    figures = {name: {key: round(value, 2) for key, value in times.items()} for name, (_, times) in runs.items()}
    note_results("batching", {f"tiny VQA, {shots} shots, {len(queries)} queries, same predictions": figures})


def test_a_model_on_several_devices_is_refused(make_model):
    model = make_model()
    model.hf_device_map = {"model.vision_tower": 0, "model.text_model": 1}
    with pytest.raises(ValueError, match="on one device"):
        BatchingEngine(model)


# The life of an engine


def test_cancelled_requests_end_wherever_they_are_and_the_others_go_on(model, ids, pixels):
    requests = [{**ids(f"a#{n}b"), "pixel_values": pixels(1, 1, seed=n), "max_new_tokens": 40} for n in range(6)]
    with BatchingEngine(model, num_slots=3) as engine:
        names = [engine.add_request(**request, streaming=number == 0) for number, request in enumerate(requests)]
        forked = engine.add_request(**{**requests[0], "num_return_sequences": 3})
        engine.get_result(timeout=5)  # the first three run, the others wait for slots
        engine.cancel_request(names[1])
        engine.cancel_request(names[4])
        engine.cancel_request("never heard of")
        engine.cancel_request(forked)
        results = finished(engine, 4)
        assert results.keys() == {names[0], names[2], names[3], names[5]}
        assert engine.get_result(timeout=0.3) is None
        scheduler = engine.manager.batch_processor.scheduler
        assert not scheduler.active_requests and not scheduler.waiting_requests and not engine.requests.queue
        last = engine.add_request(**requests[1])
        results |= finished(engine, 1)
    expected = [alone(model, request) for request in requests]
    assert results == {names[k]: expected[k] for k in (0, 2, 3, 5)} | {last: expected[1]}


def test_tokens_are_streamed_to_handlers_in_an_event_loop(model, ids, pixels):
    request = {**ids("ab#"), "pixel_values": pixels(1, 1), "max_new_tokens": 9}

    async def ask(engine):
        loop = asyncio.get_running_loop()
        done, pieces = loop.create_future(), []

        def handle(result):
            pieces.append(list(result.generated_tokens))
            if result.is_finished():
                done.set_result(None)

        engine.register_result_handler("mine", handle)
        engine.register_result_handler("dropped", lambda result: None)
        engine.add_request(**request, request_id="mine", streaming=True)
        engine.add_request(**{**request, "max_new_tokens": 500}, request_id="dropped", streaming=True)
        await asyncio.wait_for(done, 10)
        engine.cancel_request("dropped")
        await asyncio.sleep(0.2)
        engine.add_request(**request)
        await asyncio.to_thread(finished, engine, 1)
        return pieces

    with BatchingEngine(model) as engine:
        pieces = asyncio.run(ask(engine))
        assert not engine.manager.output_router.result_handlers
    expected = alone(model, request)
    assert pieces == [expected[: count + 1] for count in range(len(expected))]


def test_generate_beside_an_engine_and_after_it_is_as_before(model, make_requests):
    requests = make_requests(ROWS[:6])
    expected, beside = [alone(model, request) for request in requests], []
    with BatchingEngine(model) as engine:
        names = [engine.add_request(**request) for request in requests]
        thread = threading.Thread(target=lambda: beside.extend(alone(model, request) for request in requests))
        thread.start()
        results = finished(engine, len(requests))
        thread.join()
    assert [results[name] for name in names] == beside == expected
    assert not model.model.text_model._forward_pre_hooks
    pictured = next(request for request in requests if "pixel_values" in request)
    given = {name: pictured[name] for name in ("input_ids", "pixel_values")}
    model(**given, labels=given["input_ids"]).loss.backward()  # the engine's inference mode is not of the model
    model.zero_grad()


def test_pictures_that_cannot_be_encoded_fail_their_request_alone(make_model, ids, pixels, monkeypatch):
    model = make_model()
    good = {**ids("ab#"), "pixel_values": pixels(1, 1), "max_new_tokens": 9}
    expected = alone(model, good)
    with BatchingEngine(model) as engine:
        engine.add_request(**good)
        assert list(finished(engine, 1).values()) == [expected]
        encode = model.model.encode_images
        monkeypatch.setattr(model.model, "encode_images", lambda *_: (_ for _ in ()).throw(MemoryError("too little")))
        bad = engine.add_request(**{**good, "pixel_values": pixels(1, 1, seed=1)})
        result = engine.get_result(timeout=5)
        assert (result.request_id, result.error) == (bad, "too little")
        engine.add_request(**good)  # its picture is there
        assert list(finished(engine, 1).values()) == [expected]
        monkeypatch.setattr(model.model, "encode_images", encode)
        engine.add_request(**{**good, "pixel_values": pixels(1, 1, seed=1)})
        assert list(finished(engine, 1).values()) != [expected]


def test_a_dead_engine_says_so(make_model, ids):
    model = make_model()
    with BatchingEngine(model) as engine:
        model.model.text_model.forward = lambda **kwargs: (_ for _ in ()).throw(MemoryError("too little"))
        engine.add_request(**ids("abc"))
        assert engine.get_result(timeout=5).error == "too little"
        while engine.fatal_error is None:
            time.sleep(0.01)
        with pytest.raises(RuntimeError, match="has stopped: too little"):
            engine.add_request(**ids("abc"))
    with pytest.raises(RuntimeError, match="(A request failed|has stopped): too little"):
        generate_batch(model, [ids("abc")] * 50)


def test_leaving_early_ends_what_is_under_way(model, ids):
    with BatchingEngine(model) as engine:
        for _ in range(4):
            engine.add_request(**ids("abc"), max_new_tokens=2000, eos_token_id=-1)
    assert not engine.manager.is_running()
    left = engine.manager.output_router.output_queue
    assert all(left.get().error for _ in range(left.qsize()))
    with pytest.raises(RuntimeError, match="has stopped: its context was left"):
        engine.add_request(**ids("abc"))


@pytest.mark.parametrize("missing", ["ContinuousBatchingManager", "ContinuousBatchingConfig"])
def test_without_its_engine_the_file_is_imported_and_a_call_says_what_is_missing(model, monkeypatch, missing):
    class Other(types.ModuleType):
        def __getattr__(self, name):
            if name == missing:
                raise AttributeError(name)
            return getattr(transformers, name)

    monkeypatch.setitem(sys.modules, "transformers", Other("transformers"))
    spec = importlib.util.spec_from_file_location("modeling_mmgpt.speed.other", batching.__file__)
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    with pytest.raises(ImportError, match=missing):
        other.generate_batch(model, [])


def test_an_engine_with_other_insides_is_refused(model, monkeypatch):
    monkeypatch.setattr(batching, "ATTRIBUTES", ("input_queue", "request_queue"))
    with pytest.raises(ImportError, match=f"{transformers.__version__} has no request_queue"):
        generate_batch(model, [])
