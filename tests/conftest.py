"""A tiny model, its processor and pictures; everything random is seeded."""

import copy
import json
import os
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, PreTrainedTokenizerFast

from modeling_mmgpt import MMGPTConfig, MMGPTForConditionalGeneration
from modeling_mmgpt.adapters_mmgpt import lora_config
from processing_mmgpt import MMGPTImageProcessor, MMGPTProcessor


BASE = Path(__file__).parents[1] / "examples" / "tiny_world" / "base"
FOREIGN = "--host-resolver-rules=MAP *.example 127.0.0.1"  # names of strangers lead here, as they may choose
SIDE = 24  # of a picture, in pixels
END_OF_CHUNK, IMAGE, PAD, VOCABULARY = 258, 259, 260, 261  # <s> is 256, </s> 257, below them the bytes
VISION = {"width": 16, "layers": 2, "head_width": 8, "patch_size": 8, "image_size": SIDE, "quick_gelu": True}
SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
MIN = {"n_embd": 32, "n_layer": 4, "n_head": 4}

GROUPED = {**SMALL, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 8}
EXPERTS = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}

# Sizes of a tiny LM of each family that is supported, over the defaults of transformers. Windows are shorter than the
# rows of the tests.
FAMILIES = {
    "llama": GROUPED,
    "mistral": {**GEMMA, "sliding_window": 8},
    "mixtral": EXPERTS,
    "qwen2": GROUPED,
    "qwen3": GEMMA,
    "qwen3_moe": {**EXPERTS, "head_dim": 8, "moe_intermediate_size": 24},
    "gemma": GEMMA,
    "gemma2": {**GEMMA, "sliding_window": 8},
    "gemma3_text": {**GEMMA, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi": SMALL,
    "phi3": GROUPED,
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "olmo3": {**GROUPED, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "stablelm": GROUPED,
    "smollm3": GROUPED,
    "granite": GROUPED,
    "cohere": GROUPED,
    "starcoder2": {**GROUPED, "sliding_window": 8},
    "persimmon": SMALL,
    "glm4": GEMMA,
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
    },
    "gpt_neox": SMALL,
    "gpt2": MIN,
    "gpt_bigcode": MIN,
    "gptj": {**MIN, "rotary_dim": 4},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 8,
    },
    "codegen": {**MIN, "rotary_dim": 4},
    "mpt": {"d_model": 32, "n_layers": 4, "n_heads": 4},
    "bloom": {"hidden_size": 32, "n_layer": 4, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4},
}


def pytest_configure(config):
    """Make deprecated calls errors where they are ours to change: in packages, remote code, examples."""
    examples = "|".join(file.stem for file in BASE.parents[1].glob("[a-z]*.py"))
    for warning in ("DeprecationWarning", "FutureWarning"):
        config.addinivalue_line(
            "filterwarnings", rf"error::{warning}:(.*_mmgpt|push_to_hub|examples|tiny_world|{examples})\b"
        )
    # Examples that a test starts as programs.
    os.environ["PYTHONWARNINGS"] = "error::DeprecationWarning:__main__,error::FutureWarning:__main__"


def note_results(name, figures):
    """Keep the last figures of a bar in `results/<name>.json`, with what `test_<name>.py` measured them with."""
    from tiny_world.evaluation import measured_with  # imports scipy, which the other tests do without

    path = Path(__file__).with_name("results") / f"{name}.json"
    noted = json.loads(path.read_text()) if path.exists() else {}
    noted |= measured_with(f"pytest -m bars tests/test_{name}.py")
    noted["figures"] = noted.get("figures", {}) | figures
    path.write_text(json.dumps(noted, indent=1, sort_keys=True) + "\n")


