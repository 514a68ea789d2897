"""The layout of the package: rooms import downwards only, and no module takes part in an import cycle."""

import ast
import graphlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import raydistill
from tests.factories.models import save_tiny, sentences

PACKAGE = Path(raydistill.__file__).parent
COMMANDS = sorted(p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("_"))
# From top to bottom. A room may import the rooms that stand after it in this list, and no others.
ROOMS = [
    "commands",  # the files at the top of the package
    "search",
    "tracking",
    "paper",
    "jobs",
    "cluster",
    "results",
    "training",
    "teacher_cache",
    "label_sets",
    "evaluation",
    "inference",
    "models",
    "data",
    "config",
    "core",
]
# Library -> the rooms or files that may import it.
ONLY_IN = {
    "typer": {"commands"},
    "ray": {"commands", "search", "jobs", "cluster"},
    "optuna": {"search"},
    "mlflow": {"tracking"},
    "matplotlib": {"results", "paper"},
    "ctranslate2": {"inference"},
    "datasets": {"data"},
    "datasketch": {"data"},
    "py3langid": {"label_sets"},
    "rouge_score": {"evaluation"},
    "sacrebleu": {"evaluation"},
}
# Library -> the only module that may use its private names, and modules of the library that are not documented.
PRIVATE_IN = {"ray": "cluster/ray_compat.py", "optuna": ""}
UNDOCUMENTED = ("ray.autoscaler", "ray.tune.execution", "ray.train.v2", "ray.train.base_trainer")
# Rooms that stay importable in milliseconds, and commands that answer --help at once.
NO_TORCH = {"core", "config", "data", "label_sets", "results", "paper", "tracking"}


def imports():
    """(file in the package, module imported), also inside functions and behind TYPE_CHECKING."""
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((file, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                yield from ((file, f"{node.module}.{alias.name}") for alias in node.names)


def room_of(file):
    return file.split("/")[0] if "/" in file else "commands"


def violations(imported):
    """Imports that go upwards, and imports of a library outside its rooms."""
    for file, module in imported:
        root, *inner = module.split(".")
        room = room_of(file)
        if root == "raydistill" and inner[0] != "__version__":
            target = inner[0] if inner[0] in ROOMS else "commands"
            if ROOMS.index(target) < ROOMS.index(room):
                yield f"{file} imports {module}"
        if root in ONLY_IN and not ONLY_IN[root] & {room, file}:
            yield f"{file} imports {module}"
        if root in ("torch", "transformers") and room in NO_TORCH:
            yield f"{file} imports {module}"


def module_graph(imported):
    """Module -> the modules of the package that it imports, lazy imports included."""
    modules = {file.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".") for file, _ in imported}
    graph = {}
    for file, name in imported:
        module = file.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")
        target = name.removeprefix("raydistill.")
        if name.startswith("raydistill."):  # the name may be a module, or a definition in one
            target = target if target in modules else target.rpartition(".")[0]
            if target != module:  # a command run as `python -m` imports its own entry point
                graph.setdefault(module, set()).add(target)
    return graph


def import_cycle(imported):
    """The modules of one import cycle, or an empty list."""
    try:
        graphlib.TopologicalSorter(module_graph(imported)).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def private_uses(file, source):
    """Private names of Ray and Optuna in the source of a file: imported, or as attributes of anything but self."""
    tree = ast.parse(source)
    imported = []  # dotted names
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported += [f"{node.module}.{alias.name}" for alias in node.names]
    libraries = {name.split(".")[0] for name in imported} & PRIVATE_IN.keys()
    libraries = {library for library in libraries if PRIVATE_IN[library] != file}
    for name in imported:
        is_private = any(part.startswith("_") for part in name.split(".")) or f"{name}.".startswith(
            tuple(f"{module}." for module in UNDOCUMENTED)
        )
        if name.split(".")[0] in libraries and is_private:
            yield f"{file} uses {name}"
    for node in ast.walk(tree) if libraries else ():
        is_private = isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr)
        if is_private and ast.unparse(node.value) not in ("self", "cls"):
            yield f"{file} uses {ast.unparse(node)}"


def test_private_names_of_ray_and_optuna_are_in_one_module_per_library():
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert [use for file, source in sources.items() for use in private_uses(file, source)] == []
    assert "ray._private" in sources[PRIVATE_IN["ray"]]


