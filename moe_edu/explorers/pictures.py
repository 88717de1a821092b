"""Draw each explorer's first state as a picture: `python -m moe_edu.explorers.pictures [NAME ...]`.

Pages that run no scripts, such as GitHub's, show these. Needs playwright and Chromium or Chrome.
"""

from __future__ import annotations

import sys
from typing import Any

from moe_edu.explorers.explorer import STATIC, bundle
from moe_edu.explorers.registry import NAMES, get
from moe_edu.system.browser import open_browser

PICTURES = STATIC / "pictures"


def draw_picture(page: Any, name: str) -> str:
    """The SVG of the first state of explorer `name`, drawn in a Playwright page."""
    explorer = get(name)
    page.set_content("<div></div>")
    script = f"""([spec, state]) => {{
      {bundle(name)}
      const root = document.querySelector("div");
      mount(root, explorer, spec, state);
      return snapshot(root.querySelector("svg"));
    }}"""
    picture: str = page.evaluate(script, [explorer.spec(), explorer.state()])
    return picture + "\n"


def main(names: list[str]) -> None:
    PICTURES.mkdir(exist_ok=True)
    with open_browser() as browser:
        page = browser.new_page()
        for name in names or NAMES:
            path = PICTURES / f"{name}.svg"
            path.write_text(draw_picture(page, name), encoding="utf-8")
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
