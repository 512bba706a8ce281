"""The Indexed Job of examples/kubernetes: valid by Kubernetes' published schema, with the policy of our codes."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from streamprune.errors import EXIT_CODES, Interrupted

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
JOB = Path(__file__).parents[2] / "examples" / "kubernetes" / "compress.yaml"
VERSIONS = ("1.33", "1.37")  # of Kubernetes; indexes that fail for themselves are stable since the first


@pytest.fixture
def job() -> Any:
    return yaml.safe_load(JOB.read_text())


@pytest.mark.parametrize("version", VERSIONS)
def test_it_is_what_the_schema_says(job: Any, version: str) -> None:
    assert kubernetes_validate.validate(job, version, strict=True) == version


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("spec", "completionModes"), "Indexed"),
        (("spec", "backoffLimitPerIndex"), "three"),
        (("spec", "podFailurePolicy", "rules"), [{"onExitCodes": {"operator": "In", "values": [85]}}]),
        (("spec", "template", "spec", "containers"), [{"image": "x"}]),
    ],
)
def test_a_wrong_job_would_be_seen(job: Any, place: tuple[str, ...], value: Any) -> None:
    inner = job
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSIONS[-1], strict=True)


def test_an_interruption_does_not_count_and_lasting_errors_end_an_index(job: Any) -> None:
    """What may pass by itself, an output in use or memory that ran out, is tried again and counts."""
    listed = [rule for rule in job["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    rules = {rule["action"]: rule["onExitCodes"]["values"] for rule in listed}
    assert rules == {"Ignore": [Interrupted.exit_code], "FailIndex": [2, 3, 4, 6, 7, 8]}
    assert {str(code) for codes in rules.values() for code in codes} <= EXIT_CODES.keys()
    assert job["spec"]["completionMode"] == "Indexed"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["streamprune", "submit", "/jobs/jobs.toml", "--index", "$(JOB_COMPLETION_INDEX)"]
    assert {rule["onExitCodes"]["containerName"] for rule in listed} == {container["name"]}
