"""Packing: several documents in a row give what each gives alone."""

import copy
import random

import pytest
import torch
from conftest import FAMILIES
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from modeling_mmgpt import compute_image_index
from modeling_mmgpt.packing_mmgpt import CANNOT_PACK, positions_in_document
from processing_mmgpt import MMGPTCollator
from processing_mmgpt.data.skip_log import count_skips


MODES = ("preceding", "all_preceding", "following")
# Two rows, their documents, and the pictures each row needs; "ab" and "q" are bare text.
ROWS = [["a#bc#d", "ab", "x#yz"], ["q", "#rs#t#u"]]


@pytest.fixture
def packed(ids, pixels):
    """The rows of `ROWS`, packed, as arguments of the model."""
    joined = ["".join(row) for row in ROWS]
    width = max(map(len, joined))
    numbers = [[n for n, document in enumerate(row, start=1) for _ in document] for row in ROWS]
    return {
        **ids(*[row + "_" * (width - len(row)) for row in joined]),
        "pixel_values": pixels(2, 3, seed=4),
        "document_index": torch.tensor([row + [0] * (width - len(row)) for row in numbers]),
    }


def alone(ids, packed):
    """Each document of `ROWS` with its place in the packed rows and its own pictures."""
    for number, row in enumerate(ROWS):
        start = images = 0
        for document in row:
            count = document.count("#")
            pictures = packed["pixel_values"][number : number + 1, images : images + count]
            given = {"pixel_values": pictures} if count else {}
            yield number, slice(start, start + len(document)), {**ids(document), **given}
            start, images = start + len(document), images + count


@pytest.mark.parametrize("mode", MODES)
def test_image_index_of_a_packed_row_is_that_of_its_documents(mode):
    rng = random.Random(0)
    for _ in range(200):
        documents = [[rng.random() < 0.3 for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(1, 5))]
        numbers = [n for n, document in enumerate(documents, start=1) for _ in document] + [0, 0]
        is_image = torch.tensor([[token for document in documents for token in document] + [False, False]])
        index = compute_image_index(is_image, mode, document_index=torch.tensor([numbers]))[0].tolist()
        before, expected = 0, []
        for document in documents:
            own = compute_image_index(torch.tensor([document]), mode)[0].tolist()
            expected += [k + before if k > 0 else k for k in own]
            before += sum(document)
        assert index == [*expected, -1, -1]


