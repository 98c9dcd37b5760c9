"""What `tools/fuzz.py` attacks: whole files to start from, and the readers that are given damaged ones."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damage
import damage_recipes
import torch

from nulsq_cli import artifact, calibrate, recipe, session
from nulsq_cli.convert import convert, make_plan, with_signs
from nulsq_cli.files import write_json, write_text
from nulsq_cli.models import create_float_model
from nulsq_cli.report import entropy
from nulsq_cli.training import checkpoint
from nulsq_cli.training.engine import State
from nulsq_cli.training.optim import Pair
from nulsq_cli.training.world import World

CPU = World(0, 1, torch.device("cpu"))


def make_run(folder: Path, changes: list[str]) -> session.Run:
    """A run folder as `finetune` leaves it, but that nothing was trained: one update on noise."""
    r = recipe.load("quickstart", overrides=changes)
    torch.manual_seed(0)
    model = create_float_model(r.model.name, num_classes=10, in_chans=1, kwargs=r.model.kwargs)
    config = session.data_config(r, model)
    images = torch.randn(4, *config["input_size"])
    plan = make_plan(model, session.policy(r), config["input_size"])
    write_json(folder / "model.json", session.describe_model(model, config))
    stats = calibrate.measure_inputs(model, calibrate.layers_to_measure(plan), lambda: [(0, images)], 1)
    plan = with_signs(plan, {name: bool(s.least[0] < 0) for name, s in stats.items()}, session.policy(r))
    convert(model, plan)
    calibrate.initialize(model, stats, "lsq", "lsq")
    write_json(folder / "plan.json", plan.to_json())
    write_text(folder / "recipe.yaml", r.to_yaml())
    state = make_state(model, r, folder)
    state.model.train()(images).square().sum().backward()
    for optimizer in state.pair.optimizers.values():
        optimizer.step()
    state.progress.updates = 1
    state.progress.best = {"top1": 9.0, "top5": 50.0, "loss": 2.0, "epoch": 0}
    state.progress.rows = [{"epoch": 0, "eval_loss": 2.0, "eval_top1": 9.0, "eval_top5": 50.0, "note": None}]
    state.progress.steps = [{"epoch": 0, "batch": 50, "batches": 50, "train_loss": 2.0}]
    (folder / "checkpoints").mkdir()
    for name in ("last", "best"):
        state.save(name)
    info = json.loads((folder / "model.json").read_text())
    arguments = info["arguments"]
    meta = {"arch": info["architecture"], "arch_kwargs": {k: v for k, v in arguments.items() if k != "num_classes"},
            "num_classes": arguments["num_classes"], "data_cfg": info["data_cfg"], "bits": str(r.quant.bits),
            "method": r.quant.method,
            "counts": entropy.count_activations(model.eval(), [images]), "recipe": r.to_yaml()}  # fmt: skip
    artifact.save(folder / "model.safetensors", model, meta)
    return session.read_run(folder)


def make_state(model: torch.nn.Module, r: recipe.Recipe, folder: Path) -> State:
    """The state of a run of this recipe."""
    pair = Pair(model, r.optimizer.weights.model_dump(), r.optimizer.steps.model_dump(), r.schedule.model_dump(), 2, 10)
    return State(model, pair, CPU, folder / "checkpoints", ema_decay=0.9 if r.ema.enabled else None, images=16)


BASES = {"plain": ["quant.first_last.bits=2/2", "ema.enabled=true"],
         "other": ["model.name=test_vit", "data.input_size=[1,32,32]",
                   "model.kwargs={img_size: 32, depth: 1, embed_dim: 8, num_heads: 1}",
                   "quant.granularity=channel", "quant.bits=4/8", "quant.rules=[{match: '*qkv', bits: 32/3}]"]}  # fmt: skip


class Target:
    """Draws damaged files and gives them to the code that reads such files.

    Args:
        work: a folder for this process.
    """

    def __init__(self, work: Path) -> None:
        self.work = work

    def write(self, rng: random.Random) -> Any:
        """Draw a case and put its files into `work`."""
        raise NotImplementedError

    def read(self, case: Any) -> None:
        """What the project does with it. It may fail in its own way only."""
        raise NotImplementedError


class Tensors(Target):
    """What artifacts and checkpoints have in common: tensors, and one note in JSON that holds their checksum."""

    kept = ("model.safetensors",)
    """Files of the run folder that are a start."""

    def __init__(self, work: Path) -> None:
        super().__init__(work)
        self.runs, self.starts = [], []
        for name, changes in BASES.items():
            (folder := work / name).mkdir()
            self.runs.append(make_run(folder, changes))
            self.starts += [(folder / file).read_bytes() for file in self.kept]

    def digest(self, pieces: list[damage.Piece], note: dict[str, Any]) -> str:
        """The checksum that the reader expects."""
        raise NotImplementedError

    def damaged(self, rng: random.Random) -> bytes:
        """Bytes damaged without care, or a file that is well-formed and lies."""
        start = rng.choice(self.starts)
        if rng.random() < 0.25:
            return damage.flipped(start, rng)
        pieces, text = damage.unpack(start)
        note, twist = json.loads(text), None
        kind = rng.randrange(10)
        if kind < 5:
            note = self.note_edited(note, rng)
        elif kind < 8:
            pieces = damage.pieces_changed(pieces, rng)
        elif kind < 9:
            twist = damage.header_twisted(rng)
        else:
            note, pieces = self.note_edited(note, rng), damage.pieces_changed(pieces, rng)
        if isinstance(note, dict) and rng.random() < 0.95:
            note["sha256"] = self.digest(pieces, note)
        return damage.pack(pieces, damage.written(note, rng), twist)

    def note_edited(self, note: Any, rng: random.Random) -> Any:
        """The note with some values changed."""
        return damage.edited(note, rng)


class Artifacts(Tensors):
    """`artifact.load`, `eval`'s way to it, and the entropies."""

    def digest(self, pieces: list[damage.Piece], note: dict[str, Any]) -> str:
        """As docs/format.md says."""
        total = hashlib.sha256()
        for piece in sorted({p.name: p for p in pieces}.values(), key=lambda p: p.name):
            total.update(piece.name.encode("utf-8", "replace") + b"\0" + piece.content)
        return total.hexdigest()

    def note_edited(self, note: Any, rng: random.Random) -> Any:
        """Also with architectures and arguments of the worst kind."""
        if rng.random() < 0.5:
            return damage.edited(note, rng)
        if rng.random() < 0.4:
            note["arch"] = rng.choice(damage.MODELS)
        for key, value in rng.sample(list(damage.ARGUMENTS.items()), rng.choice([0, 1, 1, 2])):
            note["arch_kwargs"][key] = value
        if rng.random() < 0.2:
            note["num_classes"] = damage.nasty(rng)
        return note

    def write(self, rng: random.Random) -> Path:
        """One file."""
        path = self.work / "case.safetensors"
        path.write_bytes(self.damaged(rng))
        return path

    def read(self, case: Path) -> None:
        """As `nulsq eval` and `nulsq entropy` do."""
        read = artifact.read(case)
        entropy.of_artifact(read)
        session.target_model(str(case))