@pytest.mark.parametrize(
    ("source", "used"),
    [
        ("import ray\nray._private.state.state.get_draining_nodes()", "ray._private"),
        ("def f():\n    from ray._private import ray_constants", "ray._private.ray_constants"),
        ("import ray._raylet", "ray._raylet"),
        ("from ray.tune.execution import class_cache", "ray.tune.execution.class_cache"),
        ("from ray.train.v2.api.exceptions import ControllerError", "ray.train.v2.api.exceptions.ControllerError"),
        ("import optuna\nstudy = optuna.create_study()\nstudy._storage", "study._storage"),
        ("from optuna.storages._heartbeat import fail_stale_trials", "optuna.storages._heartbeat.fail_stale_trials"),
        ("import optuna\nclass A:\n    def f(self):\n        self._study._study_id", "self._study._study_id"),
    ],
)
def test_a_private_name_is_detected(source, used):
    assert list(private_uses("search/study.py", source)) == [f"search/study.py uses {used}"]


def mirrored_module(file):
    """The module that a test file tests: tests/training/test_loop.py mirrors raydistill.training.loop."""
    *rooms, name = file.removesuffix(".py").split("/")
    inner = [room for room in rooms[1:] if room != "commands"]
    return ".".join(["raydistill", *inner, name.removeprefix("test_")])


def package_names(tree):
    """Name in a file -> the module of the package or the tests that the name stands for, or a definition in one."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {name: target for name, target in names.items() if target.split(".")[0] in ("raydistill", "tests")}


def private_attributes(tree):
    """Private attributes, such as `sync.Storage._write`, that source reads, sets or replaces by `setattr`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "delattr", "getattr")):
            match node.args:
                case [target, ast.Constant(value), *_]:
                    yield f"{ast.unparse(target)}.{value}"


def forbidden_names(file, source):
    """What a file of the tests reaches in spite of the rules: private names of other modules, and other test files.

    A private attribute of an object, such as `follower._show_steps`, is not recognised: its class is not named there.
    """
    tree = ast.parse(source)
    names = package_names(tree)
    reached = set(names.values())
    for attribute in private_attributes(tree):
        prefixes = [name for name in names if attribute.startswith(f"{name}.")]
        if prefixes:
            prefix = max(prefixes, key=len)
            reached.add(names[prefix] + attribute.removeprefix(prefix))
    for name in reached:
        private = re.search(r"\._(?!_|app\b)\w+", name)  # the names of the module `raydistill._app` are public
        if private and not name.startswith(f"{mirrored_module(file)}."):
            yield name[: private.end()]
        elif re.match(r"tests\.(.*\.)?test_", name):
            yield name


def test_tests_reach_private_names_of_the_module_they_mirror_only_and_no_other_test_file():
    tests = PACKAGE.parent / "tests"
    files = {path.relative_to(tests.parent).as_posix(): path for path in tests.rglob("*.py")}
    reached = {(file, name) for file, path in files.items() for name in forbidden_names(file, path.read_text())}
    assert reached == set()


@pytest.mark.parametrize(
    ("source", "reached"),
    [
        ("from raydistill.training.state import _write", "raydistill.training.state._write"),
        ("def test():\n    from raydistill.training import _state", "raydistill.training._state"),
        ("from raydistill.training import state\nstate._write()", "raydistill.training.state._write"),
        ("import raydistill.training.state\nraydistill.training.state._write()", "raydistill.training.state._write"),
        ("from raydistill.training.state import A as B\nB._write", "raydistill.training.state.A._write"),
        ("from raydistill import sweep\nsweep._load = None", "raydistill.sweep._load"),
        ("from raydistill import sweep\npatch.setattr(sweep, '_load', 1)", "raydistill.sweep._load"),
        ("from tests.training.test_state import make", "tests.training.test_state.make"),
        ("from tests.training import test_state", "tests.training.test_state"),
        ("import tests.training.test_state", "tests.training.test_state"),
    ],
)
def test_a_name_that_a_test_may_not_reach_is_detected(source, reached):
    assert set(forbidden_names("tests/training/test_loop.py", source)) == {reached}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("tests/training/test_loop.py", "from raydistill.training.loop import A, _write\nA._step"),
        ("tests/commands/test_sweep.py", "from raydistill import sweep\npatch.setattr(sweep, '_load', 1)"),
        ("tests/training/test_loop.py", "from raydistill.training import state\nstate.__file__\nself._loop"),
        ("tests/training/test_loop.py", "from raydistill._app import run_app\nfrom tests.factories.models import save"),
    ],
)
def test_a_test_reaches_its_own_module(file, source):
    assert list(forbidden_names(file, source)) == []


def test_rooms_import_downwards_and_libraries_stay_in_their_rooms():
    assert list(violations(imports())) == []


def test_no_import_cycle_between_modules():
    assert import_cycle(list(imports())) == []


