"""docs/methods.md is what the code says today."""

from __future__ import annotations

import sys
from pathlib import Path

from nulsq_cli.methods import METHODS
from nulsq_cli.methods.notes import NOTES
from nulsq_cli.schemes import SCHEMES
from nulsq_cli.stabilizers import STABILIZERS

ROOT = Path(__file__).parents[1]


def test_the_page_is_up_to_date_and_has_every_method(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import methods_page

    assert set(NOTES) <= set(METHODS)
    wanted = methods_page.page()
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == wanted, "python tools/methods_page.py > docs/methods.md"
    for name, line in METHODS.items():
        section = wanted.split(f"## {name}\n")[1].split("\n## ")[0]
        for word in ("formula", "gradient", "learned", "start", "checked against"):
            assert f"\n- {word}: " in section, (name, word)
        for option in line.options:
            assert f"\n- `{option}`" in section, (name, option)
    for name in (*STABILIZERS, *SCHEMES):
        assert name == "plain" or "\n- equation: " in wanted.split(f"### {name}\n")[1].split("\n### ")[0]
    sys.modules.pop("methods_page")
