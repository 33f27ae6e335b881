"""The layers of the package, enforced: a module imports only from its own layer or those below it in number."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "loaders"

# The longest matching name counts.
LAYERS = {
    "loaders.errors": 0,
    "loaders.rng": 0,
    "loaders.tree": 0,
    "loaders.opencv": 0,
    "loaders.process_rng": 0,
    "loaders.workers": 0,
    "loaders.stages": 0,
    "loaders.timeline": 0,
    "loaders.cgroups": 0,
    "loaders.cores": 0,
    "loaders.accelerator": 1,
    "loaders.spec": 1,
    "loaders.bridge": 1,
    "loaders.decode": 2,
    "loaders.crops": 2,
    "loaders.patches": 2,
    "loaders.planes": 2,
    "loaders.augment": 2,
    "loaders.datasets": 2,
    "loaders.stateful": 2,
    "loaders.sampling": 2,
    "loaders.batching": 3,
    "loaders.batching.arena": 1,
    "loaders.engines": 4,
    "loaders.dispatch": 5,
    "loaders.plan": 5,
    "loaders.policy": 5,
    "loaders.failures": 5,
    "loaders.delivery": 5,
    "loaders.epoch": 5,
    "loaders.keys": 5,
    "loaders.state": 5,
    "loaders.dataloader": 5,
    "loaders.arguments": 5,
    "loaders.tuning": 5,
    "loaders.measures": 5,
    # What `DataLoader.report()` gives: numbers and text over the loader's own measures.
    "loaders.observe.report": 5,
    "loaders.observe.verdict": 5,
    "loaders.observe.page": 5,
    "loaders.observe.units": 5,
    "loaders.device": 6,
    "loaders.benchmark": 7,
    "loaders.doctor": 7,
    "loaders.demo": 7,
    "loaders.prepare": 7,
    "loaders.cli": 7,
    "loaders.observe": 7,
    "loaders.integrations": 7,
    "loaders.__main__": 7,
}
# Only these may import torch; nothing below layer 5 but the bridge and what makes tensors of rows.
TORCH = (
    "loaders.accelerator",
    "loaders.bridge",
    "loaders.batching.collate",
    "loaders.batching.assemble",
    "loaders.plan",
    "loaders.policy",
    "loaders.delivery",
    "loaders.epoch",
    "loaders.keys",
    "loaders.state",
    "loaders.dataloader",
    "loaders.arguments",
    "loaders.device",
    "loaders.benchmark",
    "loaders.doctor",
    "loaders.demo",
    "loaders.observe",
    "loaders.integrations",
)
# What a worker process imports, by itself or through others: no torch in any of it.
WORKER = "loaders.engines.process_worker"
ALBUMENTATIONS = ("loaders.demo",)
LONGEST = 400

MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def is_under(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def layer_of(module):
    found = [prefix for prefix in LAYERS if is_under(module, prefix)]
    return LAYERS[max(found, key=len)] if found else None


def imports_of(module):
    """(imported module, whether it is imported when this module is) of every import that really runs."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    found = []

    def visit(node, at_import):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for below in node.orelse:
                visit(below, at_import)
        elif isinstance(node, ast.Import):
            found.extend((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append((inner if inner in MODULES else node.module, at_import))
        else:
            inside = at_import and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for below in ast.iter_child_nodes(node):
                visit(below, inside)

    visit(tree, True)
    return found


@pytest.mark.parametrize("module", [module for module in MODULES if module != "loaders"])
def test_a_module_imports_from_its_own_layer_or_those_before_it(module):
    layer = layer_of(module)
    assert layer is not None, f"{module} has no layer: give it one in LAYERS"
    for imported, _ in imports_of(module):
        if is_under(imported, "loaders") and imported != "loaders":
            assert layer_of(imported) <= layer, (
                f"{module} (layer {layer}) imports {imported} (layer {layer_of(imported)})"
            )


@pytest.mark.parametrize("module", MODULES)
def test_torch_is_imported_only_where_tensors_are_made(module):
    for imported, _ in imports_of(module):
        if imported.split(".")[0] == "torch":
            assert any(is_under(module, prefix) for prefix in TORCH), f"{module} imports {imported}"


@pytest.mark.parametrize("module", MODULES)
def test_albumentations_is_the_users(module):
    for imported, _ in imports_of(module):
        if imported.split(".")[0].startswith("albu"):
            assert any(is_under(module, prefix) for prefix in ALBUMENTATIONS), f"{module} imports {imported}"


def test_what_a_worker_process_imports_leads_to_no_torch():
    seen, ahead = set(), [WORKER]
    while ahead:
        module = ahead.pop()
        if module in seen:
            continue
        seen.add(module)
        for imported, at_import in imports_of(module):
            assert not (at_import and imported.split(".")[0] in ("torch", "albumentations", "cv2")), (
                f"{module}: {imported}"
            )
            if at_import and imported in MODULES:
                ahead += [imported, *(name for name in MODULES if is_under(imported, name) and name != "loaders")]
    assert {"loaders.engines.work", "loaders.batching.rows", "loaders.spec"} <= seen


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_one_noun_of_readable_length_and_says_what_it_is(module):
    source = MODULES[module].read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LONGEST
    assert ast.get_docstring(ast.parse(source)), f"{module} has no docstring"


def test_the_table_names_no_layer_that_is_gone():
    planned = {"loaders.sampling", "loaders.observe", "loaders.integrations"}
    gone = [prefix for prefix in LAYERS if not any(is_under(module, prefix) for module in MODULES)]
    assert set(gone) <= planned
