"""The tiny world: every answer is right and the only one, and what is held out stays out."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tiny_world import corpus, digits, language, look_ups, questions, scenes, tokenizer
from tiny_world.mixture import MIXTURE, SKILLS, example, mixture
from tiny_world.scenes import COLOURS, SHAPES, UNSEEN_PAIRS
from transformers import AutoTokenizer

import processing_mmgpt


SAMPLES = 200
SPLITS = ("train", "test")
PLACES = "top-left|top-right|bottom-left|bottom-right|top|bottom|left|right|center"


@pytest.fixture(scope="module")
def tok():
    return tokenizer.build_tokenizer()


@pytest.fixture
def drawn(monkeypatch):
    """The scenes rendered since the last `clear()`, in order; rendering itself is left out, which saves time."""
    shown = []
    for module in (questions, corpus):
        monkeypatch.setattr(module, "render", lambda scene: shown.append(scene) or scene)
    return shown


def texts(example, role):
    return [part["text"] for m in example.messages if m["role"] == role for part in m["content"] if "text" in part]


def mentioned(text, names):
    """The one of `names` that a question or key mentions, or None."""
    found = set(re.findall("[A-Za-z]+", text)) & set(names)
    assert len(found) <= 1, text
    return next(iter(found), None)


def answers(scene, question):
    """All right answers to a question about a scene, from its words and the scene alone."""
    colour, shape = mentioned(question, COLOURS), mentioned(question, SHAPES)
    meant = [o for o in scene.objects if colour in (None, o.colour) and shape in (None, o.shape)]
    if "text" in question:
        return {scene.text.colour if "colour" in question else scene.text.characters}
    if re.match("How many|Count", question):
        return {str(len(meant))}
    if re.match("Does the picture show an?|Can you see|Is there", question):
        return {"yes" if meant else "no"}
    if "Describe" in question or "What does the picture show" in question:
        return {", ".join(f"{o.size} {o.colour} {o.shape} at {o.position}" for o in meant)}
    asked = re.search("colour|shape|size|small|[Ww]here", question).group()
    attribute = {"small": "size", "where": "position"}.get(asked.lower(), asked)
    assert len(meant) == 1, (scene, question)
    return {getattr(o, attribute) for o in meant}


def test_pictures_depend_on_the_scene_alone():
    for draw in (scenes.sample_scene, scenes.sample_text_scene):
        one, same, other = (draw(random.Random(seed)) for seed in (1, 1, 2))
        assert one == same != other
        picture = np.asarray(scenes.render(one))
        assert picture.shape == (48, 48, 3) and picture.dtype == np.uint8
        assert np.array_equal(picture, scenes.render(same)) and not np.array_equal(picture, scenes.render(other))


def test_objects_are_painted_in_their_cells():
    for seed in range(SAMPLES):
        scene = scenes.sample_scene(random.Random(seed))
        assert 1 <= len({o.position for o in scene.objects}) == len(scene.objects) <= 4
        brightest = np.asarray(scenes.render(scene)).max(-1)
        cells = {p: brightest[16 * r : 16 * r + 16, 16 * c : 16 * c + 16] for p, (c, r) in scenes.CELLS.items()}
        assert {p for p, cell in cells.items() if (cell > 120).sum() > 15} == {o.position for o in scene.objects}


def test_every_symbol_and_shape_has_its_own_mask():
    masks = [scenes._glyph_mask(symbol) for symbol in scenes.SYMBOLS]
    assert len(set(scenes.SYMBOLS)) == 32
    for k, mask in enumerate(masks):
        assert mask.max() > 0.9
        assert all(np.abs(mask - other).sum() > 0.2 * mask.sum() for other in masks[:k])
    for size in scenes.SIZES.values():
        shapes = [scenes._shape_mask(shape, size) for shape in SHAPES]
        for k, mask in enumerate(shapes):
            assert all(np.abs(mask - other).sum() > 0.15 * mask.sum() for other in shapes[:k])


def test_text_stays_inside_the_picture():
    for seed in range(SAMPLES):
        text = scenes.sample_text_scene(random.Random(seed)).text
        assert 0 <= text.left and text.left + scenes.PITCH * (len(text.characters) - 1) + scenes.GLYPH_WIDTH <= 48
        assert 0 <= text.top <= 48 - scenes.GLYPH_HEIGHT


@pytest.mark.parametrize("skill", sorted(questions.SKILLS.keys() - {"digits"}))
@pytest.mark.parametrize("split", SPLITS)
def test_each_question_about_a_scene_has_its_answer_and_no_other(drawn, skill, split):
    for index in range(SAMPLES):
        drawn.clear()
        sample = example(skill, 0, index, split)
        asked, given = texts(sample, "user"), texts(sample, "assistant")
        assert sample.skill == skill and sample.answer == given[-1] and sample.images == drawn
        pictures = [sum(p["type"] == "image" for p in m["content"]) for m in sample.messages if m["role"] == "user"]
        assert sum(pictures) == len(drawn)
        remaining, scene = list(drawn), None
        for turn, (question, answer) in enumerate(zip(asked, given, strict=True)):
            for _ in range(pictures[turn]):
                scene = remaining.pop(0)
            if question in questions.WORDINGS["it_position"]:
                words = re.findall(r"[a-z]+", asked[turn - 1])
                names = {word for word in words if word in COLOURS or word in SHAPES}
                (it,) = (o for o in scene.objects if names <= set(o.pair))
                assert answer == it.position
            elif skill == "caption":
                assert {answer} == answers(scene, question)
            else:
                assert {answer} == answers(scene, question), (scene, question)


def test_turns_and_pictures_of_dialogues():
    shapes = {"second_turn": [1, 0], "two_pictures": [1, 1], "three_turns": [1, 0, 0], "colour": [1], "sums": [0]}
    for skill, pictures in shapes.items():
        users = [m["content"] for m in example(skill, 0, 0).messages if m["role"] == "user"]
        assert [[part["type"] for part in content] for content in users] == [
            ["image"] * n + ["text"] for n in pictures
        ]


def test_captions_are_in_reading_order(drawn):
    for index in range(SAMPLES):
        places = re.findall(PLACES, example("caption", 0, index).answer)
        order = [list(scenes.CELLS).index(place) for place in places]
        assert order == sorted(order)


@pytest.mark.parametrize("skill", ["size", "yes_no", "count", "count_colour"])
def test_answers_are_balanced(drawn, skill):
    total = 2000
    counts = Counter(example(skill, 1, index).answer for index in range(total))
    expected = total / len(counts)
    assert len(counts) == {"size": 2, "yes_no": 2, "count": 4, "count_colour": 5}[skill]
    assert all(abs(count - expected) < 4.5 * expected**0.5 for count in counts.values()), counts


def test_a_no_is_a_near_miss(drawn):
    for index in range(1000):
        drawn.clear()
        sample = example("yes_no", 0, index)
        (scene,), (question,) = drawn, texts(sample, "user")
        colour, shape = mentioned(question, COLOURS), mentioned(question, SHAPES)
        assert (colour, shape) not in UNSEEN_PAIRS
        if sample.answer == "no":
            colours, shapes = {o.colour for o in scene.objects}, {o.shape for o in scene.objects}
            possible = {(c, s) for c in colours for s in shapes} - {o.pair for o in scene.objects} - set(UNSEEN_PAIRS)
            assert (colour, shape) in possible if possible else (colour in colours) != (shape in shapes)


def test_unseen_pairs_are_asked_for_and_occur_nowhere_else(drawn):
    assert len(UNSEEN_PAIRS) == len({c for c, _ in UNSEEN_PAIRS}) == len({s for _, s in UNSEEN_PAIRS}) == 4
    kinds = Counter()
    for index in range(SAMPLES):
        drawn.clear()
        sample = example("unseen_pairs", 0, index, "test")
        held = [o for o in drawn[0].objects if o.pair in UNSEEN_PAIRS]
        (kind,) = (k for k in ("colour", "shape", "position") if any(getattr(o, k) == sample.answer for o in held))
        kinds[kind] += 1
    assert min(kinds.values()) > SAMPLES / 5
    drawn.clear()
    for index in range(1500):
        mixture(0, index)
        for phase in corpus.DOCUMENTS:
            document = corpus.document(0, index, phase)
            assert not any(f"{colour} {shape}" in document.text for colour, shape in UNSEEN_PAIRS)
    assert len(drawn) > 3000
    assert not any(o.pair in UNSEEN_PAIRS for scene in drawn for o in scene.objects)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("skill", sorted(language.SKILLS))
def test_each_question_without_a_picture_has_its_answer(skill, split):
    for index in range(SAMPLES):
        sample = example(skill, 0, index, split)
        (question,) = texts(sample, "user")
        numbers = [int(n) for n in re.findall(r"\d+", question)]
        if skill == "facts":
            noun = mentioned(question, language.CATEGORY)
            assert noun in language.NOUNS[sample.answer]
            assert (noun in language.FACT_NOUNS["test"]) == (split == "test")
            assert re.search(r"\ban? " + noun, question).group().startswith("an " if noun[0] in "aeiou" else "a ")
            continue
        items = question.split(": ")[1].split() if skill in ("sorting", "copying") else numbers
        right = {
            "sums": lambda n: str(sum(n)),
            "differences": lambda n: str(n[0] - n[1]),
            "sorting": lambda n: " ".join(sorted(n)),
            "copying": " ".join,
        }[skill]
        assert sample.answer == right(items)
        assert language.is_held_out(*sorted(items) if skill == "sums" else items) == (split == "test")
        if skill in ("sums", "differences"):
            assert 0 <= int(sample.answer) < 100


def test_a_tenth_is_held_out_and_facts_are_split_within_each_category():
    share = np.mean([language.is_held_out(a, b) for a in range(100) for b in range(100)])
    assert 0.08 < share < 0.12
    assert len(language.CATEGORY) == 96 == len(language.FACT_NOUNS["train"]) + len(language.FACT_NOUNS["test"])
    for nouns in language.NOUNS.values():
        assert len(set(nouns) & set(language.FACT_NOUNS["test"])) == 4


def test_the_corpus_is_right_and_leaves_out_what_is_held_out():
    stated = set()
    for seed in range(1500):
        for line in re.sub(r"([:=])( \.)*\n? *", r"\1 ", corpus.text_lines(random.Random(seed)).text).splitlines():
            numbers = list(map(int, re.findall(r"\d+", line)))
            if match := re.fullmatch(r"\d+ (\+|-|plus|minus) \d+(?: =|:) \d+|(plus|minus) \d+ \d+: \d+", line):
                a, b, value = numbers
                is_sum = (match[1] or match[2]) in ("+", "plus")
                assert value == (a + b if is_sum else a - b)
                assert not language.is_held_out(*(sorted((a, b)) if is_sum else (a, b)))
            elif match := re.fullmatch(r"(?:sort )?([\d ]+)(?: sorted)?: ([\d ]+)", line):
                assert match[2].split() == sorted(match[1].split())
                assert not language.is_held_out(*match[1].split())
            elif match := re.fullmatch(r"copy (.*): (.*)|(.*) again: (.*)", line):
                given, value = [group for group in match.groups() if group]
                spelled = set(given.split()) <= set(language.SPELLED_WORDS["train"])
                assert value == given and (spelled or not language.is_held_out(*given.split()))
            else:
                noun, category = re.fullmatch(r"(?:kind |an? )?(\w+)(?:: | is an? )(\w+)", line).groups()
                assert language.CATEGORY[noun] == category
                stated.add(noun)
    assert stated == set(language.CATEGORY)


def entries(document):
    """The (key, value) lines of a document of look-ups."""
    body = document.text.removeprefix(corpus.IMAGE).removesuffix(corpus.END_OF_CHUNK)
    return [tuple(line.split(": ")) for line in re.sub(r":( \.)*\n? *", ": ", body).splitlines()]


def asked(key):
    """The kind of look-up that a key asks for."""
    form = re.sub("|".join(SHAPES), "{shape}", re.sub("|".join(COLOURS), "{colour}", key)) + ":"
    (kind,) = [kind for kind, forms in corpus.KEYS.items() if form in forms]
    return kind


def test_look_ups_of_the_corpus_are_right(drawn):
    forms = Counter()
    for seed in range(600):
        drawn.clear()
        document = corpus.look_ups(random.Random(seed), ("objects", "text")[seed % 3 == 0])
        (scene,) = drawn
        for key, value in entries(document):
            colour, shape = mentioned(key, COLOURS), mentioned(key, SHAPES)
            meant = [o for o in scene.objects if colour in (None, o.colour) and shape in (None, o.shape)]
            match asked(key):
                case "reading":
                    assert value == scene.text.characters
                case "text_colour":
                    assert value == scene.text.colour
                case "yes_no":
                    assert value == ("yes" if meant else "no")
                    forms[value] += 1
                case "count" | "count_colour":
                    assert value == str(len(meant))
                case attribute:
                    (o,) = meant
                    assert value == getattr(o, attribute)
            forms[asked(key)] += 1
        for key, value in zip(document.pieces[1::2], document.pieces[2::2], strict=False):
            assert not key[1] and value[1]
            assert re.fullmatch(r"[a-z ]+:( \.){0,9}\n?", key[0]) and re.fullmatch(r" ?[^\s:]+\n", value[0])
            forms["own line" if key[0].endswith("\n") else "same line"] += 1
    assert abs(forms["yes"] - forms["no"]) < 4 * (forms["yes"] + forms["no"]) ** 0.5
    assert abs(forms["own line"] - forms["same line"]) < 4 * (forms["own line"] + forms["same line"]) ** 0.5


def test_yes_and_no_are_balanced_in_the_corpus_even_about_one_object():
    counts = Counter()
    for seed in range(1500):
        rng = random.Random(seed)
        found = corpus._scene_entries(rng, scenes.sample_scene(rng, count=1))
        counts.update(value for key, value in found if asked(key[:-1]) == "yes_no")
        others = [key for key, _ in found if asked(key[:-1]) != "yes_no"]
        assert 5 <= len(found) <= 6 and len(others) == len(set(others))
    assert abs(counts["yes"] - counts["no"]) < 3 * (counts["yes"] + counts["no"]) ** 0.5


def test_dense_captions_name_every_object_in_any_order(drawn):
    in_order = Counter()
    for seed in range(SAMPLES):
        drawn.clear()
        document = corpus.dense_caption(random.Random(seed))
        (scene,) = drawn
        (caption,) = [text for text, learned in document.pieces[:-1] if learned]
        named = caption.strip().split(", ")
        expected = [f"{o.size} {o.colour} {o.shape} at {o.position}" for o in scene.objects]
        assert sorted(named) == sorted(expected)
        says_so = document.pieces[1] == (corpus.IN_ORDER, False)
        in_order[says_so, named == expected] += len(named) > 1
    assert not in_order[True, False] and in_order[True, True]
    assert in_order[False, False] > in_order[False, True] > 0


def test_in_context_sequences_follow_one_rule(drawn):
    mappings, known = set(), [set(corpus.PSEUDO_WORDS), set(language.SPELLED_WORDS["train"])]
    spelled = 0
    for seed in range(SAMPLES):
        drawn.clear()
        document = corpus.in_context(random.Random(seed))
        names = [text.strip() for text, _ in document.pieces[2::4]]
        assert len(names) == len(drawn) == len(document.images) == 9
        assert 1 <= len(set(names)) <= 4 and any(set(names) <= words for words in known)
        learned = [(place, text.strip()) for place, (text, learn) in enumerate(document.pieces) if learn]
        assert learned == [(4 * k + 2, name) for k, name in enumerate(names) if name in names[:k]]
        spelled += set(names) <= known[1]
        objects = [scene.objects for scene in drawn]
        assert all(len(o) == 1 for o in objects)
        rules = [
            {(getattr(o, rule), name) for (o,), name in zip(objects, names, strict=True)}
            for rule in ("colour", "shape")
        ]
        assert any(len(rule) == len(set(names)) == len({member for member, _ in rule}) for rule in rules)
        mappings.update(min(rules, key=len))
    assert len({member for member, _ in mappings}) == len(COLOURS) + len(SHAPES)
    assert len({name for _, name in mappings} & known[0]) > 90
    assert spelled / SAMPLES == pytest.approx(corpus.SPELLED, abs=0.1)


def test_no_document_holds_a_new_name():
    new, known = (set(language.SPELLED_WORDS[split]) for split in ("test", "train"))
    assert len(new) > 200
    seen = set()
    for index in range(1000):
        seen.update(re.findall("[a-z]+", corpus.document(0, index, ("perceive", "look_up")[index % 2]).text))
    assert len(seen & known) > 200 and not seen & new


@pytest.mark.parametrize("phase", sorted(corpus.DOCUMENTS))
def test_documents(phase, drawn):
    learned, control = Counter(), {corpus.IMAGE, corpus.END_OF_CHUNK}
    for index in range(500):
        document = corpus.document(3, index, phase)
        assert document.text.count(corpus.IMAGE) == len(document.images)
        assert any(learn for _, learn in document.pieces)
        for text, learn in document.pieces:
            assert text in control or not any(token in text for token in control)
            assert not (learn and text == corpus.IMAGE)
            learned[learn] += 1
        assert "?" not in document.text
        assert not re.search(r"\b(What|Which|Where|How|Is|Describe|Sort|Repeat|Tell)\b", document.text)
    again = [corpus.document(3, index, phase).pieces for index in (5, 6)]
    assert again == [corpus.document(3, index, phase).pieces for index in (5, 6)] and again[0] != again[1]
    assert sum(corpus.DOCUMENTS[phase].values()) == sum(corpus.PICTURES[phase].values()) == 100


def test_the_mixture_is_a_pure_function_of_its_seed_and_index():
    for index in range(40):
        one, same = mixture(0, index), mixture(0, index)
        assert one.messages == same.messages
        assert [i.tobytes() for i in one.images] == [i.tobytes() for i in same.images]
    assert [mixture(0, i).messages for i in range(9)] != [mixture(1, i).messages for i in range(9)]
    assert [mixture(0, i).messages for i in range(9)] != [mixture(0, i, "test").messages for i in range(9)]
    train, test = ({i.tobytes() for k in range(50) for i in example("colour", 0, k, s).images} for s in SPLITS)
    assert len(train) == len(test) == 50 and not train & test


def test_the_mixture_has_its_shares(drawn):
    assert MIXTURE.keys() == SKILLS.keys() - {"unseen_pairs"} and sum(MIXTURE.values()) == 100
    samples = [mixture(0, index) for index in range(2000)]
    pictures = [sample for sample in samples if sample.images]
    assert len(pictures) / len(samples) == pytest.approx(0.6, abs=0.04)
    assert np.mean([len(sample.messages) > 2 for sample in pictures]) == pytest.approx(0.22, abs=0.04)
    assert MIXTURE["yes_no"] > 3 * MIXTURE["colour"]


def test_digits_of_the_test_split_are_out_of_reach_of_training(monkeypatch):
    assert len(digits.TRAIN) == 1297 and len(digits.TEST) == 500
    assert sorted(digits.TRAIN + digits.TEST) == list(range(1797))
    used = []
    plain = digits.digit_picture
    monkeypatch.setattr(
        digits, "digit_picture", lambda index, rng=None: used.append((index, rng)) or plain(index, rng)
    )
    for seed in range(SAMPLES):
        example("digits", 0, seed)
        corpus.dense_caption(random.Random(seed), "digit")
        corpus.look_ups(random.Random(seed), "digit")
    assert len(used) == 3 * SAMPLES and all(index in digits.TRAIN and rng for index, rng in used)
    used.clear()
    for seed in range(SAMPLES):
        sample = example("digits", 0, seed, "test")
        assert used[-1][0] in digits.TEST and used[-1][1] is None
        assert sample.answer == digits.digit_label(used[-1][0])


def test_digit_pictures_vary_only_for_training():
    plain, same = (digits.digit_picture(7).tobytes() for _ in range(2))
    assert plain == same and digits.digit_picture(7).size == (48, 48)
    varied = {digits.digit_picture(7, random.Random(seed)).tobytes() for seed in range(5)}
    assert len(varied | {plain}) == 6


def test_every_word_of_the_world_is_one_token_wherever_it_stands(tok, drawn):
    written = set()
    for index in range(1500):
        sample = mixture(0, index)
        written.update(texts(sample, "user") + texts(sample, "assistant"))
        for phase in corpus.DOCUMENTS:
            written.update(text for text, _ in corpus.document(0, index, phase).pieces)
    written -= {corpus.IMAGE, corpus.END_OF_CHUNK}
    words = set(re.findall("[A-Za-z]*[a-z][A-Za-z]*(?:-[a-z]+)?", " ".join(written)))
    words -= {"a", *language.SPELLED_WORDS["train"]}
    template = re.findall("[A-Za-z]{2,}", tokenizer._template())
    assert words | set(template) == set(tokenizer._words())
    for word in words:
        (alone,) = tok.encode(word, add_special_tokens=False)
        assert alone > tok.vocab["▁"]
        for text in (f" {word}", f"red {word}", f"red:\n{word}", f"\n\n{word}", f"{word}.", f"{word}\n"):
            assert alone in tok.encode(text, add_special_tokens=False), text


def test_the_shipped_base_has_this_tokenizer_and_the_template_of_the_package(tok):
    base = Path(scenes.__file__).parent / "base"
    shipped = json.loads((base / "tokenizer.json").read_text())
    assert shipped["model"] == json.loads(tok.backend_tokenizer.to_str())["model"]
    template = Path(processing_mmgpt.__file__).with_name("chat_template_mmgpt.jinja")
    assert (base / "chat_template.jinja").read_text() == template.read_text()


def test_token_budget_digits_and_characters(tok):
    def pieces(text):
        return tok.convert_ids_to_tokens(tok.encode(text, add_special_tokens=False))

    assert len(tok) <= 1100
    assert pieces("23 + 45 = 68") == ["▁2", "3", "▁+", "▁4", "5", "▁=", "▁6", "8"]
    assert pieces("text: K7P\n") == ["▁text", ":", "▁K", "7", "P", "▁\n"]
    assert pieces("\nred") == ["▁\n", "▁red"] and pieces(" red") == ["▁red"]
    for symbols in ("A#2", "+=%", "QXY"):
        assert len(pieces(symbols)) == 3
    preamble = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    assert len(pieces(preamble)) == len(re.findall(r"\w+|\.", preamble))
    assert len(pieces("\n\n### Instruction:\n")) == 5


@pytest.mark.parametrize(
    "text",
    [
        "a large red circle at the top-left",
        "red\ngreen\n\nblue\n\n\nwhite",
        "two  spaces and redness",
        "Grüße, naïve 東京 🙂",
        "<0x41> is no byte, < nor this >",
        "odd , spaces ? I 'm sure",
        "tab\there",
        r"~`!@#$%^&*()_-+={}[]|\:;'<,>.?/" + '"',
    ],
)
def test_text_comes_back_from_its_ids(tok, text):
    ids = tok.encode(text, add_special_tokens=False)
    assert tok.unk_token_id not in ids
    assert tok.decode(ids) == text


def test_the_saved_tokenizer_gives_the_same_ids_around_control_tokens(tok, tmp_path):
    tok.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    control = loaded.add_tokens([corpus.IMAGE, corpus.END_OF_CHUNK], special_tokens=True)
    assert control == 2
    image, end = loaded.convert_tokens_to_ids([corpus.IMAGE, corpus.END_OF_CHUNK])
    caption = tok.encode("large red", add_special_tokens=False)
    assert loaded.encode("<image>large red<|endofchunk|>", add_special_tokens=False) == [image, *caption, end]


def test_learned_pieces_tokenize_apart_as_they_do_together(tok, drawn):
    control = re.compile("|".join(map(re.escape, (corpus.IMAGE, corpus.END_OF_CHUNK))))
    for index in range(300):
        for phase in corpus.DOCUMENTS:
            document = corpus.document(0, index, phase)
            apart = [text for text, _ in document.pieces if not control.fullmatch(text)]
            whole = [text for text in control.split(document.text) if text]
            assert sum((tok.encode(t, add_special_tokens=False) for t in apart), []) == sum(
                (tok.encode(t, add_special_tokens=False) for t in whole), []
            )


def test_no_look_up_where_no_object_can_be_named():
    twins = scenes.sample_scene(random.Random(0), count=2, pairs=[("red", "circle"), ("red", "circle")])
    for kind in look_ups.NAMED_BY:
        assert look_ups.look_up(random.Random(0), kind, twins) is None
