"""The command line as a user meets it: info, help, and every error before any work."""

import json
import os
import sys

import pytest
import torch

from dropbp_kernels import __version__, _backend
from dropbp_kernels.cli import errors, finetune, hardware, main
from dropbp_kernels.cli.output import choose_folder
from dropbp_kernels.cli.settings import Settings, resolve, settings_of
from dropbp_kernels.ops.schema import SCHEMAS


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder of its own, where nothing may be left by a command that failed, and no pretraining."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DROPBP_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(finetune, "PACKAGES", ())  # these tests need none of them


def fails(capsys, *argv):
    """Run main, expect one line on stderr and exit code 2; return the line."""
    assert main(["finetune", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_info_prints_backends_and_reasons(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"dropbp_kernels             {__version__}" in text
    assert torch.__version__ in text
    for stem in SCHEMAS:
        assert f"{stem:<26} {_backend.serving(stem, 'cpu'):<11}{_backend.serving(stem, 'cuda')}\n" in text
        for backend in _backend.LADDER["cuda"]:
            if backend == _backend.serving(stem, "cuda"):
                break
            assert f"not {backend}: {_backend.why_not(backend, stem)}" in text


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert {(entry["op"], entry["device"]) for entry in facts["ops"]} == {
        (s, d) for s in SCHEMAS for d in ("cpu", "cuda")
    }
    assert facts["hardware"]["torch_threads"] == torch.get_num_threads()


def test_toolkit_of_the_build_is_read_from_the_library(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "PACKAGE_FOLDER", tmp_path)
    assert hardware.build_toolkit() is None
    (tmp_path / "_C_cuda.so").write_bytes(b"\0\xffCuda compilation tools, release 13.0, V13.0.88\0")
    assert hardware.build_toolkit() == "13.0.88"
    assert hardware.git_commit() is None  # a folder of nobody's checkout


def test_help_names_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "(default: builtin)",
        "(default: 0.75; 0 where context is inference)",
        "--resume DIR",
        "--adapter lora|paca|full LoRA or PaCA",
        "--steps N optimizer steps",
        "examples:",
        "--no-compare",
    ):
        assert part in text
    assert "SUPPRESS" not in text


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"dropbp-kernels {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--drop-rates", "0.5"],
            "unrecognized arguments: --drop-rates 0.5; did you mean --drop-rate? (see dropbp-kernels finetune --help)",
        ),
        (["--adapter", "dora"], "--adapter: expected one of lora, paca, full, got 'dora'"),
        (["--drop-rate", "1.0"], "--drop-rate: expected 0 <= drop_rate < 1, got 1.0"),
        (["--drop-rate", "-0.1"], "--drop-rate: expected 0 <= drop_rate < 1, got -0.1"),
        (["--drop-rate", "nan"], "--drop-rate: expected 0 <= drop_rate < 1, got nan"),
        (["--drop-rate", "much"], "argument --drop-rate: invalid float value: 'much'"),
        (
            ["--drop-rate", "0.95", "--rates", "sensitivity"],
            "--drop-rate with --rates sensitivity: drop_rate: expected",
        ),
        (["--rates", "best"], "--rates: expected one of uniform, depth_linear, sensitivity"),
        (["--rates", "none.json"], "--rates none.json: No such file"),
        (["--schedule", "linear"], "--schedule: expected a callable or one of warmup, cosine, recovery, got 'linear'"),
        (["--sampler", "lottery"], "--sampler: expected one of balanced, bernoulli, published"),
        (["--grad-scale", "big"], "argument --grad-scale: expected a finite number or 'unbiased', got 'big'"),
        (["--grad-scale", "nan"], "--grad-scale: expected a finite number or 'unbiased', got nan"),
        (["--dtype", "float8"], "--dtype: expected one of auto, float32, bfloat16"),
        (["--device", "abacus"], "--device abacus:"),
        (["--seed", "-1"], "--seed: expected 0 to 4294967295, got -1"),
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size: expected at least 1"),
        (["--lora-rank", "0"], "--lora-rank: expected at least 1"),
        (["--seq-len", "8"], "--seq-len: expected at least 16"),
        (["--seq-len", "100000"], "--seq-len: expected at most 1024, got 100000"),
        (["--learning-rate", "0"], "--learning-rate: expected a positive number"),
        (["--save-every", "-1"], "--save-every: expected 0"),
        (["--data", "none.txt"], "--data none.txt: no such file or folder"),
        (["--model", "./none"], "--model ./none: expected 'builtin', a folder or a hub id"),
        (["--model", "bultin"], "--model bultin: no such model; did you mean builtin?"),
        (["--model", "."], "--model .: expected a Hugging Face checkpoint, but the folder has no config.json"),
        (["--resume", "none"], "--resume none: expected an output folder with a checkpoint.pt"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--step", "3"], "unrecognized arguments: --step 3"),
    ],
)
def test_bad_option_is_one_line_and_leaves_nothing(capsys, tmp_path, argv, message):
    assert message in fails(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_bad_data_is_found_before_anything_is_made(capsys, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("a few words")
    assert "the file is empty" in fails(capsys, "--data", "empty.txt")
    assert "expected at least two rows" in fails(capsys, "--data", "short.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "short.txt"]


def test_output_folder_must_be_empty(capsys, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    assert "--output full: expected a new or empty folder" in fails(capsys, "--output", "full")
    (tmp_path / "file").write_text("")
    assert "--output file: expected a new or empty folder" in fails(capsys, "--output", "file")


def test_output_folder_must_be_writable(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # what root is asked says nothing
    assert f"--output new/out: {tmp_path} is no folder that can be written to" in fails(capsys, "--output", "new/out")


def test_default_folders_of_one_second_differ(tmp_path):
    first = choose_folder("finetune", None)
    first.mkdir(parents=True)
    assert not choose_folder("finetune", None).exists()


def test_missing_packages_are_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(finetune, "PACKAGES", ("torch", "no_such_package", "nor_this"))
    line = fails(capsys)
    assert "finetune needs no_such_package, nor_this" in line
    assert "pip install 'dropbp_kernels[finetune]'" in line


def test_file_that_is_no_checkpoint(capsys, tmp_path):
    (tmp_path / "checkpoint.pt").write_text("not a checkpoint")
    assert "--resume .: not a checkpoint" in fails(capsys, "--resume", ".")
    torch.save({"version": 0}, tmp_path / "checkpoint.pt")
    assert "expected a checkpoint of version 1" in fails(capsys, "--resume", ".")


def test_folders_that_finetune_wrote(capsys, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "it holds an adapter, not the model" in fails(capsys, "--model", "adapter")
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    (tmp_path / "run" / "report.json").write_text("{}")
    assert "did you mean run/model?" in fails(capsys, "--model", "run")
    assert "found none; the run in this folder has ended" in fails(capsys, "--resume", "run")


def test_no_command_is_an_error(capsys):
    assert main([]) == 2
    assert "arguments are required: COMMAND" in capsys.readouterr().err
    assert main(["fintune"]) == 2
    assert "no command 'fintune'; there are finetune, info, plan, profile, tune; did you mean finetune? (see" in (
        capsys.readouterr().err
    )


def test_interrupt_before_the_training_is_quiet(capsys, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "require_packages", lambda *_: interrupt(None))
    assert main(["finetune"]) == 130
    assert capsys.readouterr().err == "dropbp-kernels: interrupted\n"


def test_full_gpu_is_one_line(capsys, monkeypatch):
    def run(args):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.69 GiB of which 1.20 GiB "
            "is free. Including non-PyTorch memory, this process has 22.40 GiB memory in use. See documentation"
        )

    monkeypatch.setattr(finetune, "run", run)
    line = fails(capsys)
    assert "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.69 GiB of which 1.20 GiB is free. Sma" in line


def test_auto_settings(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = resolve(Settings())
    assert (settings.device, settings.dtype, settings.compare) == ("cpu", "float32", True)
    assert settings.learning_rate is not None
    assert resolve(Settings(compare=False)).compare is False
    assert resolve(Settings(model="owner/name")).compare is False
    assert resolve(Settings(model="owner/name")).learning_rate < settings.learning_rate


def test_resumed_settings_are_those_saved():
    saved = vars(resolve(Settings(device="cpu", steps=7)))
    assert settings_of(saved, {}).steps == 7
    assert settings_of(saved, {"steps": 7, "save_every": 3}).save_every == 3
    with pytest.raises(errors.UserError, match="the checkpoint was made with --steps 7, got 8"):
        settings_of(saved, {"steps": 8})
    with pytest.raises(errors.UserError, match="another version"):
        settings_of({"steps": 7}, {})


def test_module_runs_as_a_script(monkeypatch, capsys):
    import runpy

    monkeypatch.setattr(sys, "argv", ["dropbp_kernels.cli", "finetune", "--steps", "0"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("dropbp_kernels.cli", run_name="__main__")
    assert stopped.value.code == 2
