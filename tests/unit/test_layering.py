"""The layers hold: which module may import which, read from the source by `ast`, so nothing is imported here."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
OWN = ("calibration", "ptq")

COMMAND = ("ptq.console", "ptq.flags", "ptq.lazy")  # what every command line is made of
# What a module, or any module of a package, may import of our own besides its siblings. Top to bottom: nothing may
# import what stands above it. A module that is missing here fails the test: say where it belongs.
LAYERS = {
    "ptq.quantize": ("ptq.pipeline", *COMMAND, "ptq.ggml", "ptq.mixture.recipes", "ptq.spec", "calibration"),
    "ptq.evaluate": ("ptq.measure", "ptq.defaults", *COMMAND, "ptq.evaluation", "calibration"),
    "ptq.baselines.__main__": (
        "ptq.baselines", *COMMAND, "ptq.defaults", "ptq.demo", "ptq.evaluation", "ptq.spec", "ptq.workdir",
        "calibration",
    ),
    "ptq.benchmark.__main__": ("ptq.benchmark", "ptq.checkpoint", *COMMAND, "ptq.spec", "calibration"),
    "ptq.report.__main__": ("ptq.continuation", "ptq.load", "ptq.report", *COMMAND, "calibration"),
    "ptq.export.__main__": ("ptq.convert", *COMMAND),
    "ptq.generate": ("ptq.continuation", "ptq.load", *COMMAND, "calibration"),
    "ptq": ("ptq.pipeline", "ptq.lazy", "ptq.spec"),
    "ptq.baselines": (
        "ptq.defaults", "ptq.document", "ptq.measure", "ptq.outcome", "ptq.pipeline", "ptq.evaluation", "ptq.ggml",
        "ptq.spec", "ptq.workdir", "calibration",
    ),
    "ptq.benchmark": (
        "ptq.checkpoint", "ptq.export.shards", "ptq.families", "ptq.grids", "ptq.outcome", "ptq.spec", "ptq.streamed",
        "calibration",
    ),
    "ptq.measure": ("ptq.load", "ptq.defaults", "ptq.evaluation", "ptq.reload", "ptq.streamed", "calibration"),
    "ptq.pipeline": (
        "ptq.job", "ptq.memory", "ptq.outcome", "ptq.spec", "ptq.tuning", "ptq.workdir", "calibration",
    ),
    "ptq.outcome": (
        "ptq.continuation", "ptq.evaluation", "ptq.job", "ptq.load", "ptq.memory", "ptq.report", "ptq.workdir",
    ),
    "ptq.job": (
        "ptq.budget", "ptq.checkpoint", "ptq.clock", "ptq.defaults", "ptq.demo", "ptq.formats", "ptq.memory",
        "ptq.own_text", "ptq.reload", "ptq.report", "ptq.spec", "ptq.streamed", "ptq.streams", "ptq.tuning.fisher",
        "ptq.walk", "ptq.workdir", "calibration",
    ),
    "ptq.own_text": ("ptq.clock", "ptq.memory", "ptq.streamed", "ptq.workdir", "calibration"),
    "ptq.continuation": ("ptq.load", "ptq.defaults", "calibration"),
    "ptq.load": ("ptq.defaults", "ptq.reload", "ptq.streamed", "calibration"),
    "ptq.budget": (
        "ptq.evaluation.stream", "ptq.quantizers", "ptq.streamed", "ptq.streams", "ptq.tuning", "calibration",
    ),
    "ptq.tuning": (
        "ptq.clock", "ptq.evaluation.stream", "ptq.memory", "ptq.qtensor", "ptq.quantizers", "ptq.streamed",
        "ptq.workdir", "calibration",
    ),
    "ptq.convert": (
        "ptq.export", "ptq.formats", "ptq.ggml", "ptq.gguf", "ptq.qtensor", "ptq.reload", "calibration",
    ),
    "ptq.formats": (
        "ptq.checkpoint", "ptq.export", "ptq.ggml", "ptq.gguf", "ptq.grids", "ptq.mixture", "ptq.qtensor",
        "ptq.quantizers", "ptq.reload", "calibration",
    ),
    "ptq.mixture": (
        "ptq.evaluation.stream", "ptq.export", "ptq.grids", "ptq.quantizers", "ptq.streamed", "calibration",
    ),
    "ptq.report": ("ptq.evaluation.published", "ptq.document", "ptq.console", "ptq.spec"),
    "ptq.evaluation": ("ptq.memory", "ptq.streamed", "calibration"),
    "ptq.walk": (
        "ptq.blockwise", "ptq.clock", "ptq.grids", "ptq.memory", "ptq.qtensor", "ptq.quantizers", "ptq.stages",
        "ptq.streamed", "ptq.streams", "ptq.workdir", "calibration",
    ),
    "ptq.streams": ("ptq.memory", "ptq.streamed", "calibration"),
    "ptq.stages": ("ptq.clock", "ptq.quantizers", "ptq.streamed", "calibration"),
    "ptq.blockwise": ("ptq.export.shards", "ptq.memory", "ptq.quantizers", "calibration"),
    "ptq.reload": ("ptq.checkpoint", "ptq.export", "ptq.families", "ptq.gguf", "ptq.qtensor", "calibration"),
    "ptq.streamed": ("ptq.families", "calibration"),
    "ptq.workdir": ("ptq.export.shards", "calibration"),
    "ptq.checkpoint": ("ptq.export.shards", "calibration"),
    "ptq.gguf": ("ptq.export.gguf", "ptq.families", "calibration"),
    "ptq.export": ("ptq.families", "ptq.grids", "ptq.qtensor", "calibration"),
    "ptq.quantizers": ("ptq.clock", "ptq.grids", "ptq.memory", "ptq.qtensor", "calibration"),
    "ptq.qtensor": ("ptq.grids",),
    "ptq.grids": ("calibration.threads",),
    "ptq.families": ("calibration.errors",),
    "ptq.spec": ("calibration.errors",),
    "ptq.defaults": ("calibration.errors", "calibration.processor"),
    "ptq.clock": (),
    "ptq.memory": (),
    "ptq.demo": ("calibration",),
    "ptq.document": (),
    "ptq.console": ("ptq.lazy", "calibration"),
    "ptq.flags": (),
    "ptq.ggml": ("calibration.errors",),
    "ptq.lazy": (),
    "calibration": (),
}  # fmt: skip
COMMANDS = (
    "ptq.quantize", "ptq.evaluate", "ptq.generate", "ptq.baselines.__main__", "ptq.report.__main__",
    "ptq.export.__main__", "ptq.benchmark.__main__",
)  # fmt: skip
HEAVY = ("torch", "transformers", "numpy", "datasets", "safetensors", "accelerate")
PICKLES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")


def sources() -> dict[str, ast.Module]:
    """Every module of the two packages by dotted name."""
    found = {}
    for path in sorted(file for package in OWN for file in (REPOSITORY / package).rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(), str(path))
    return found


MODULES = sources()


def imports(tree: ast.AST, modules=MODULES) -> set[str]:
    """Dotted names of what a tree imports, now or as a Lazy; a module, where `from package import module` names one."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in modules else node.module for name in full}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Lazy":
            names |= {argument.value for argument in node.args}
    return names


