"""Every shipped recipe is right, says what it is for, and quotes the paper exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nulsq_cli import recipe, session
from nulsq_cli.convert import make_plan
from nulsq_cli.errors import suggest
from nulsq_cli.methods import METHODS
from nulsq_cli.models import create_float_model

NAMES = [name for name, _ in recipe.shipped()]

# The poster's table -> the recipe that carries its rows. Bits that are not printed are inferred (see the recipes).
TABLES = {
    "imagenet-mobilenetv2": ("imagenet_mobilenetv2", None),
    "imagenet-resnet18": ("imagenet_resnet18", "2/2"),
    "cifar100-resnet20": ("cifar100_preresnet20", None),
    "cifar100-resnet56": ("cifar100_preresnet56", None),
    "imagenet-swin-t": ("imagenet_swin_tiny", None),
    "imagenet-convnext": ("imagenet_convnext_tiny", None),
    "imagenet-mobilenetv2-distilled": ("imagenet_mobilenetv2_kd", "4/4"),
}

SCHEMES = {"qkd": "lsq", "profit": "duq"}  # column -> the quantizer of its recipe
# The poster's column of a stabilizer and a width -> the end of the name of the recipe that carries it, and the stabilizer.
STEADY = {
    ("lsq+br", "2/2"): ("_br", "bin-reg"), ("lsq+br", "3/3"): ("_br", "bin-reg"), ("lsq+br", "4/4"): ("_br", "bin-reg"),
    ("lsq+dp/fz", "3/3"): ("_dampening", "dampening"), ("lsq+dp/fz", "4/4"): ("_freezing", "freezing"),
}  # fmt: skip


def test_the_defaults_of_finetune_are_shipped():
    assert {"quickstart", "quickstart-float", "imagenet"} <= set(NAMES)
    assert sorted(NAMES) == NAMES


def test_cifar_has_a_recipe_for_every_depth_and_order_of_activation():
    wanted = {f"cifar{c}_{kind}{depth}": (c, f"{kind}{depth}_cifar")
              for c in (10, 100) for kind in ("resnet", "preresnet") for depth in (20, 56)}  # fmt: skip
    found = {name: recipe.load(name).model for name in NAMES if name.startswith("cifar")}
    assert {name: (model.num_classes, model.name) for name, model in found.items()} == wanted


def test_bases_are_not_listed():
    assert not [name for name in NAMES if "/" in name or name == "cifar"]
    assert suggest("imagene", NAMES) == "did you mean 'imagenet'?"


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_resolves_to_one_that_runs_alone(name, tmp_path):
    r = recipe.load(name)
    assert r.description and "\n" not in r.description
    copy = tmp_path / "copy.yaml"
    copy.write_text(r.to_yaml(), encoding="utf-8")
    assert recipe.load(copy) == r
    assert "extends" not in r.to_yaml()


@pytest.fixture(scope="module")
def networks():
    return {}  # name and classes -> a network with random weights: recipes share them


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_can_be_planned(networks, name):
    r = recipe.load(name)
    m = r.model
    if (key := (m.name, m.num_classes)) not in networks:
        networks[key] = create_float_model(m.name, num_classes=m.num_classes, in_chans=m.in_chans, kwargs=m.kwargs)
    layers = make_plan(networks[key], session.policy(r), session.data_config(r, networks[key])["input_size"]).layers
    if str(r.quant.bits) == "32/32":
        assert not any(p.quantized for p in layers)
    else:
        inner = [p for p in layers if (p.weight_bits, p.input_bits) == (r.quant.bits.weights, r.quant.bits.activations)]
        assert len(inner) > len(layers) / 2 and layers[0].quantized


@pytest.mark.parametrize("name", NAMES)
def test_the_method_and_bits_of_a_reproduction_have_a_published_figure(name):
    r = recipe.load(name)
    if r.published:
        assert (r.quant.bits, r.quant.method) in [(row.bits, row.method) for row in r.published]


def test_the_quickstart_needs_nothing():
    for name in ("quickstart", "quickstart-float"):
        r = recipe.load(name)
        assert (r.data.dataset, r.data.data_dir, r.teacher.name) == ("nulsq/digits", None, None)
        assert r.model.initial_checkpoint is None
    assert str(recipe.load("quickstart-float").quant.bits) == "32/32"


def test_the_released_settings_of_the_authors():
    for name in (n for n in NAMES if n.startswith("cifar")):
        r = recipe.load(name)
        w, s = r.optimizer.weights, r.optimizer.steps
        assert (w.opt, w.lr, w.weight_decay, w.momentum, w.filter_bias_and_bn) == ("momentum", 0.04, 1e-4, 0.9, False)
        assert (s.opt, s.lr, s.weight_decay) == ("adamw", 4e-4, 1e-4)
        assert (r.schedule.sched, r.schedule.epochs) == ("cosine", 300)
        assert (r.schedule.warmup_epochs, r.schedule.warmup_lr, r.schedule.min_lr) == (10, 1e-5, 0)
        assert (r.data.batch_size, r.data.augment.crop_pad, r.data.augment.hflip) == (128, 4, 0.5)
        assert r.data.dataset == f"torch/{name.split('_')[0]}"
        assert r.model.num_classes == int(name.split("_")[0].removeprefix("cifar"))


def test_published_figures_are_the_poster_s(shared: Path):
    """Every row of the poster is in its recipe, with its figure, and nothing else is."""
    tables = json.loads((shared / "poster.json").read_text())["tables"]
    assert {t["id"] for t in tables} == set(TABLES)
    wanted = {}
    for table in tables:
        name, inferred = TABLES[table["id"]]
        for row in table["rows"]:
            for method in METHODS:
                if (figure := row.get(method)) is not None:
                    key = (name, row["bits"] or inferred, method, None, None)
                    wanted[key] = tuple(figure) if isinstance(figure, list) else (figure, None)
            for column in ("lsq+br", "lsq+dp/fz"):
                if (figure := row.get(column)) is not None:
                    end, steady = STEADY[column, row["bits"]]
                    wanted[name + end, row["bits"], "lsq", steady, None] = (figure, None)
            for scheme, quantizer in SCHEMES.items():
                if (figure := row.get(scheme)) is not None:
                    wanted[f"imagenet_mobilenetv2_{scheme}", "4/4", quantizer, None, scheme] = tuple(figure)
    rows = [(name, row) for name in NAMES for row in recipe.load(name).published]
    found = {(name, str(p.bits), p.method, p.stabilizer, p.scheme): (p.top1, p.top5) for name, p in rows}
    assert found == wanted
    figures = sum(value is not None for t in tables for row in t["rows"] for key, value in row.items()
                  if key not in ("bits", "columns"))  # fmt: skip
    assert len(rows) == len(found) == figures  # each of the poster's figures once


def test_the_float_figure_is_quoted_where_there_is_one(shared: Path):
    for table in json.loads((shared / "poster.json").read_text())["tables"]:
        name, _ = TABLES[table["id"]]
        if "distilled" not in table["id"]:
            assert f"{table['float_top1']}" in recipe.load(name).description
