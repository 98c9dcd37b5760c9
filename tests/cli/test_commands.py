"""Every command as a process: exit codes, JSON alone on stdout, sentences instead of tracebacks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image

from nulsq_cli.cli import app
from nulsq_cli.cli.everywhere import numbers, together
from tests import metrics
from tests.processes import Process, nulsq, refused

FAST = ["schedule.epochs=1", "quant.calibration.samples=128", "bn.reestimate_samples=128"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = nulsq("finetune", "quickstart", *FAST, "-o", folder, "--json", fresh=True)
    return folder, json.loads(done.stdout), done.stderr


def test_finetune_leaves_what_the_contract_lists(run):
    folder, result, people = run
    keys = {"run", "artifact", "model", "bits", "method", "epochs", "seed", "seconds", "float", "init", "best", "last"}
    assert keys <= set(result) and set(result["best"]) >= {"top1", "top5", "epoch"}
    assert result["bits"] == "2/2" and result["epochs"] == 1
    assert result["float"]["top1"] > 90 and result["best"]["top1"] > 60
    for name in ("recipe.yaml", "plan.json", "metrics.jsonl", "summary.csv", "result.json", "env.json", "train.log",
                 "checkpoints/last.safetensors", "checkpoints/best.safetensors", "export/model.safetensors"):  # fmt: skip
        assert (folder / name).is_file(), name
    assert json.loads((folder / "result.json").read_text()) == result
    assert "before training" in people and "nulsq eval" in people
    assert "held out" in result["chosen_on"]
    assert not [p for p in folder.rglob("*") if p.suffix in (".pt", ".pth", ".pkl", ".tmp")]


def test_eval_of_the_artifact_is_exactly_the_run(run):
    folder, result, _ = run
    one = json.loads(nulsq("eval", folder, "--json").stdout)
    two = json.loads(nulsq("eval", result["artifact"], "--json").stdout)
    assert one["kind"] == "run" and two["kind"] == "artifact" and one["samples"] == 360
    assert {k: one[k] for k in ("top1", "top5", "loss")} == {k: two[k] for k in ("top1", "top5", "loss")}
    assert one["top1"] == result["best"]["top1"]
    (line,) = nulsq("eval", folder, "-q").stdout.splitlines()
    assert f"{one['top1']:.2f} %" in line and nulsq("eval", folder, "-q", "--json").stderr == ""
    refused("eval", folder, "--min-top1", "99.9", code=5, words="below the 99.9 %")


def test_export_again_gives_the_same_bytes_and_verifies(run, tmp_path):
    folder, result, _ = run
    done = json.loads(nulsq("export", folder, "-o", tmp_path / "x.safetensors", "--json").stdout)
    assert (tmp_path / "x.safetensors").read_bytes() == Path(result["artifact"]).read_bytes()
    assert done["verified"]["max_abs_diff"] == 0 and done["verified"]["top1_agreement"] == 100
    assert done["bytes"] < done["float_bytes"] / 5
    refused("export", folder, "--to", "onyx", code=2, words="no export target")
    refused("export", result["artifact"], code=2, words="is a packed file already")
    (tmp_path / "x.onnx").write_bytes(b"x")
    refused("export", tmp_path / "x.onnx", "--to", "onnx", code=2, words="is an exported file already")
    refused("entropy", tmp_path / "x.onnx", code=2, words="entropy is that of runs and packed files")


def test_entropy_of_two_targets(run, tmp_path):
    folder, result, _ = run
    done = nulsq("entropy", folder, result["artifact"], "-o", tmp_path, "--json")
    found = json.loads(done.stdout)["targets"]
    assert len(found) == 2 and found[0]["layers"] == found[1]["layers"]
    assert {"name", "tensor", "bits", "levels_used", "entropy", "levels", "counts"} == set(found[0]["layers"][0])
    assert {p.name for p in tmp_path.iterdir()} == {"entropy.json", "entropy.png", "entropy.svg"}


def test_the_same_recipe_and_seed_give_the_same_artifact(run, tmp_path):
    folder, result, _ = run
    done = nulsq("finetune", folder / "recipe.yaml", "-o", tmp_path / "again", "-q", fresh=True)
    lines = done.stdout.splitlines()
    assert all(x.strip().startswith(y) for x, y in zip(lines, ("float ", "2/2 before training ", "2/2 best, "), strict=False))
    assert lines[-1].strip() == str(tmp_path / "again/export/model.safetensors") and len(lines) == 5
    assert (tmp_path / "again/export/model.safetensors").read_bytes() == Path(result["artifact"]).read_bytes()


def test_zero_epochs_is_post_training_quantization(tmp_path):
    done = json.loads(nulsq("finetune", "quickstart", "--epochs", 0, "-o", tmp_path / "r", "--json").stdout)
    assert done["init"] == done["last"] and done["artifact"]
    assert json.loads(nulsq("eval", done["artifact"], "--json").stdout)["top1"] == done["init"]["top1"]


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(tmp_path):
    common = ["finetune", "quickstart", *FAST, "schedule.epochs=2", "data.hold_out=0.5", "--recovery-interval", "4",
              "log.interval=2"]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    nulsq(*common, "-o", whole, "-q")
    recovery, seen = cut / "checkpoints/recovery.safetensors", [0]

    def anew():
        with contextlib.suppress(FileNotFoundError):  # the end of an epoch removes it
            seen.append(recovery.stat().st_mtime_ns)
        return seen[-1] > seen[0]

    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        process = Process(*common, "-o", cut, "--resume", "auto")
        process.until(anew)
        process.send(number)
        done = process.end()
        assert done.returncode == code and "Traceback" not in done.stderr
        seen[:] = [recovery.stat().st_mtime_ns]
    nulsq(*common, "-o", cut, "--resume", "auto", "-q")
    assert (cut / "export/model.safetensors").read_bytes() == (whole / "export/model.safetensors").read_bytes()
    assert metrics.rows(cut) == metrics.rows(whole)
    # Every second update of the run, and the last one of each epoch: it has 11.
    assert [row["batch"] for row in metrics.steps(cut)] == [2, 4, 6, 8, 10, 11, 1, 3, 5, 7, 9, 11]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_training_is_a_sentence_with_its_exit_code(tmp_path, number, code):
    command, log = ["finetune", "quickstart", *FAST, "-o", tmp_path / "r"], tmp_path / "r/train.log"
    process = Process(*command)
    process.until(lambda: log.exists() and "Quantizing" in log.read_text())
    process.send(number)
    done = process.end()
    assert done.returncode == code and done.stderr.startswith("error: interrupted") and done.stderr.count("\n") == 2
    assert "--resume auto" in done.stderr
    nulsq(*command, "--resume", "auto", "-q")


def test_run_folders_are_protected(run):
    folder, _, _ = run
    refused("finetune", "quickstart", "-o", folder, code=2, words="already holds a run")
    refused("finetune", "quickstart", "--bits", "3/3", "-o", folder, "--resume", "auto", code=2, words="another plan")
    refused("finetune", "quickstart", "--resume", "nowhere", code=3, words="no run to resume")


def test_bad_arguments_end_in_a_sentence(tmp_path):
    (tmp_path / "bad.pth").write_bytes(b"garbage")
    common = ["-o", tmp_path / "r"]
    for words, code, arguments in (
        ("no recipe called 'quikstart'", 2, ["quikstart"]),
        ("bits must be WEIGHTS/ACTIVATIONS", 2, ["--bits", "3"]),
        ("bits must be 2..8", 2, ["--bits", "1/3"]),
        ("bits must be 2..8", 2, ["--bits", "9/9"]),
        ("must be weight bits/activation bits", 2, ["--bits", "3:3"]),
        ("did you mean 'nulsq-wa'", 2, ["--method", "nulsq-waa"]),
        ("unknown key 'quant.bit'", 2, ["quickstart", "quant.bit=3"]),
        ("resnet18", 2, ["--model", "resnet1888", "--data-dir", tmp_path]),
        ("bad.pth", 3, ["quickstart", "--initial-checkpoint", tmp_path / "bad.pth"]),
        ("no such checkpoint", 3, ["quickstart", "--initial-checkpoint", tmp_path / "none.pth"]),
        ("--data-dir", 3, ["--model", "resnet8_cifar", "--no-pretrained"]),
        ("matches no layer", 2, ["quickstart", "quant.rules=[{match: nothing.*}]"]),
        ("optimizer 'no_such'", 2, ["quickstart", "--opt", "no_such"]),
        ("optimizer 'no_such'", 2, ["quickstart", "--steps-opt", "no_such"]),
        ("schedule 'no_such'", 2, ["quickstart", "--sched", "no_such"]),
        ("do not fill one batch of 5000", 3, ["quickstart", "-b", 5000]),
        ("cannot be used", 2, ["quickstart", "--device", "cuda:77"]),
    ):
        refused("finetune", *arguments, *common, code=code, words=words)
    assert not (tmp_path / "r").exists(), "a mistake left a run behind, and mending it needs another folder"
    refused("eval", code=2, words="name one thing")
    refused("eval", tmp_path / "none", code=3, words="does not exist")
    refused("ls", "dragons", code=2, words="cannot list")


@pytest.mark.parametrize(("what", "name"), [("recipes", "quickstart"), ("methods", "lq-nets"), ("stabilizers", "freezing"),
                                            ("schemes", "profit")])  # fmt: skip
def test_what_there_is_can_be_listed(what, name):
    assert name in nulsq("ls", what).stdout
    assert name in [next(iter(row.values())) for row in json.loads(nulsq("ls", what, "--json").stdout)[what]]


def test_divergence_ends_with_4_and_keeps_the_checkpoint(tmp_path):
    refused("finetune", "quickstart", "--lr", "1e30", "-o", tmp_path / "r", code=4, words="diverged")
    assert (tmp_path / "r/checkpoints/last.safetensors").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_a_sentence(tmp_path):
    tmp_path.chmod(0o500)
    refused("finetune", "quickstart", "-o", tmp_path / "r", code=3, words="cannot be written")


def folder_of_images(root: Path, splits=("train", "val"), classes=("cat", "dog"), count=6) -> Path:
    torch.manual_seed(0)
    for split in splits:
        for c in classes:
            (root / split / c).mkdir(parents=True)
            for k in range(count):
                pixels = torch.randint(0, 255, (32, 32, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(root / split / c / f"{k}.png")
    return root


def test_a_timm_model_on_a_folder_of_images(tmp_path):
    data = folder_of_images(tmp_path / "data")
    flags = ["--model", "resnet20_cifar", "--no-pretrained", "--num-classes", 2, "--data-dir", data, "-b", 4, "--epochs", 1,
             "-j", 0, "--mean", 0.5, 0.5, 0.5, "--std", 0.2, 0.2, 0.2, "--bits", "3/4", "--method", "nulsq-a"]  # fmt: skip
    done = json.loads(nulsq("finetune", *flags, "-o", tmp_path / "r", "--json").stdout)
    assert done["bits"] == "3/4" and json.loads(nulsq("eval", done["artifact"], "--json").stdout)["samples"] == 12

    (data / "train/cat/0.png").write_bytes(b"not an image")
    refused("finetune", *flags, "-o", tmp_path / "r2", code=3, words="0.png")
    shutil.rmtree(data / "val/dog")
    refused("finetune", *flags, "-o", tmp_path / "r3", code=3, words="dog")
    refused("finetune", *flags, "--data-dir", tmp_path / "none", "-o", tmp_path / "r4", code=3, words="none")


def test_the_small_commands(run, tmp_path):
    folder, _, _ = run
    assert "quickstart" in nulsq("ls", "recipes").stdout
    promised = {"nulsq-a", "nulsq-w", "nulsq-wa", "lsq", "pact", "dorefa", "apot", "lq-nets", "lcq", "uniq", "llsq", "ewgs"}
    assert promised <= {m["method"] for m in json.loads(nulsq("ls", "methods", "--json").stdout)["methods"]}
    assert "resnet20_cifar" in nulsq("ls", "models", "cifar").stdout
    assert "2/2" in nulsq("ls", "runs", folder.parent).stdout
    nulsq("cp", "quickstart", tmp_path / "mine.yaml")
    assert "fine" in nulsq("validate", tmp_path / "mine.yaml").stdout
    refused("cp", "quickstart", tmp_path / "mine.yaml", code=3, words="exists already")
    assert "extends" in nulsq("cat", "quickstart").stdout and "extends" not in nulsq("cat", "quickstart", "--resolved").stdout
    assert "quickstart.yaml:" in nulsq("cat", "quickstart", "--resolved", "--origin").stdout
    assert "properties" in json.loads(nulsq("validate", "--schema").stdout)
    assert json.loads(nulsq("doctor", "--json").stdout)["torch"]
    assert nulsq("--version").stdout.startswith("nulsq ")
    plan = json.loads(nulsq("plan", "imagenet", "--model", "resnet18", "--bits", "3/3", "--json").stdout)
    assert plan["layers"][0]["reason"] == "first layer" and plan["packed_bytes"] < plan["float_bytes"] / 8
    dry = json.loads(nulsq("finetune", "quickstart", "--dry-run", "-o", tmp_path / "dry", "--json").stdout)
    assert dry["dry_run"] and not (tmp_path / "dry").exists()


def test_every_command_takes_what_all_take():
    for name, command in typer.main.get_command(app).commands.items():
        spelled = {option for parameter in command.params for option in parameter.opts}
        assert {"-q", "--quiet", "-v", "--verbose", "--no-color"} <= spelled, name


def test_flags_with_several_values_take_them_as_timm_does():
    line = ["finetune", "--mean", "0.5", "-1", "1e-3", "quickstart", "--std", "0.2", "--lr", "0.1", "--mean"]
    assert together(line) == ["finetune", "--mean", "0.5 -1 1e-3", "quickstart", "--std", "0.2", "--lr", "0.1", "--mean"]
    assert numbers("--mean", "0.5 -1 1e-3") == [0.5, -1, 0.001] and numbers("--mean", None) is None
    refused("plan", "quickstart", "--mean", "red", code=2, words="--mean takes a number for each channel")
    assert json.loads(nulsq("plan", "quickstart", "--mean", "0.5", "--std", "0.2", "--json").stdout)["layers"]


def test_verbose_adds_the_traceback():
    done = Process("finetune", "quikstart", "-v").end()
    assert done.returncode == 2 and "Traceback" in done.stderr and "error: no recipe called" in done.stderr


def without_torch(arguments):
    """A command in a process that says at its end whether it loaded torch."""
    code = f"import sys; sys.argv = ['nulsq', *{arguments!r}]\nimport atexit\n" \
           "atexit.register(lambda: print('LOADED' if {'torch', 'timm'} & set(sys.modules) else 'CLEAN'))\n" \
           "from nulsq_cli.cli import main; main()"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("CLEAN"), done.stdout[-300:] + done.stderr
    return done


@pytest.mark.parametrize(
    "arguments", [["--help"], ["validate", "quickstart"], ["ls", "recipes"], ["ls", "methods"], ["finetune", "--help"]]
)
def test_quick_commands_never_load_torch(arguments):
    assert without_torch(arguments).returncode == 0


def test_what_no_method_can_do_is_refused_before_torch_is_loaded(tmp_path):
    (tmp_path / "bad.yaml").write_text("extends: [quickstart]\nquant: {method: apot, bits: 7/7}\nscheme: {name: qkd}\n")
    done = without_torch(["validate", str(tmp_path / "bad.yaml")])
    assert done.returncode == 2
    assert "apot has activations of at most 6 bits" in done.stderr and "qkd needs a teacher" in done.stderr