def inside(name: str, packages) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def layer_of(module: str) -> str:
    """The most precise entry of LAYERS; the package ptq itself stands for its __init__ alone."""
    entries = [layer for layer in LAYERS if inside(module, [layer]) and (layer != "ptq" or module == "ptq")]
    assert entries, f"{module} has no place in LAYERS"
    return max(entries, key=len)


def own_imports(tree: ast.AST) -> set[str]:
    return {name for name in imports(tree) if inside(name, OWN)}


def upward_imports(module: str, tree: ast.AST) -> set[str]:
    """Own imports that the module's layer does not list."""
    layer = layer_of(module)
    siblings = [layer] if layer != "ptq" else []
    return {name for name in own_imports(tree) if not inside(name, [*LAYERS[layer], *siblings])}


def late_imports(tree: ast.AST) -> set[str]:
    """Own modules that are imported inside functions or classes."""
    scopes = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    return {name for scope in ast.walk(tree) if isinstance(scope, scopes) for name in own_imports(scope)}


def bare_excepts(tree: ast.AST) -> list[int]:
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type is None]


def import_order(modules: dict[str, ast.Module]) -> list[str]:
    """Modules with every import before its importer; raises CycleError where that cannot be."""
    graph = {name: {n for n in imports(tree, modules) if n in modules and n != name} for name, tree in modules.items()}
    return list(TopologicalSorter(graph).static_order())


