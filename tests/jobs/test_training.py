"""What the training jobs do before they start."""

import pytest

from jobs import train_base, train_vae
from jobs.cli import USAGE_ERROR, JobError
from jobs.config import TrainBaseJob, TrainVAEJob
from pipelines.lease import lease
from pipelines.storage import Storage
from tests.conftest import Demo


@pytest.mark.parametrize(
    ("module", "kind", "name"), [(train_base, TrainBaseJob, "base"), (train_vae, TrainVAEJob, "vae")]
)
def test_a_second_training_on_an_output_is_refused_and_names_the_first(module, kind, name, tmp_path):
    job = Demo(tmp_path).load(kind, f"train_{name}")
    output = Storage(job.output)
    with lease(output):
        before = [file.name for file in output.list()]
        with pytest.raises(JobError, match=r"is being written by process \d+ on .* since .*: wait until") as refused:
            module.run(job)
        assert [file.name for file in output.list()] == before
    assert refused.value.code == USAGE_ERROR