def test_a_lazy_import_cycle_is_detected():
    lazy = [("search/trial.py", "raydistill.search.study.key_of"), ("search/study.py", "raydistill.search.trial.run")]
    assert set(import_cycle(lazy)) == {"search.trial", "search.study"}


def test_every_folder_is_a_room():
    folders = {p.parent.relative_to(PACKAGE).parts[0] for p in PACKAGE.glob("*/**/*.py")}
    assert folders == set(ROOMS) - {"commands"}


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("data/corpus.py", "raydistill.models.families"),
        ("training/loop.py", "raydistill.jobs.train"),
        ("models/families.py", "raydistill.inference.engines"),
        ("results/pareto.py", "raydistill.tracking.export"),
        ("evaluation/metrics.py", "raydistill.sweep.main"),
        ("training/run.py", "ray.train"),
        ("results/tables.py", "mlflow"),
        ("sweep.py", "ctranslate2"),
        ("config/run.py", "torch"),
    ],
)
def test_a_violation_is_detected(file, module):
    assert list(violations([(file, module)])) == [f"{file} imports {module}"]


def test_imports_inside_functions_are_seen():
    imported = set(imports())
    assert ("evaluation/rouge.py", "rouge_score.rouge_scorer.RougeScorer") in imported
    assert ("cluster/exclusive.py", "raydistill.cluster.start.largest_node") in imported


def python(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=PACKAGE.parent,
    )


BARE = """
import sys

class Blocked:
    names = {"ray", "mlflow", "datasets", "datasketch", "optuna", "rouge_score", "sacrebleu", "ctranslate2"}
    names |= {"matplotlib", "py3langid", "typer"}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocked())
import importlib
import json
import pkgutil
from pathlib import Path

import raydistill

for room in ("core", "config", "data", "models", "inference", "evaluation", "label_sets", "teacher_cache", "training"):
    package = importlib.import_module(f"raydistill.{room}")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name != "schema":
            importlib.import_module(f"raydistill.{room}.{module.name}")

from raydistill.config.run import Run
from raydistill.training.run import train

root = Path(sys.argv[1])
run = Run(
    name="bare",
    teacher=str(root / "teacher"),
    dataset={"name": str(root), "max_source_tokens": 40, "max_target_tokens": 20},
    method="kd",
    student={"size": "1-1"},
    training={"epochs": 1, "batch_size": 4, "checks_per_epoch": 1, "precision": "fp32"},
)
result = train(run, root / "run", lambda metrics, folder: None)
print(json.dumps({"result": result.to_json(), "loaded": sorted(Blocked.names & set(sys.modules))}))
"""


def test_training_works_with_torch_and_transformers_alone(tmp_path):
    save_tiny("bart", tmp_path / "teacher")
    for split, n in (("train", 8), ("validation", 4), ("test", 4)):
        rows = [json.dumps({"id": str(i), "source": s, "target": s[:12]}) for i, s in enumerate(sentences(n))]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    done = python(BARE, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["loaded"] == []
    assert printed["result"]["status"] == "done"
    assert printed["result"]["metrics"]["score"] == -printed["result"]["metrics"]["val_loss"]
    assert "rouge_score is not installed" in done.stderr
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()


HELP = """
import importlib
import sys

name = sys.argv[1]
sys.argv = [f"raydistill {name}", "--help"]
try:
    importlib.import_module(f"raydistill.{name}").main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "ray", "transformers", "mlflow", "optuna", "datasets", "ctranslate2", "matplotlib", "pandas"}
print("HEAVY", sorted(heavy & set(sys.modules)))
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_without_loading_anything_heavy(command):
    done = python(HELP, command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Usage" in done.stdout
    assert done.stdout.splitlines()[-1] == "HEAVY []"


IMPORT_ALL = """
import importlib
import pkgutil
import sys

import raydistill

for module in pkgutil.walk_packages(raydistill.__path__, "raydistill."):
    if module.name != "raydistill.__main__":
        importlib.import_module(module.name)
slow = ("transformers.modeling_utils", "transformers.generation.utils", "torch._dynamo", "torch.distributed.tensor")
slow += ("scipy", "sklearn", "datasets", "mlflow", "matplotlib", "ctranslate2")
print("LOADED", [name for name in slow if name in sys.modules])
"""


def test_no_module_loads_the_modelling_code_of_transformers():
    # 4 s of CPU time in each process that runs no model: drivers, and workers that decode with CTranslate2.
    done = python(IMPORT_ALL)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_the_console_script_lists_every_command():
    from raydistill.__main__ import COMMANDS as listed

    assert sorted(listed) == COMMANDS
