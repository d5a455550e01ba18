"""The pages point at what they speak of."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]*)(?:#(L\d+)?[^)]*)?\)")
LINKS = [
    (page.relative_to(ROOT), *match.groups())
    for page in (*ROOT.glob("*.md"), *ROOT.glob("*/*.md"))
    for match in LINK.finditer(page.read_text())
    if "://" not in match.group(2)
]


@pytest.mark.parametrize(("page", "text", "target", "line"), LINKS)
def test_links_lead_to_files_and_to_the_lines_of_what_they_name(page, text, target, line):
    path = ROOT / page.parent / target if target else ROOT / page
    assert path.exists()
    if line:
        lines = path.read_text().splitlines()
        definition = re.compile(rf"(def|class) {text}\b")
        (there,) = [number for number, content in enumerate(lines, 1) if definition.match(content)]
        assert line == f"L{there}", f"{text} is at {target}#L{there}"