def test_a_module_imports_only_what_its_layer_may():
    assert not {module: found for module, tree in MODULES.items() if (found := upward_imports(module, tree))}


def test_own_imports_stand_at_the_top():
    assert not {module: found for module, tree in MODULES.items() if (found := late_imports(tree))}


def test_only_command_lines_wait_with_imports():
    users = {module for module, tree in MODULES.items() if "ptq.lazy" in imports(tree)}
    assert users == {*COMMANDS, "ptq", "ptq.console"}


def test_nobody_imports_a_command_line():
    assert not {module for module, tree in MODULES.items() if any(inside(name, COMMANDS) for name in imports(tree))}


def test_no_pickle():
    assert not {module for module, tree in MODULES.items() if any(inside(name, PICKLES) for name in imports(tree))}


def test_no_bare_except():
    assert not {module: found for module, tree in MODULES.items() if (found := bare_excepts(tree))}


def test_families_are_data():
    families = {module: imports(tree) for module, tree in MODULES.items() if inside(module, ["ptq.families"])}
    assert len(families) > 2 and not {name for found in families.values() for name in found if inside(name, HEAVY)}


def test_there_is_no_cycle():
    assert set(import_order(MODULES)) == set(MODULES)


def test_layers_has_no_dead_entry():
    assert set(LAYERS) == {layer_of(module) for module in MODULES}


def test_layers_lists_nothing_upward():
    places = list(LAYERS)
    for layer, allowed in LAYERS.items():
        assert all(places.index(layer_of(name)) > places.index(layer) for name in allowed), layer


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("calibration.tokens", "from ptq.spec import QuantSpec"),
        ("calibration", "import ptq"),
        ("ptq.grids.affine", "from ptq.quantizers.rtn import rtn"),
        ("ptq.quantizers.gptq", "from ptq.export import packing"),
        ("ptq.quantizers.gptq", "from ptq.families import FAMILIES"),
        ("ptq.quantizers.gptq", "from ptq import walk"),
        ("ptq.export.gptq", "import ptq.quantizers.gptq"),
        ("ptq.export.gptq", "from ptq.walk import Walk"),
        ("ptq.families.llama", "from ptq.streamed import StreamedModel"),
        ("ptq.workdir", "from ptq.export.gptq import write_gptq"),
        ("ptq.pipeline", "from ptq.quantize import main"),
        ("ptq.pipeline", "from ptq import QuantSpec"),
    ],
)
def test_an_upward_import_is_seen(module, source):
    assert upward_imports(module, ast.parse(source))


def test_the_other_faults_are_seen():
    assert late_imports(ast.parse("def f():\n    if True:\n        from ptq.spec import QuantSpec")) == {"ptq.spec"}
    assert late_imports(ast.parse("class C:\n    import calibration.store")) == {"calibration.store"}
    assert bare_excepts(ast.parse("try:\n    pass\nexcept:\n    pass")) == [3]
    assert imports(ast.parse('pipeline = Lazy("ptq.pipeline", freeze=False)')) == {"ptq.pipeline"}
    assert inside("pickle", PICKLES) and imports(ast.parse("from pickle import load")) == {"pickle"}
    with pytest.raises(CycleError):
        import_order({"ptq.a": ast.parse("import ptq.b"), "ptq.b": ast.parse("from ptq import a")})
    with pytest.raises(AssertionError, match="no place"):
        layer_of("ptq.utils")
