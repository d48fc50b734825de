"""Identity has one rule: the runs of the committed study stay what they are. A field that is younger than they are, of
the spec, of the training settings or of a method, is left out of the hash at its default."""

import json
import tarfile
from pathlib import Path

import pytest

from harness import registry
from harness.record.record import RunRecord
from harness.spec import RunSpec, identity_hash

ARCHIVE = Path(__file__).parents[2] / "results" / "study" / "records.tar.xz"


@pytest.fixture(scope="module")
def texts() -> dict[str, bytes]:
    """The files of all records by the name of their run's folder."""
    with tarfile.open(ARCHIVE) as archive:
        files = [member for member in archive.getmembers() if member.name.endswith("/record.json")]
        return {Path(member.name).parent.name: archive.extractfile(member).read() for member in files}


def test_every_run_id_is_what_its_spec_hashes_to(texts):
    assert len(texts) > 400
    for run_id, text in texts.items():
        record = RunRecord.parse(text, run_id)
        assert record.run_id == run_id
        assert RunSpec.model_validate(record.spec.model_dump(mode="json")).run_id == run_id
        assert identity_hash(json.loads(text)["spec"]) == run_id


def test_a_method_given_again_is_the_same_run(texts):
    """What a plan writes into the spec of a method of the same version is what the first plan wrote."""
    tried = set()
    for run_id, text in texts.items():
        spec = RunRecord.parse(text, run_id).spec
        method = registry.make_method(spec.method, spec.method_parameters)
        if method.version == spec.method_version:
            again = spec.model_copy(update={"method_parameters": method.model_dump(mode="json")})
            assert again.run_id == run_id, spec.method
            tried.add(spec.method)
    assert len(tried) > 5
