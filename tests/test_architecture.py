"""The rooms of the package, enforced: a module imports from its own room or those before it, never in a circle."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "loaders"

# Every room, bottom up: a module imports from its own room and from those before it. The longest matching name counts.
ROOMS = (
    "loaders.errors",
    "loaders.nested",
    "loaders.system",
    "loaders.timing",
    "loaders.randomness",
    "loaders.bridge",
    "loaders.memory",
    "loaders.images",
    "loaders.batch",
    "loaders.datasets.protocol",
    "loaders.datasets.wrapped",
    "loaders.datasets",
    "loaders.sampling",
    "loaders.workers",
    "loaders.report",
    "loaders.dataloader",
    "loaders.device",
    "loaders.outputs",
    "loaders.benchmark",
    "loaders.doctor",
    "loaders.cli",
    "loaders.__main__",
)
# Only these may import torch: the bridge, what makes tensors of rows, the DataLoader and what stands above it.
TORCH = (
    "loaders.memory.accelerator",
    "loaders.bridge",
    "loaders.batch.collate",
    "loaders.batch.assemble",
    "loaders.dataloader",
    "loaders.report.progress",
    "loaders.device",
    "loaders.outputs",
    "loaders.benchmark",
    "loaders.doctor",
)
# What a worker process imports, by itself or through others: no torch in any of it.
WORKER = "loaders.workers.process_main"
LONGEST = 400
# Cut, these would be half a noun each: the iterator, the class that people read first, the life of a block.
LONGER = {"loaders.dataloader.epoch": 550, "loaders.dataloader.loader": 440, "loaders.memory.slots": 430}

MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def is_under(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def room_of(module):
    found = [room for room in ROOMS if is_under(module, room)]
    return ROOMS.index(max(found, key=len)) if found else None


def imports_of(module, *, typing=False):
    """(imported module, whether it is imported when this module is) of every import; on demand those for types, too."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    found = []

    def visit(node, at_import):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not typing:
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
def test_a_module_imports_from_its_own_room_or_those_before_it(module):
    room = room_of(module)
    assert room is not None, f"{module} is in no room: give it one in ROOMS"
    for imported, _ in imports_of(module, typing=True):
        if is_under(imported, "loaders") and imported != "loaders":
            assert room_of(imported) <= room, f"{module} ({ROOMS[room]}) imports {imported}, which stands above it"


def test_no_module_imports_itself_through_others():
    # Every import counts: inside functions, and those that only type checkers see.
    arrows = {
        module: {
            name for name, _ in imports_of(module, typing=True) if name in MODULES and name not in ("loaders", module)
        }
        for module in MODULES
        if module != "loaders"
    }
    while leaves := [module for module, targets in arrows.items() if not targets & arrows.keys()]:
        for module in leaves:
            del arrows[module]
    while roots := arrows.keys() - {target for targets in arrows.values() for target in targets}:
        for module in roots:
            del arrows[module]
    # What is left is in a circle, or between two.
    knots = {module: sorted(targets & arrows.keys()) for module, targets in arrows.items()}
    assert not knots


def test_only_the_loaders_own_package_looks_inside_a_loader():
    for module, path in MODULES.items():
        if not is_under(module, "loaders.dataloader"):
            assert not re.search(r"\bloader\._", path.read_text(encoding="utf-8")), module


@pytest.mark.parametrize("module", MODULES)
def test_torch_is_imported_only_where_tensors_are_made(module):
    for imported, _ in imports_of(module):
        if imported.split(".")[0] == "torch":
            assert any(is_under(module, prefix) for prefix in TORCH), f"{module} imports {imported}"


@pytest.mark.parametrize("module", MODULES)
def test_albumentations_is_the_users(module):
    for imported, _ in imports_of(module):
        assert not imported.split(".")[0].startswith("albu"), f"{module} imports {imported}"


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
    assert {"loaders.workers.worker", "loaders.batch.rows", "loaders.batch.spec"} <= seen


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_one_noun_of_readable_length_and_says_what_it_is(module):
    source = MODULES[module].read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LONGER.get(module, LONGEST)
    assert ast.get_docstring(ast.parse(source)), f"{module} has no docstring"


def test_the_table_names_no_room_that_is_gone():
    assert not [room for room in ROOMS if not any(is_under(module, room) for module in MODULES)]


def test_the_map_in_the_documentation_has_every_room_in_this_order():
    rows = re.findall(
        r"^\| (`[a-z/]+`(?:, `[a-z/]+`)*)( ●)? \|", (ROOT.parent / "docs/design.md").read_text("utf-8"), re.M
    )
    drawn = [(f"loaders.{name}", bool(torch)) for names, torch in rows for name in re.findall(r"([a-z]+)/?`", names)]
    packages = [room for room in ROOMS if room.count(".") == 1 and not room.endswith("__")]
    assert [name for name, _ in drawn] == packages
    assert {name for name, torch in drawn if torch} - {"loaders.cli"} == {
        ".".join(name.split(".")[:2]) for name in TORCH
    }
