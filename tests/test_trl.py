"""TRL by itself: its trainers, its collator and its loader, without ours."""

import pytest
import torch
from conftest import BASE
from datasets import Dataset, Image, List
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.chat_template_utils import is_chat_template_stop_token_trained
from trl.trainer.utils import create_model_from_path

from modeling_mmgpt import MMGPTForConditionalGeneration
from processing_mmgpt import MMGPTCollator


PICTURE = str(BASE.parents[1] / "records" / "colour.png")
ASK = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]}
ROW = {"messages": [ASK, {"role": "assistant", "content": [{"type": "text", "text": "yellow"}]}], "images": [PICTURE]}
OPTIONS = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 2}


def pictured(rows):
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def trainer(tmp_path, model, rows, **options):
    return SFTTrainer(
        model=model,
        args=SFTConfig(str(tmp_path), **{**OPTIONS, "max_length": None, **options}),
        train_dataset=rows,
        processing_class=AutoProcessor.from_pretrained(BASE),
    )


@pytest.mark.parametrize("assistant_only_loss", [False, True])
def test_messages_and_images_train_with_the_collator_of_trl(tmp_path, assistant_only_loss):
    model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    training = trainer(tmp_path, model, pictured([ROW] * 4), assistant_only_loss=assistant_only_loss)
    batch = next(iter(training.get_train_dataloader()))
    ours = MMGPTCollator(AutoProcessor.from_pretrained(BASE))([ROW, ROW])
    assert torch.equal(batch["input_ids"], ours["input_ids"])
    assert torch.equal(batch["pixel_values"], ours["pixel_values"])
    assert torch.equal(batch["labels"], ours["labels"] if assistant_only_loss else ours["input_ids"])
    training.train()
    assert any(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize("max_length", [None, 64])
def test_rows_with_and_without_pictures_train(tmp_path, max_length):
    said = [("user", "Add 1 and 2."), ("assistant", "3")]
    plain = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
    model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32)
    trainer(tmp_path, model, pictured([ROW, {"messages": plain, "images": []}]), max_length=max_length).train()


def test_a_folder_is_loaded_by_trl(tmp_path):
    assert type(create_model_from_path(str(BASE))) is MMGPTForConditionalGeneration
    training = trainer(tmp_path, str(BASE), pictured([ROW] * 2))
    assert type(training.model) is MMGPTForConditionalGeneration


def test_a_saved_config_is_loaded_by_trl_too(tmp_path):
    create_model_from_path(str(BASE)).save_pretrained(tmp_path)
    assert "auto_map" not in (tmp_path / "config.json").read_text()
    assert type(create_model_from_path(str(tmp_path))) is MMGPTForConditionalGeneration


def test_preferences_are_learnt_without_a_reference_model_being_given(tmp_path):
    rows = [{"prompt": [ASK], "chosen": ROW["messages"][1:], "rejected": ROW["messages"][1:], "images": [PICTURE]}] * 2
    training = DPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32),
        args=DPOConfig(str(tmp_path), **OPTIONS, max_length=None),
        train_dataset=pictured(rows),
        processing_class=AutoProcessor.from_pretrained(BASE),
    )
    assert type(training.ref_model) is MMGPTForConditionalGeneration
    training.train()


def test_text_alone_trains_with_the_tokenizer(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "3"}]}] * 2
    processor = AutoProcessor.from_pretrained(BASE)
    training = SFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32),
        args=SFTConfig(str(tmp_path), **OPTIONS),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor.tokenizer,
    )
    ids = next(iter(training.get_train_dataloader()))["input_ids"][0]
    assert ids.tolist() == MMGPTCollator(processor)(rows[:1])["input_ids"][0].tolist()


def test_trl_finds_the_learnt_end_in_lists():
    """With tensors, the default, it warns: it looks for a token among tensors."""
    processor = AutoProcessor.from_pretrained(BASE)
    assert not is_chat_template_stop_token_trained(processor)

    class Lists(type(processor)):
        def apply_chat_template(self, *args, **kwargs):
            return super().apply_chat_template(*args, return_tensors=None, **kwargs)

    assert is_chat_template_stop_token_trained(Lists(processor.image_processor, processor.tokenizer))
