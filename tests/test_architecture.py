"""The house rules that can be read off the source: which floor imports what, and that every shipped config loads."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.cli import load
from jobs.config import CleanJob, DemoJob, EvaluateJob, ExportJob, GenerateJob, PlanJob, PreprocessJob
from jobs.training_config import TrainBaseJob, TrainRefinerJob, TrainVAEJob

ROOT = Path(__file__).parents[1]
FLOORS = ("model", "pipelines", "jobs")
SOURCES = sorted(path.relative_to(ROOT).as_posix() for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "jobs/configs").rglob("*.toml"))
JOBS = {  # by the beginning of the file's name
    "preprocess": PreprocessJob,
    "train_vae": TrainVAEJob,
    "train_base": TrainBaseJob,
    "train_refiner": TrainRefinerJob,
    "generate": GenerateJob,
    "evaluate": EvaluateJob,
    "export": ExportJob,
    "demo": DemoJob,
    "plan": PlanJob,
    "clean": CleanJob,
}


def tree(source: str) -> ast.Module:
    return ast.parse((ROOT / source).read_text(), source)


def imports(source: str) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of all that a file imports, at any depth; `from a import b` gives a and a.b."""
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno}: a relative import"
            assert node.module is not None
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def users(*packages: str, below: str = "") -> dict[str, list[str]]:
    """Files below a folder that import one of the packages or what is inside, with file:line of each import."""
    found: dict[str, list[str]] = {}
    for source in SOURCES:
        for name, line in imports(source):
            if source.startswith(below) and any(name == p or name.startswith(f"{p}.") for p in packages):
                found.setdefault(source, []).append(f"{source}:{line} imports {name}")
    return found


def attributes(source: str, of: str, name: str) -> Iterator[ast.Attribute]:
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Attribute) and node.attr == name and getattr(node.value, "id", None) == of:
            yield node


@pytest.mark.parametrize(
    ("floor", "above"),
    [
        ("model/", ("pipelines", "jobs")),
        ("pipelines/", ("jobs",)),
        ("pipelines/preprocess/", ("pipelines.train",)),
        ("pipelines/train/", ("pipelines.preprocess",)),
        ("pipelines/evaluate/", ("pipelines.train",)),
        ("", ("tests",)),
    ],
)
def test_imports_point_down(floor, above):
    assert any(source.startswith(floor) for source in SOURCES)
    assert users(*above, below=floor) == {}


def test_the_networks_know_neither_cluster_nor_storage_nor_settings():
    assert users("ray", "mlflow", "deepspeed", "pyarrow", "boto3", "pydantic", "fsspec", below="model/") == {}


@pytest.mark.parametrize(
    ("packages", "home"),
    [
        (("deepspeed",), "pipelines/train/engine.py"),
        (("mlflow",), "pipelines/mlflow_post.py"),
        (("pyarrow.fs", "boto3", "botocore", "s3fs", "fsspec"), "pipelines/storage.py"),
    ],
)
def test_a_foreign_system_enters_by_one_file(packages, home):
    assert set(users(*packages)) == {home}


def test_only_jobs_read_the_command_line_and_settings_files():
    readers = users("argparse", "tomllib", "getopt", "click", "yaml")
    assert {source for source in readers if not source.startswith("jobs/")} == set()
    assert [s for s in SOURCES if not s.startswith("jobs/") and any(attributes(s, "sys", "argv"))] == []


def test_only_jobs_touch_the_environment():
    touched = []
    for source in SOURCES:
        if source.startswith("jobs/"):
            continue
        for name in ("environ", "getenv", "putenv"):
            touched += [(source, node.lineno) for node in attributes(source, "os", name)]
        touched += [(source, line) for name, line in imports(source) if name in ("os.environ", "os.getenv")]
    allowed = [  # DeepSpeed reads its accelerator from there, and from nowhere else
        ("pipelines/train/engine.py", node.lineno)
        for node in ast.walk(tree("pipelines/train/engine.py"))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "os.environ['DS_ACCELERATOR']"
    ]
    assert touched == allowed


@pytest.mark.parametrize("source", [source for source in SOURCES if source.endswith("__init__.py")])
def test_packages_export_nothing(source):
    statements = tree(source).body
    assert [s for s in statements if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))] == []


@pytest.mark.parametrize("source", SOURCES)
def test_the_import_path_is_the_files_path(source):
    floors = [
        f"{source}:{node.lineno}"
        for node in ast.walk(tree(source))
        if isinstance(node, ast.Import) and any(alias.name.partition(".")[0] in FLOORS for alias in node.names)
    ]
    assert floors == []
    missing = []
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in FLOORS:
            path = ROOT / node.module.replace(".", "/")
            for alias in node.names:
                defined = path.with_suffix(".py").is_file() or (path / f"{alias.name}.py").is_file()
                missing += [] if defined else [f"{source}:{node.lineno}: {node.module}.{alias.name}"]
    assert missing == []


def test_configs_are_shipped():
    assert CONFIGS


@pytest.mark.parametrize("config", CONFIGS)
def test_every_shipped_config_is_a_job(config):
    (job,) = [job for beginning, job in JOBS.items() if Path(config).name.startswith(beginning)]
    load(job, str(ROOT / config), [])