class Checkpoints(Tensors):
    """The run that goes on, and the run that is read back."""

    kept = ("checkpoints/last.safetensors",)

    def digest(self, pieces: list[damage.Piece], note: dict[str, Any]) -> str:
        """As `checkpoint.save` makes it."""
        names = {"F32": "torch.float32", "I64": "torch.int64", "U8": "torch.uint8", "F64": "torch.float64", "BOOL": "torch.bool"}
        total = hashlib.sha256(json.dumps(note.get("notes")).encode())
        for piece in sorted({p.name: p for p in pieces}.values(), key=lambda p: p.name):
            what = f"\0{piece.name}\0{names.get(piece.dtype, piece.dtype)}\0{piece.shape}\0"
            total.update(what.encode("utf-8", "replace") + piece.content)
        return total.hexdigest()

    def write(self, rng: random.Random) -> tuple[session.Run, str, int]:
        """A file of a run folder, its checkpoint more often than the others."""
        number = rng.randrange(len(self.runs))
        folder = self.runs[number].folder
        for name in ("model.json", "plan.json", "recipe.yaml"):
            kept = folder / f"{name}.kept"
            if not kept.exists():
                kept.write_bytes((folder / name).read_bytes())
            (folder / name).write_bytes(kept.read_bytes())
        chosen = rng.choice(["last"] * 5 + ["best", "model.json", "plan.json"])
        starts, self.starts = self.starts, [self.starts[number]]
        if chosen.endswith("json"):
            tree = json.loads((folder / chosen).read_text())
            if chosen == "model.json" and rng.random() < 0.5:
                tree["architecture"] = rng.choice(damage.MODELS)
                tree["arguments"] |= dict(rng.sample(list(damage.ARGUMENTS.items()), rng.randint(0, 2)))
            else:
                tree = damage.edited(tree, rng)
            (folder / chosen).write_text(damage.written(tree, rng))
            (folder / "checkpoints/best.safetensors").write_bytes(self.starts[0])
        else:
            (folder / f"checkpoints/{chosen}.safetensors").write_bytes(self.damaged(rng))
        self.starts = starts
        return self.runs[number], chosen, number

    def read(self, case: tuple[session.Run, str, int]) -> None:
        """As `finetune --resume` does with `last`, and `export` with the rest."""
        run, chosen, number = case
        if chosen != "last":
            session.target_model(str(run.folder))
            return
        saved = checkpoint.Saved(path := run.folder / "checkpoints/last.safetensors", *checkpoint.load(path))
        self.fresh(number).restore(saved)

    def fresh(self, number: int) -> State:
        """A state to put a checkpoint into."""
        run = self.runs[number]
        info = json.loads((run.folder / "model.json").read_text())
        model = convert(create_float_model(info["architecture"], kwargs=info["arguments"]), run.plan)
        return make_state(model, run.recipe, run.folder)


class Recipes(Target):
    """`nulsq validate`, `cat --resolved` and the flags of every command."""

    def write(self, rng: random.Random) -> damage_recipes.Case:
        """Some files."""
        case = damage_recipes.draw(rng)
        for name, content in case.files.items():
            (self.work / name).write_bytes(content)
        return case

    def read(self, case: damage_recipes.Case) -> None:
        """Whatever can be read can be written and read again."""
        path = self.work / next(iter(case.files))
        found = recipe.load(path, overrides=case.overrides, flags=case.flags)
        assert recipe.loads(found.to_yaml()) == found
        recipe.origins(path, overrides=case.overrides, flags=case.flags)


TARGETS: dict[str, Callable[[Path], Target]] = {"artifact": Artifacts, "checkpoint": Checkpoints, "recipe": Recipes}
