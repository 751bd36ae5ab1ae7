"""What a job that `ray job submit` has started may be told."""

import pytest

from jobs.cli import SUBMITTED
from jobs.config import DemoJob, PreprocessJob
from jobs.training_config import TrainBaseJob
from tests.jobs.settings import wrong


@pytest.fixture
def submitted(make, monkeypatch):
    """A job as its driver sees it that `ray job submit` has started."""
    monkeypatch.setenv(SUBMITTED, "{}")
    return make


SERVER = "tracking.uri=http://mlflow:5000"


def test_a_submitted_job_may_not_write_where_it_is_lost(submitted):
    message = wrong(submitted, PreprocessJob, "latents=/data/latents", SERVER)
    assert message.startswith("index: a submitted job runs in a temporary copy")
    message = wrong(submitted, TrainBaseJob)
    assert message.startswith("output, tracking.uri: ")


def test_a_submitted_job_may_write_to_absolute_paths_and_s3(submitted):
    assert submitted(TrainBaseJob, "output=/data/base", SERVER)
    assert submitted(TrainBaseJob, "output=s3://bucket/base", "tracking.uri=sqlite:////data/mlflow.db")
    assert submitted(PreprocessJob, "index=s3://b/i", "latents=/data/l", SERVER)


def test_a_submitted_jobs_default_output_is_lost_as_well(submitted):
    assert "output" in wrong(submitted, DemoJob, SERVER)
    assert submitted(DemoJob, "output=/data/demo", SERVER)


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "./mlruns"])
def test_a_submitted_jobs_tracking_may_not_be_a_relative_file(submitted, uri):
    assert "tracking.uri" in wrong(submitted, TrainBaseJob, "output=/data/base", f"tracking.uri={uri}")


@pytest.mark.parametrize("overrides", [["tracking=3", "output=/o"], ["output=3", SERVER]])
def test_a_submitted_job_with_values_of_the_wrong_kind_is_an_error_in_words(submitted, overrides):
    assert overrides[0].partition("=")[0] in wrong(submitted, TrainBaseJob, *overrides)


def test_the_environment_of_a_job_that_was_not_submitted_does_not_matter(make, monkeypatch):
    monkeypatch.delenv(SUBMITTED, raising=False)
    assert make(TrainBaseJob)
