"""What manifests start: each job exists, its settings load, and it gets them as they are written."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from jobs.cli import SUBMITTED, load
from tests.infra.shipped import DOCUMENTS, INFRA, MADE, ROOT, SETTINGS, cluster, commands, nodes, submitted
from tests.test_architecture import JOBS


@pytest.mark.parametrize(("name", "words"), list(commands()))
def test_a_job_that_a_manifest_starts_exists_and_its_settings_load(name, words, monkeypatch):
    monkeypatch.setenv(SUBMITTED, "{}")  # as there: what it makes may not lie in its directory
    python, option, module, config, *overrides = words
    job = module.removeprefix("jobs.")
    assert (python, option) == ("python", "-m")
    assert (ROOT / "jobs" / f"{job}.py").is_file()
    load(JOBS[job], str(SETTINGS / config.removeprefix("/settings/")), overrides)


def test_settings_are_those_of_the_checkout_with_the_users_places_in_them(tmp_path):
    """The image has the files with placeholders: jobs read a ConfigMap in their stead, mounted where they start."""
    told = (INFRA / "kubernetes/base.yaml").read_text()
    ((name, folder),) = re.findall(r"create configmap (\S+) --from-file=(\S+)", told)
    assert ROOT / folder == SETTINGS
    placed = {path.parent for path in INFRA.rglob("*.yaml") if "your-bucket" in path.read_text()}
    assert placed == {INFRA / "kubernetes"}  # where the README's command puts a name in its place
    head = cluster()["spec"]["headGroupSpec"]["template"]["spec"]
    (volume,) = (volume for volume in head["volumes"] if "configMap" in volume)
    assert volume["configMap"]["name"] == name
    mounts = {mount["name"]: mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}
    for where, (_, _, module, config, *overrides) in commands():
        assert config.startswith(f"{mounts[volume['name']]}/"), where
        mine = tmp_path / Path(config).name
        mine.write_text((SETTINGS / mine.name).read_text().replace("your-bucket", "mine"))
        loaded = load(JOBS[module.removeprefix("jobs.")], str(mine), overrides).model_dump_json()
        assert "s3://mine/" in loaded
        assert "your-bucket" not in loaded


def test_each_of_the_settings_has_its_manifest_named_after_it():
    started = {name: words[3] for name, words in commands() if "RayJob/" in name}
    assert sorted(started.values()) == sorted(
        f"/settings/{path.name}"
        for path in SETTINGS.glob("*.toml")
        if path.name != "plan.toml"  # which starts nothing
    )
    for name, config in started.items():
        folder, kind = re.fullmatch(r"kubernetes/jobs/(.*)/kustomization.yaml:RayJob/(.*)", name).groups()
        assert folder == kind == Path(config).stem.replace("_", "-")


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl, which has kustomize in it")
def test_kustomize_makes_of_each_folder_what_is_tested_here():
    for path, documents in MADE:
        if path.name == "kustomization.yaml":
            made = subprocess.run(["kubectl", "kustomize", path.parent], check=True, capture_output=True, text=True)
            assert list(yaml.safe_load_all(made.stdout)) == documents


def test_no_shell_on_the_way_takes_a_setting_for_the_names_of_files(tmp_path):
    for name, words in submitted():
        shells = [subprocess.list2cmdline(words)]
        shells += [node["entrypoint"] for node in nodes(DOCUMENTS[name]) if "entrypoint" in node]
        asked = dict(commands())[name]
        for word in asked:
            if "[" in word:
                (tmp_path / re.sub(r"\[(.).*\]", r"\1", word)).touch()  # which the brackets stand for, unquoted
        for read in shells:
            told = subprocess.run(["sh", "-c", f"printf '%s\n' {read}"], cwd=tmp_path, check=True, capture_output=True)
            assert [word.strip("'") for word in told.stdout.decode().splitlines()] == asked, name


def test_a_submitter_that_is_lost_is_replaced_and_a_job_that_failed_is_not_run_again():
    for name, document in DOCUMENTS.items():
        if document["kind"] in ("RayJob", "RayCronJob"):
            spec = document["spec"].get("jobTemplate", document["spec"])
            assert spec["backoffLimit"] == 0, name
            assert spec["submitterConfig"]["backoffLimit"] >= 20, name
            assert spec["submitterPodTemplate"]["metadata"]["labels"] == {"app": "submitter"}  # network.yaml lets it in
    (nightly,) = (document["spec"] for document in DOCUMENTS.values() if document["kind"] == "CronJob")
    assert nightly["concurrencyPolicy"] == "Forbid"
    assert nightly["jobTemplate"]["spec"]["activeDeadlineSeconds"] < 86400  # one that hangs would end the schedule