def highest_by_chance(share, n, rows):
    """Upper Wilson bound of a share seen in `n` trials, at 95 % over `rows` rows together (Bonferroni)."""
    from scipy.stats import binomtest  # which the other tests do without

    return float(binomtest(round(share * n), n).proportion_ci(1 - 2 * (1 - 0.95) / rows, method="wilson").high)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def _weights(module, seed):
    """Random weights far larger than a fresh model's, so that what is fed in shows in what comes out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1 or name.endswith("class_embedding"):
                parameter.normal_(std=1.6 * parameter[0].numel() ** -0.5, generator=generator)
            elif parameter.dim() == 1 and parameter.numel() > 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return module


def _build(family="llama", gates=0.7, seed=0, text=None, vision=None, dtype=torch.float32, attention=None, **config):
    text_config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        **{**FAMILIES[family], "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": PAD, **(text or {})},
    )
    config = MMGPTConfig(
        **{
            "vision_config": {**VISION, **(vision or {})},
            "text_config": text_config,
            "resampler": {"depth": 2, "num_heads": 2, "head_dim": 8, "num_latents": 4},
            "cross_attention": {"num_heads": 2, "head_dim": 8},
            "cross_attn_every_n_layers": 2,
            "image_token_id": IMAGE,
            "end_of_chunk_token_id": END_OF_CHUNK,
            **config,
        }
    )
    torch.manual_seed(seed)
    config._attn_implementation = attention
    model = _weights(MMGPTForConditionalGeneration(config), seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("attn_gate", "ff_gate")):
                parameter.fill_(gates)
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def make_model():
    """Build a tiny model: `make_model(family, gates=0.7, seed=0, **fields of the config)`."""
    return _build


@pytest.fixture(scope="session")
def make_lm():
    """Take the bare LM out of a model: the same weights, no gated block."""

    def bare(model):
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.text_config))
        weights = model.model.text_model.state_dict()
        weights = {key.replace("decoder_layer.", ""): value for key, value in weights.items() if "gated" not in key}
        lm.load_state_dict(weights)
        return lm.to(model.dtype).eval()

    return bare


@pytest.fixture(scope="module")
def model():
    return _build()


@pytest.fixture(scope="module")
def shut():
    return _build(gates=0.0)


def _tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate([*alphabet, "<s>", "</s>"])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def base_tokenizer():
    """A tokenizer with a token for each byte, `<s>` and `</s>`, before anything of ours is added."""
    return _tokenizer()


@pytest.fixture(scope="session")
def processor():
    tokenizer = _tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endofchunk|>", "<image>"]})
    tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    assert tokenizer.convert_tokens_to_ids(["<|endofchunk|>", "<image>", "<PAD>"]) == [END_OF_CHUNK, IMAGE, PAD]
    return MMGPTProcessor(MMGPTImageProcessor(size=SIDE), tokenizer)


@pytest.fixture(scope="session")
def picture():
    """Make the picture of a seed."""

    def make(seed, width=SIDE, height=SIDE, mode="RGB"):
        noise = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
        return Image.fromarray(noise, "RGBA").convert(mode)

    return make


@pytest.fixture(scope="session")
def pixels():
    """Make `pixel_values`, the same for the same seed."""

    def make(*shape, seed=0):
        return torch.randn(*shape, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def ids():
    """Make rows of ids from drawings, `#` an image, `_` padding, and their attention mask."""

    def make(*rows):
        table = {"#": IMAGE, "_": PAD}
        tokens = torch.tensor([[table.get(c, ord(c)) for c in row] for row in rows])
        return {"input_ids": tokens, "attention_mask": (tokens != PAD).long()}

    return make


@pytest.fixture(scope="session")
def draw(processor):
    """Draw a row of ids: `^` and `$` for BOS and EOS, `@`, `%`, `_` for image, end of chunk, padding; learnt in «»."""

    def make(input_ids, learnt=None):
        symbols = {256: "^", 257: "$", END_OF_CHUNK: "%", IMAGE: "@", PAD: "_"}
        drawn, inside = "", False
        for number, token in enumerate(input_ids):
            if learnt is not None and bool(learnt[number]) != inside:
                inside = not inside
                drawn += "«" if inside else "»"
            token = int(token)
            drawn += symbols[token] if token in symbols else processor.tokenizer.decode([token])
        return drawn + ("»" if inside else "")

    return make


def _random_adapter(base, folder, seed=0):
    model = MMGPTForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    tuned = peft.get_peft_model(model, lora_config(model, r=4))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.06)
    tuned.save_pretrained(folder)
    AutoProcessor.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_adapter():
    """Save an adapter that changes what its base says, with its processor: `make_adapter(base, folder, seed=0)`."""
    return _random_adapter


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    """The folder of an adapter of the shipped base."""
    return _random_adapter(BASE, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="session")
def scene(tmp_path_factory):
    """The file of a picture of the size that the shipped base sees."""
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.linear_gradient("L").resize((48, 48)).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def browser():
    """Chromium, of Playwright or of the system."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="NO BROWSER TEST: it needs `pip install playwright`")
    with sync_api.sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        found = own if own.exists() else shutil.which("chromium") or shutil.which("google-chrome")
        if not found:
            pytest.skip("NO BROWSER: `playwright install chromium` or `apt-get install chromium`")
        with playwright.chromium.launch(executable_path=found, args=["--no-sandbox", FOREIGN]) as browser:
            yield browser


@pytest.fixture
def foreign_page(browser):
    """A page of another origin, http://foreign.example, in the browser."""
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"http://foreign.example:{server.server_port}/README.md")
        yield page
        context.close()
        server.shutdown()
