"""Ask one question through every door of transformers and PEFT; run by test_doors.py in a process of its own.

    python tests/doors.py REPO with|without PICTURE DOOR [DOOR ...]

Prints one line of JSON: what came out of each door, ids or text. `without`: our packages cannot be imported, and the
code comes from the repository.
"""

import json
import sys
import tempfile
import threading


repo, packages, picture, *doors = sys.argv[1:]
if packages == "without":
    for name in ("modeling_mmgpt", "processing_mmgpt"):
        sys.modules[name] = None  # importing it raises
else:
    import processing_mmgpt  # noqa: F401 - for the Auto classes, of the model as well

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    TextIteratorStreamer,
    pipeline,
)


TRUST = {"trust_remote_code": True} if packages == "without" else {}
FULL = {"dtype": torch.float32, **TRUST}
LENGTH = {"max_new_tokens": 8, "do_sample": False}
QUESTION = [{"type": "image", "path": picture}, {"type": "text", "text": "What colour is it?"}]
MESSAGES = [{"role": "user", "content": QUESTION}]


def ask(model) -> list[int]:
    """The ids that a model writes, asked by the repository's own processor."""
    processor = AutoProcessor.from_pretrained(repo, **TRUST)
    inputs = processor.apply_chat_template(MESSAGES, tokenize=True, return_dict=True, add_generation_prompt=True)
    return model.eval().generate(**inputs.to(model.device), **LENGTH)[0, inputs["input_ids"].shape[1] :].tolist()


def load(auto=AutoModelForImageTextToText, name=repo, **options):
    """Load by an Auto class."""
    return auto.from_pretrained(name, **FULL, **options)


def auto_model():
    return ask(load(AutoModel))


def auto_model_for_image_text_to_text():
    return ask(load())


def pinned_revision():
    return ask(load(revision="first"))


def peft_model():
    return ask(PeftModel.from_pretrained(load(name="someone/base"), repo))


def pipeline_by_name():
    pipe = pipeline("image-text-to-text", repo, **FULL)
    return pipe(text=MESSAGES, return_full_text=False, generate_kwargs=LENGTH)[0]["generated_text"]


def pipeline_of_parts():
    processor = AutoProcessor.from_pretrained(repo, **TRUST)
    pipe = pipeline("image-text-to-text", model=load(), processor=processor)
    return pipe(text=MESSAGES, return_full_text=False, generate_kwargs=LENGTH)[0]["generated_text"]


def text_iterator_streamer():
    model, processor = load(), AutoProcessor.from_pretrained(repo, **TRUST)
    inputs = processor.apply_chat_template(MESSAGES, tokenize=True, return_dict=True, add_generation_prompt=True)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **LENGTH, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    return text


def device_map_auto():
    return ask(load(device_map="auto"))


def disk_offload():
    places = {"model.vision_tower": "cpu", "model.resampler": "disk", "model.text_model": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        model = load(device_map=places, offload_folder=folder)
        assert any(parameter.is_meta for parameter in model.parameters())
        return ask(model)


def four_bits():
    """The LM and the blocks in four bits; what sees, and the head, as they are."""
    as_they_are = ["model.vision_tower", "model.resampler", "lm_head"]
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=as_they_are)
    model = load(quantization_config=config)
    quantised = [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    assert quantised and all("text_model" in name and "lm_head" not in name for name in quantised)
    return ask(model)


print("ANSWERS", json.dumps({door: globals()[door]() for door in doors}))
