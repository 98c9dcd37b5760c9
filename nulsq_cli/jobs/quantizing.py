"""From a float model to one whose quantizers have started, and the check that a resumed run means the same."""

from __future__ import annotations

from typing import Any

from torch import nn

from nulsq_cli import calibrate, recipe, session
from nulsq_cli.convert import Plan
from nulsq_cli.errors import UsageError
from nulsq_cli.training.world import World


def quantize(r: recipe.Recipe, model: nn.Module, plan: Plan, splits: session.Splits, world: World, show: Any, *,
             before: nn.Module | None = None) -> Plan:  # fmt: skip
    """Convert the model in place, start its steps from statistics and re-estimate BatchNorm.

    Args:
        r: the recipe.
        model: the float model.
        plan: what becomes of each layer.
        splits: the images.
        world: the processes.
        show: for people.
        before: the same model at other widths, whose steps go on where the width is the same or makes no difference;
            the signs are then as the plan says, else as the images say.

    Returns:
        The plan, with the signs.
    """
    q = r.quant
    passes, norm_passes = (session.chunks(splits.train, splits.eval_transform, samples, world, r) if samples else None
                           for samples in (q.calibration.samples, r.bn.reestimate_samples))  # fmt: skip
    plan, norms = calibrate.quantize(model, plan, session.policy(r), passes, (q.init.weights, q.init.activations), norm_passes,
                                     world.reduce, before)  # fmt: skip
    if before is None:
        show.plan(plan.to_json())
    show.say(f"  steps started from {min(q.calibration.samples, len(splits.train))} images"
             f" ({q.init.weights} weights, {q.init.activations} activations), {norms} BatchNorms re-estimated")  # fmt: skip
    return plan


def same_run(now: Plan, stored: Plan, r: recipe.Recipe, before: recipe.Recipe) -> None:
    """A resumed run keeps its plan, its stabilizers and its phases; signs that were measured are the stored ones.

    Raises:
        UsageError: something of it differs; it says what.
    """
    key = lambda p: (p.weight_bits, p.input_bits, p.granularity, p.method, p.shape, p.grid)  # noqa: E731
    old, new = {p.name: key(p) for p in stored.layers}, {p.name: key(p) for p in now.layers}
    changed = sorted(n for n in old.keys() | new.keys() if old.get(n) != new.get(n))
    if changed or now.options != stored.options:
        listed = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        raise UsageError(f"the run was made with another plan; it differs in {listed or 'the method options'}",
                         fix="resume with the bits, method, grid and rules of the run, or start a new one with -o")  # fmt: skip
    declared = [(x.quant.signed, [(rule.match, rule.signed) for rule in x.quant.rules if rule.signed is not None])
                for x in (before, r)]  # fmt: skip
    if declared[0] != declared[1]:
        raise UsageError("the run was made with other signs, in quant.signed or the rules",
                         fix="resume with the quant.signed and quant.rules of the run, or start a new one with -o")  # fmt: skip
    if before.quant.stabilizers != r.quant.stabilizers:  # what they remember was counted under their options
        names = ", ".join(s.name for s in before.quant.stabilizers) or "none"
        raise UsageError(f"the run was made with other stabilizers, or other options of them ({names})",
                         fix="resume with the quant.stabilizers of the run, or start a new one with -o")  # fmt: skip
    if before.scheme_name != r.scheme_name or before.scheme.options != r.scheme.options:
        raise UsageError(f"the run was made with another scheme, or other options of it ({before.scheme_name})",
                         fix="resume with the scheme of the run, or start a new one with -o")  # fmt: skip
