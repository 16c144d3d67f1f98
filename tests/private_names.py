"""Which names of our dependencies are private, and what is left of our packages where one of them is hidden.

Private is a name with a leading underscore that we did not define or that transformers calls (`HOOKS`), and one that
is imported from below the top level of a dependency, unless a model file of transformers imports it as well or the
dependency documents it there (`DOCUMENTED`).
"""

import ast
import functools
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).parents[1]
SOURCES = ("modeling_mmgpt", "processing_mmgpt", "examples", "push_to_hub.py")
DEPENDENCIES = ("transformers", "trl", "peft", "accelerate", "huggingface_hub", "torch", "open_clip", "datasets")
# Modules below the top level whose names are documented as they stand, or that have nowhere else to come from.
DOCUMENTED = {
    "accelerate.utils",
    "huggingface_hub.errors",
    "peft.functional",
    "peft.tuners.tuners_utils",
    "peft.utils",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn",
    "torch.nn.functional",
    "torch.nn.utils.rnn",
    "torch.utils.data",
}


@functools.cache
def imported_by_model_files() -> frozenset[str]:
    """The names that transformers' own model files import from the rest of transformers."""
    models = Path(importlib.util.find_spec("transformers").origin).parent / "models"
    names = set()
    for path in models.glob("*/[mpic]*.py"):  # modeling, processing, image_processing, configuration
        for block in re.findall(r"^from \.\.\.[\w.]* import (?:\(([^)]*)\)|(.+))$", path.read_text(), re.MULTILINE):
            names.update(re.findall(r"\w+", block[0] or block[1]))
    return frozenset(names)


def is_private(module: str, name: str) -> bool:
    """Whether `from module import name` takes a private name."""
    package = module.split(".")[0]
    if package not in DEPENDENCIES:
        return False
    if name.startswith("_") or any(part.startswith("_") for part in module.split(".")):
        return True
    if module == package or module in DOCUMENTED:
        return False
    return not (package == "transformers" and name in imported_by_model_files())


def private_names(sources: tuple[str, ...] = SOURCES) -> dict[str, set[str]]:
    """The private names that our files use, and the files."""
    trees = {path: ast.parse(path.read_text()) for path in _files(sources)}
    ours = {name for tree in trees.values() for name in _defined(tree)}
    found: dict[str, set[str]] = {}
    for path, tree in trees.items():
        for name in _used(tree):
            if name not in ours or name in HOOKS:
                found.setdefault(name, set()).add(path.relative_to(ROOT).as_posix())
    return found


# What transformers calls or reads on our classes by a private name: defined by us, and private all the same.
HOOKS = frozenset(
    """_init_weights _no_split_modules _skip_keys_device_placement _supports_sdpa _supports_attention_backend
    _can_compile_fullgraph _tied_weights_keys _build_generation_config""".split()
)


def _files(sources: tuple[str, ...]) -> Iterator[Path]:
    for source in sources:
        yield from sorted((ROOT / source).rglob("*.py")) if (ROOT / source).is_dir() else [ROOT / source]


def _defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _used(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (alias.name for alias in node.names if is_private(node.module, alias.name))
        elif isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
            yield node.attr
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name in HOOKS:
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in HOOKS:
            yield node.id
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("getattr", "hasattr"):
            name = getattr(node.args[1], "value", None)
            if isinstance(name, str) and re.match(r"_[a-z]", name):
                yield name


class Hider(ast.NodeTransformer):
    """Rewrites a file as if some names did not exist: imports and reads fail, overrides and writes are left out."""

    def __init__(self, names: frozenset[str]):
        self.names = names

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        hidden = [alias.name for alias in node.names if node.level == 0 and alias.name in self.names]
        return _raise("ImportError", hidden[0]) if hidden else node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.body = [part for part in node.body if not self._is_hidden(part)] or [ast.Pass()]
        return self.generic_visit(node)

    def _is_hidden(self, part: ast.AST) -> bool:
        targets = [getattr(target, "id", None) for target in getattr(part, "targets", [])]
        return getattr(part, "name", None) in self.names or bool(self.names.intersection(targets))

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr in self.names:
            if isinstance(node.ctx, ast.Load):
                return _raise("AttributeError", node.attr).value
            node.attr = f"hidden{node.attr}"
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if getattr(node.func, "id", None) in ("getattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and name.value in self.names:
                name.value = f"hidden{name.value}"
        return node


def _raise(error: str, name: str) -> ast.Expr:
    return ast.parse(f"(_ for _ in ()).throw({error}({f'{name} is hidden'!r}))").body[0]


def hide(names: frozenset[str]) -> None:
    """Hide names from our files, and from copies of them in remote code, in all that is imported from now on."""
    ours = tuple(str(ROOT / source) for source in SOURCES)
    get_code = importlib.machinery.SourceFileLoader.get_code

    def get_hidden_code(self, fullname):
        path = self.get_filename(fullname)
        if not path.startswith(ours) and "transformers_modules" not in path:
            return get_code(self, fullname)
        tree = Hider(names).visit(ast.parse(self.get_data(path)))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    importlib.machinery.SourceFileLoader.get_code = get_hidden_code


def main() -> None:
    """Print the ids that folders generate, loaded with names hidden: by the packages, or without them if remote."""
    names, how, picture, *folders = sys.argv[1:]
    hide(frozenset(filter(None, names.split(","))))
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if how == "packages":
        sys.path.insert(0, str(ROOT))
        import processing_mmgpt  # noqa: F401

    options = {"trust_remote_code": how == "remote"}
    content = [{"type": "image", "path": picture}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": content}]
    for folder in folders:
        processor = AutoProcessor.from_pretrained(folder, **options)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **options)
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
        print("IDS", model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist())


if __name__ == "__main__":
    main()
