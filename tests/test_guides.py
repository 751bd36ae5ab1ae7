"""Every command of the guides: its settings load, and a line below says which test runs it, or why none does."""

import os
import re
import shlex
from pathlib import Path

import click
import pytest
from PIL import Image

from jobs.cli import SUBMITTED, WORKER_ENVIRONMENT, load, main
from tests.conftest import ROOT
from tests.test_architecture import JOBS

PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "decisions" not in path.parts)
BLOCK = re.compile(r"^```console\n(.*?)^```\n(.*?)(?:\n\n|\Z)", re.M | re.S)
BLOCKS = [
    pytest.param(*found.groups(), id=f"{path.name}-{number}")
    for path in PAGES
    for number, found in enumerate(BLOCK.finditer(path.read_text()))
]
OTHERS = ("make", ".", "ray", "export", "kubectl", "python -m mlflow")  # what a block may hold that is no job


def commands(block: str) -> list[list[str]]:
    """The words of each command; a line that ends in a backslash goes on."""
    lines = block.replace("\\\n", " ").splitlines()
    assert all(line.startswith("$ ") for line in lines), (
        "a console block holds commands; what they print goes elsewhere"
    )
    return [shlex.split(line.removeprefix("$ ")) for line in lines]


def job_of(words: list[str]) -> list[str] | None:
    """The job's words in a command, submitted or not: module, configuration, overrides."""
    if words[:3] == ["ray", "job", "submit"]:
        words = words[words.index("--") + 1 :]
    return words[2:] if words[:2] == ["python", "-m"] and words[2].startswith("jobs.") else None


@pytest.mark.parametrize(("block", "below"), BLOCKS)
def test_the_settings_of_every_command_load(block, below, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(block):
        job = job_of(words)
        if job is None:
            assert " ".join(words).startswith(OTHERS), words
            continue
        if words[0] == "ray":
            monkeypatch.setenv(SUBMITTED, "{}")
        module, config, *overrides = job
        load(JOBS[module.removeprefix("jobs.")], config, [word for word in overrides if word != "--dry-run"])
        monkeypatch.delenv(SUBMITTED, raising=False)


@pytest.mark.parametrize(("block", "below"), BLOCKS)
def test_below_every_block_stands_which_test_runs_it_or_why_none_does(block, below):
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", below)
    assert named or below.startswith("Not run here")
    assert below.startswith(("Run by", "Not run here"))
    for file, test in named:
        there = [path.read_text() for path in (ROOT / "tests").rglob(file)]
        assert any(f"def {test}(" in text for text in there), f"{file} has no {test}"


def test_commands_that_need_neither_data_nor_ray_run(capsys, monkeypatch):
    from jobs import plan

    monkeypatch.chdir(ROOT)
    ran = 0
    for found in BLOCKS:
        for words in commands(found.values[0]):
            module, *arguments = job_of(words) or [""]
            if module == "jobs.plan":
                with pytest.raises(SystemExit) as ending:
                    main(JOBS["plan"], plan.run, plan.run, arguments, needs_ray=False)
                assert ending.value.code == 0
                assert "total" in capsys.readouterr().out
                ran += 1
    assert ran == 2


def test_commands_of_others_are_ones_that_they_know():
    """Ray, MLflow and make are asked whether they know each command and option; nothing is started."""
    from mlflow.cli import cli as mlflow
    from ray.dashboard.modules.job.cli import job_cli_group as ray_job

    def ask(command: click.Command, words: list[str]) -> None:
        if isinstance(command, click.Group):
            found = command.get_command(click.Context(command), words[0])
            assert found is not None, words
            ask(found, words[1:])
        else:
            command.make_context(" ".join(words), list(words))  # raises where an option or argument is not known

    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    asked = 0
    for found in BLOCKS:
        for words in commands(found.values[0]):
            if words[0] == "make":
                assert words[1] in targets
            elif words[:2] == ["ray", "job"]:
                ask(ray_job, words[2:])
                asked += 1
            elif words[:3] == ["python", "-m", "mlflow"]:
                ask(mlflow, words[3:])
                asked += 1
    assert asked >= 6


def test_manifests_and_jobs_that_the_guides_name_are_there():
    named = [word for found in BLOCKS for words in commands(found.values[0]) if words[0] == "kubectl" for word in words]
    files = [word for word in named if word.startswith("infra/")]
    assert len(files) >= 6
    assert [file for file in files if not (ROOT / file).exists()] == []
    jobs = [word.partition("/")[2] for word in named if word.startswith(("job/", "rayjob/"))]
    assert len(jobs) >= 2
    assert [job for job in jobs if not (ROOT / "infra/kubernetes/jobs" / job / "kustomization.yaml").exists()] == []


def test_a_page_whose_commands_leave_placeholders_in_the_settings_says_so(monkeypatch):
    monkeypatch.chdir(ROOT)
    asked = 0
    for page in [ROOT / "README.md", *PAGES]:
        fences = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.M | re.S)
        lines = "\n".join(fences).replace("\\\n", " ").splitlines()
        for line in lines:
            job = job_of(shlex.split(line.removeprefix("$ "))) if "jobs/configs/sdxl/" in line else None
            if job is None:
                continue
            module, config, *overrides = [word for word in job if word not in ("#", "--dry-run")]
            words = [word for word in overrides if "=" in word]
            loaded = load(JOBS[module.removeprefix("jobs.")], config, words).model_dump_json()
            asked += 1
            if "your-bucket" in loaded:
                assert "`your-bucket`" in page.read_text(), f"{page.name}: {line}"
    assert asked >= 8


def test_arguments_with_brackets_are_quoted():
    """Some shells take them for names of files."""
    for page in [ROOT / "README.md", *PAGES]:
        assert (
            re.findall(
                r"(?<![\w'\".])[\w.]+=\[[^]]*\](?!')",
                "\n".join(re.findall(r"^```console\n(.*?)^```", page.read_text(), re.M | re.S)),
            )
            == []
        )


def test_there_are_guides():
    assert len(BLOCKS) >= 12
    assert {path.name for path in (ROOT / "docs/guides").iterdir()} <= {Path(path).name for path in PAGES}


def test_the_laptop_guide_looks_before_it_starts(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "my-images" / "holidays"
    folder.mkdir(parents=True)
    for number in range(3):
        Image.effect_noise((40, 30), 60).save(folder / f"{number}.jpg")
        (folder / f"{number}.txt").write_text("a picture")
    for name in WORKER_ENVIRONMENT:
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.chdir(tmp_path)
    (words,) = (
        words
        for found in BLOCK.finditer((ROOT / "docs/guides/laptop.md").read_text())
        for words in commands(found[1])
        if "--dry-run" in words
    )
    module, config, *overrides = job_of(words) or []
    from jobs import preprocess

    assert module == "jobs.preprocess"
    with pytest.raises(SystemExit) as ending:
        main(JOBS["preprocess"], preprocess.run, preprocess.plan, [str(ROOT / config), *overrides])
    assert ending.value.code == 0
    printed = capsys.readouterr().out
    assert "3 images" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my-images"]


def test_every_link_leads_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "infra").rglob("*.md")]
    lost = []
    for page in pages:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if "://" in target:
                continue
            headings = [] if not anchor else re.findall(r"^#+ (.*)$", file.read_text() if file.exists() else "", re.M)
            names = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            if not file.exists() or (anchor and anchor not in names and "decisions" not in page.parts):
                lost.append(f"{page.relative_to(ROOT)}: {target}")
    assert lost == []
