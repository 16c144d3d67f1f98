"""Random layouts of text, pictures and padding: however they are cut up, the numbers are those of one plain pass.

The reference is slow and obvious: which token sees which image is a loop over a string, and a gated block is computed
token by token and head by head in front of the layers of the bare LM, one row at a time, without padding or cache.
"""

import pytest
import torch
from conftest import note_results
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_mmgpt import compute_image_index
from modeling_mmgpt.conditioning_mmgpt import decoder_layers
from modeling_mmgpt.images_mmgpt import compute_image_numbers, cross_attention_mask


MODES = ("preceding", "all_preceding", "following")
IMAGE, NUM_LATENTS, MOST_IMAGES = 259, 4, 4
MANY = 2000

many_or_few = pytest.mark.parametrize("examples", [50, pytest.param(MANY, marks=pytest.mark.bars)])


def holds(strategy, check, examples):
    """Try a property; return how many layouts it was tried on."""
    tried = []

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    @given(strategy)
    def tried_on(layout):
        tried.append(layout)
        check(*layout)

    tried_on()
    return len(tried)


def keep(name, tried, **figures):
    """Note the figures of the long run."""
    if tried >= MANY:
        note_results("properties", {name: {"examples": tried, **figures}})


# Layouts


def row_of(longest):
    """A row as a string: letters, and `#` for an image."""
    return st.text("abc##", min_size=1, max_size=longest).filter(lambda row: row.count("#") <= MOST_IMAGES)


def rows_of(longest):
    return st.lists(row_of(longest), min_size=1, max_size=3)


@st.composite
def cut_rows(draw):
    """A mode, rows padded to one length on one side, and where they are cut."""
    rows = draw(rows_of(10))
    length = max(map(len, rows))
    pad = draw(st.sampled_from([str.rjust, str.ljust]))
    cuts = draw(st.sets(st.integers(1, length - 1), max_size=3)) if length > 1 else set()
    return draw(st.sampled_from(MODES)), [pad(row, length, "_") for row in rows], [0, *sorted(cuts), length]


@st.composite
def turns(draw):
    """A mode, the rows of two turns, and how to generate."""
    first = draw(rows_of(6))
    second = draw(st.lists(row_of(4), min_size=len(first), max_size=len(first)))
    how = draw(st.sampled_from([{}, {"num_beams": 2}, {"prefill_chunk_size": 2}, {"prompt_lookup_num_tokens": 2}]))
    if len(first) > 1 and "prompt_lookup_num_tokens" in how:
        how = {}  # takes one row
    return draw(st.sampled_from(MODES)), first, second, how


def is_late(rows, cuts, mode):
    """Whether a later piece brings a picture that changes what the pieces before it were."""
    for row in rows:
        for start, stop in zip(cuts[1:], cuts[2:], strict=False):
            if "#" in row[start:stop] and (mode == "following" or "#" not in row[:start]):
                return True
    return False


# The slow and obvious way


def sees(row, mode):
    """The images that each token attends to, counted from 1; `None` in a row without one."""
    places = [place for place, token in enumerate(row) if token == "#"]
    if not places:
        return [None] * len(row)
    seen = []
    for here in range(len(row)):
        before = [number for number, place in enumerate(places, start=1) if place <= here]
        ahead = [number for number, place in enumerate(places, start=1) if place >= here]
        seen.append({"preceding": before[-1:], "all_preceding": before, "following": ahead[:1]}[mode])
    return seen


def slow_block(block, state, seen, latents):
    """One token `(D,)` through a gated block, `latents` a list of `(N, D_vision)`."""
    if seen is None:
        return state
    attended = torch.zeros_like(state)
    if seen:
        attn, looked_at = block.attn, torch.cat([latents[number - 1] for number in seen])
        query = attn.to_q(attn.norm(state))
        key, value = attn.to_kv(looked_at).chunk(2, dim=-1)
        size, heads = len(query) // attn.num_heads, []
        for head in range(attn.num_heads):
            part = slice(head * size, (head + 1) * size)
            weights = (key[:, part] @ query[part] / size**0.5).softmax(0)
            heads.append(weights @ value[:, part])
        attended = attn.to_out(torch.cat(heads))
    state = state + block.attn_gate.tanh() * attended
    return state + block.ff_gate.tanh() * block.ff(state)


class Slow:
    """The model, slowly: its bare LM with a loop in front of the layers that have a gated block."""

    def __init__(self, model, make_lm):
        self.model, self.lm, self.now = model, make_lm(model), None
        for ours, bare in zip(*(decoder_layers(lm) for lm in (model.model.text_model, self.lm)), strict=True):
            if ours.gated_cross_attn_layer is not None:
                bare.register_forward_pre_hook(self.condition(ours.gated_cross_attn_layer))

    def condition(self, block):
        def before_layer(layer, args):
            seen, latents = self.now
            states = [slow_block(block, state, sight, latents) for state, sight in zip(args[0][0], seen, strict=True)]
            return (torch.stack(states)[None], *args[1:])

        return before_layer

    def logits(self, row, pictures):
        """`(T, V)` of an unpadded row."""
        latents = [self.model.model.encode_images(picture[None, None])[0, 0] for picture in pictures]
        self.now = sees(row, self.model.config.media_attention), latents
        tokens = torch.tensor([[IMAGE if token == "#" else ord(token) for token in row]])
        return self.lm(tokens).logits[0]


@pytest.fixture(scope="module")
def models(make_model):
    return {mode: make_model(media_attention=mode) for mode in MODES}


@pytest.fixture(scope="module")
def pool(pixels):
    return pixels(3, 2 * MOST_IMAGES)