def test_positions_begin_anew_with_every_document():
    index = torch.tensor([[1, 1, 1, 2, 3, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2]])
    assert positions_in_document(index).tolist() == [[0, 1, 2, 0, 0, 1, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", MODES)
def test_each_document_is_computed_as_if_alone(make_model, ids, packed, mode, attention):
    model = make_model(media_attention=mode, attention=attention)
    with torch.no_grad():
        together = model(**packed).logits
        for row, place, arguments in alone(ids, packed):
            assert (together[row, place] - model(**arguments).logits[0]).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("mode", MODES)
def test_flex_attention_keeps_documents_apart_alike(make_model, packed, mode):
    model = make_model(media_attention=mode)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = model(**packed).logits
        model.model.text_model.set_attn_implementation("flex_attention")
        found = model(**packed).logits
    real = packed["document_index"] > 0
    assert model.config.text_config._attn_implementation == "flex_attention"
    assert (found - expected)[real].abs().max() < 1e-5


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_that_cannot_pack_say_so_and_the_others_do(make_model, ids, packed, family):
    model = make_model(family)
    if family in CANNOT_PACK:
        with pytest.raises(ValueError, match=f"(?s){family}.*row of its own"):
            model(**packed)
        return
    with torch.no_grad():
        together = model(**packed).logits
        for row, place, arguments in alone(ids, packed):
            assert (together[row, place] - model(**arguments).logits[0]).abs().max() < 1e-5


def test_falcon_with_alibi_cannot_pack(make_model, packed):
    with pytest.raises(ValueError, match="falcon"):
        make_model("falcon", text={"alibi": True})(**packed)


def test_nothing_passes_from_one_document_to_another(model, packed):
    """Not a bit: neither by the text before a document nor by its pictures."""
    changed = copy.deepcopy(packed)
    changed["input_ids"][0, 0] += 1
    changed["pixel_values"][0, :2] += 1.0  # of the first document
    changed["pixel_values"][1, 1:] += 1.0
    changed["input_ids"][1, 5] += 1
    with torch.no_grad():
        before, after = model(**packed).logits, model(**changed).logits
    assert torch.equal(before[0, 6:12], after[0, 6:12]) and not torch.equal(before[0, :6], after[0, :6])
    assert torch.equal(before[1, :4], after[1, :4]) and not torch.equal(before[1, 4:], after[1, 4:])


def test_a_packed_text_document_is_the_bare_lm(model, make_lm, ids, packed):
    with torch.no_grad():
        expected = make_lm(model)(**ids("ab")).logits[0]
        assert (model(**packed).logits[0, 6:8] - expected).abs().max() < 1e-5


def test_what_cannot_be_packed_is_refused(model, make_model, ids, packed):
    cache = model(**ids("ab"), use_cache=True).cache
    with pytest.raises(ValueError, match="Packed rows cannot be continued"):
        model(**packed, cache=cache)
    with pytest.raises(ValueError, match="max_num_images"):
        make_model(resampler={"num_heads": 2, "head_dim": 8, "num_latents": 4, "max_num_images": 4})(**packed)


# The collator


def record(images, question, answer):
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
    messages = [
        {"role": "system", "content": "P"},
        {"role": "user", "content": content},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "images": images}


@pytest.fixture
def records(picture):
    return [
        record([picture(0)], "one", "b"),
        record([], "long question, long answer", "so it is, and goes on"),
        record([], "g", "hi"),
        record([picture(1), picture(2)], "two", "pictures"),
        record([], "another", "text"),
    ]


def losses(model, batch):
    """The summed loss of each document of a batch, by its tokens."""
    with torch.no_grad():
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    index = batch.get("document_index", batch["attention_mask"])[:, 1:]
    tokens = batch["input_ids"][:, 1:]
    return {
        tuple(tokens[row][index[row] == number].tolist()): float(loss[row][index[row] == number].sum())
        for row in range(len(index))
        for number in set(index[row].tolist()) - {0}
    }


def without_first(documents):
    """A document's first token is no target of it, and at the start of a row there is none before it."""
    return {tokens[tokens[0] == 256 :]: loss for tokens, loss in documents.items()}


def test_packed_rows_hold_every_document_once(processor, records, draw):
    alone = [MMGPTCollator(processor)([one]) for one in records]
    batch = MMGPTCollator(processor, max_length=160, packing=True)(records)
    drawn, expected = [], [draw(one["input_ids"][0], one["labels"][0] != -100) for one in alone]
    for ids, labels, index in zip(batch["input_ids"], batch["labels"], batch["document_index"], strict=True):
        numbers = index.tolist()
        assert sorted(set(numbers) - {0}) == list(range(1, max(numbers) + 1)) and 0 not in numbers[: sum(index > 0)]
        drawn += [draw(ids[index == number], labels[index == number] != -100) for number in range(1, max(numbers) + 1)]
    assert sorted(drawn) == sorted(expected)
    assert len(batch["input_ids"]) < len(records) and batch["input_ids"].shape[1] <= 160
    assert torch.equal(batch["attention_mask"], (batch["document_index"] > 0).long())


def test_packing_needs_a_length(processor):
    with pytest.raises(ValueError, match="max_length"):
        MMGPTCollator(processor, packing=True)


@pytest.mark.parametrize("mode", MODES)
def test_packed_mixed_and_alternating_batches_have_the_same_losses_and_gradients(processor, records, make_model, mode):
    """One mixed batch; the same packed; two passes, pictures then text: one normaliser, one result."""
    model = make_model(media_attention=mode)
    mixed = MMGPTCollator(processor)(records)
    packed = MMGPTCollator(processor, max_length=200, packing=True)(records)
    pictures = MMGPTCollator(processor)([one for one in records if one["images"]])
    texts = MMGPTCollator(processor)([one for one in records if not one["images"]])
    count = (mixed["labels"] != -100).sum()
    expected = losses(model, mixed)
    for batches in ([packed], [pictures, texts]):
        found = {tokens: loss for batch in batches for tokens, loss in losses(model, batch).items()}
        found, expected = without_first(found), without_first(expected)
        assert found.keys() == expected.keys()
        assert all(abs(found[tokens] - expected[tokens]) < 1e-5 * max(1, expected[tokens]) for tokens in expected)
    gradients = []
    for batches in ([mixed], [packed], [pictures, texts]):
        model.zero_grad()
        for batch in batches:
            model(**batch, num_items_in_batch=count).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            assert (other[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


def test_the_trainer_learns_the_same_from_packed_rows(processor, records, make_model, tmp_path):
    """Through TRL's own loss, with checkpointing: the same loss and the same weights after two steps."""
    weights, logged = [], []
    for packing in (False, True):
        model = make_model()
        loss = []

        class Log(TrainerCallback):
            def on_log(self, args, state, control, logs=None, loss=loss, **kwargs):
                loss.append(logs.get("loss"))

        arguments = SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=len(records),
            learning_rate=1e-3,
            optim="sgd",
            bf16=False,
            max_length=None,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        data = Dataset.from_dict({"number": range(len(records))}).with_transform(
            lambda batch: {key: [records[number][key] for number in batch["number"]] for key in ("messages", "images")}
        )
        collator = MMGPTCollator(processor, max_length=200, packing=packing)
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=collator,
            processing_class=processor,
            callbacks=[Log()],
        )
        trainer.train()
        logged.append(loss[:2])
        weights.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    assert logged[0] == pytest.approx(logged[1], abs=1e-5)
    start = dict(make_model().named_parameters())
    assert any((weights[0][name] - start[name]).abs().max() > 1e-4 for name in start)
    for name in start:
        assert (weights[0][name] - weights[1][name]).abs().max() < 1e-5, name


def test_conversations_that_leave_nothing_are_skipped_and_counted(processor, records, tmp_path):
    log = tmp_path / "skips" / "log.jsonl"
    collator = MMGPTCollator(processor, max_length=70, skip_log=str(log))
    batch = collator(records)
    kept = [one for one in records if len(MMGPTCollator(processor)([one])["input_ids"][0]) <= 70]
    assert 0 < len(kept) < len(records)
    assert torch.equal(batch["input_ids"], MMGPTCollator(processor)(kept)["input_ids"])
    collator(records)  # once more: the same rows
    assert count_skips(log) == {("collator", "Nothing is left to learn from"): len(records) - len(kept)}
    with pytest.raises(ValueError, match="any of the 1 conversations"):
        collator([one for one in records if one not in kept][:1])
