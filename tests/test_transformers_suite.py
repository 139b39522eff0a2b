"""benchmarks/transformers_suite, on a stand-in checkout whose tests have known outcomes."""

import csv
from dataclasses import fields

import pytest

from benchmarks import transformers_suite
from benchmarks.rows import RESULTS

transformers = pytest.importorskip("transformers")  # an optional extra

TESTS = """
import pytest
from dropbp_kernels.gates import find_gates
from transformers import LlamaConfig, LlamaForCausalLM


def model():
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes))


def test_passes():
    assert model().config.hidden_size == 16


def test_fails_patched():
    assert not find_gates(model())


def test_fails_always():
    assert find_gates(model()) == 1


@pytest.mark.skip
def test_is_skipped():
    pass
"""


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "tests/models/llama").mkdir(parents=True)
    (tmp_path / "tests/models/llama/test_modeling_llama.py").write_text(TESTS)
    (tmp_path / "src").mkdir()
    (tmp_path / "src/transformers").symlink_to(transformers.__path__[0])
    return tmp_path


def test_a_test_that_fails_only_patched_is_named(checkout, tmp_path, monkeypatch):
    run_tests = transformers_suite.run_tests
    unpatched = {"passes": "passed", "fails_patched": "passed", "fails_always": "failed", "is_skipped": "skipped"}
    patched = {}

    def run_patched(folder, model, way):
        """A run takes seconds, and nothing of ours is in the unpatched one."""
        patched.update(patched or run_tests(folder, model, "fused"))
        return patched if way else {name: unpatched[name.rpartition("::test_")[2]] for name in patched}

    monkeypatch.setattr(transformers_suite, "run_tests", run_patched)
    assert transformers_suite.main([str(checkout), "llama", "--fused"], results=tmp_path) == 1
    with (tmp_path / "transformers_suite.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    counts = {key: int(value) for key, value in row.items() if key.startswith(("unpatched_", "patched_"))}
    assert counts == {
        "unpatched_passed": 2, "unpatched_failed": 1, "unpatched_skipped": 1,
        "patched_passed": 1, "patched_failed": 2, "patched_skipped": 1,
    }  # fmt: skip
    assert row["fail_only_patched"].endswith("::test_fails_patched")
    assert (row["way"], row["model"], row["transformers"]) == ("fused", "llama", transformers.__version__)


def test_a_folder_without_the_tests_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        transformers_suite.main([str(tmp_path)])
    assert "expected a checkout of transformers with tests/models/llama" in capsys.readouterr().err


def test_a_test_that_is_gone_counts_as_broken():
    assert transformers_suite.compare({"a": "passed", "b": "failed"}, {}) == ["a"]


def test_committed_rows_have_the_columns_of_today():
    path = RESULTS / "transformers_suite.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [column.name for column in fields(transformers_suite.SuiteRow)]
    assert {row["model"] for row in rows} == set(transformers_suite.MODELS)