def pictures_of(pool, rows, start, stop):
    """The pictures of a piece of the rows `(B, M, 3, height, width)`, noise in the place of those a row lacks."""
    counts = [(row[:start].count("#"), row[start:stop].count("#")) for row in rows]
    most = max(new for _, new in counts)
    if most == 0:
        return None
    given = torch.full((len(rows), most, *pool.shape[2:]), 7.0)
    for number, (old, new) in enumerate(counts):
        given[number, :new] = pool[number, old : old + new]
    return given


# Properties


@many_or_few
def test_numbers_and_mask_are_those_of_a_loop(examples):
    continued = []

    def check(mode, rows, cuts):
        is_image = torch.tensor([[token == "#" for token in row] for row in rows])
        index = compute_image_index(is_image, mode)
        seen = [sees(row, mode) for row in rows]
        assert index.tolist() == [[-1 if s is None else max(s, default=0) for s in row] for row in seen]
        slots = compute_image_numbers(index, MOST_IMAGES + 1)
        assert slots.tolist() == [[n if n <= row.count("#") else 0 for n in range(1, MOST_IMAGES + 2)] for row in rows]
        mask = cross_attention_mask(index, slots, 2, mode)[:, 0, :, ::2]
        for number, row in enumerate(seen):
            for here, numbers in enumerate(row):
                anywhere = set(range(1, MOST_IMAGES + 2))  # where nothing is seen: dropped by the block
                assert {n for n in anywhere if mask[number, here, n - 1]} == set(numbers or anywhere)
        if not is_late(rows, cuts, mode):
            for start, stop in zip(cuts, cuts[1:], strict=False):
                past = is_image[:, :start].sum(1) if start else None
                piece = compute_image_index(is_image[:, start:stop], mode, past)
                if mode != "following" or start:  # a later piece brings no picture
                    expected = index[:, start:stop]
                    assert torch.equal(piece, expected)
                    continued.append(start > 0)

    tried = holds(cut_rows(), check, examples)
    keep("image numbers, slots and mask", tried, continued_pieces=sum(continued))


@many_or_few
@torch.no_grad()
def test_pieces_from_a_cache_give_the_logits_of_the_slow_model(models, make_lm, ids, pool, examples):
    slow = {mode: Slow(model, make_lm) for mode, model in models.items()}
    largest, late = [0.0, 0.0], []

    def check(mode, rows, cuts):
        model, batch = models[mode], ids(*rows)
        mask = batch["attention_mask"]
        whole = model(**batch, pixel_values=pictures_of(pool, rows, 0, cuts[-1]), use_cache=False).logits
        for number, row in enumerate(rows):
            row = row.strip("_")
            expected = slow[mode].logits(row, pool[number, : row.count("#")])
            largest[0] = max(largest[0], (whole[number, mask[number].bool()] - expected).abs().max().item())
        cache, parts = None, []
        try:
            for start, stop in zip(cuts, cuts[1:], strict=False):
                given = pictures_of(pool, rows, start, stop)
                tokens = batch["input_ids"][:, start:stop]
                out = model(tokens, mask[:, :stop], given, cache=cache, use_cache=True)
                cache = out.cache
                parts.append(out.logits)
        except ValueError:
            assert is_late(rows, cuts, mode)
            late.append(True)
            return
        assert not is_late(rows, cuts, mode)
        ours = torch.cat(parts, dim=1)
        largest[1] = max(largest[1], (ours - whole)[mask.bool()].abs().max().item())
        assert max(largest) < 1e-4

    tried = holds(cut_rows(), check, examples)
    keep(
        "logits", tried, refused_as_late=len(late),
        from_the_slow_model=largest[0], pieces_from_the_whole=largest[1],
    )  # fmt: skip


@many_or_few
@torch.no_grad()
def test_a_later_turn_generates_what_full_forwards_choose(models, ids, pool, examples):
    with_new_pictures = []

    def check(mode, first, second, how):
        model, new = models[mode], {"do_sample": False, "max_new_tokens": 2, "min_new_tokens": 2}
        start = [row.rjust(max(map(len, first)), "_") for row in first]
        out = model.generate(
            **ids(*start), pixel_values=pictures_of(pool, start, 0, None), **new, return_dict_in_generate=True
        )
        added = ids(*(row.rjust(max(map(len, second)), "_") for row in second))
        tokens = torch.cat([out.sequences, added["input_ids"]], dim=1)
        mask = torch.cat([ids(*start)["attention_mask"], torch.ones_like(out.sequences[:, -2:])], dim=1)
        mask = torch.cat([mask, added["attention_mask"]], dim=1)
        both = [a + b for a, b in zip(start, second, strict=True)]
        cut = len(start[0])
        given = pictures_of(pool, both, cut, None)
        with_new_pictures.append(given is not None)
        cache = out.cache
        if "num_beams" in how:
            cache.batch_repeat_interleave(2)
        ours = model.generate(tokens, attention_mask=mask, pixel_values=given, cache=cache, **new, **how)
        everything = {"attention_mask": mask, "pixel_values": pictures_of(pool, both, 0, None)}
        if "num_beams" in how:
            expected = model.generate(tokens, **everything, **new, **how, use_cache=False)
        else:
            expected = by_full_forwards(model, tokens, **everything)
        assert torch.equal(ours, expected)

    tried = holds(turns(), check, examples)
    keep("later turns", tried, with_new_pictures=sum(with_new_pictures))


def by_full_forwards(model, tokens, attention_mask, pixel_values):
    """Two greedy tokens, each by a whole forward without a cache."""
    for _ in range(2):
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        out = model(tokens, attention_mask, pixel_values, position_ids=position_ids, use_cache=False)
        logits = out.logits[:, -1]
        logits[:, [257, IMAGE]] = float("-inf")
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
        attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], dim=1)
    return tokens
