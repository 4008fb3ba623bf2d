"""Pages in a real browser: headless Chromium, where one is installed."""

import html
import json
import re
import shutil
import subprocess

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(_NAMES)} is on the path")
WIDTHS = (360, 1280)

# Frames of one file share their origin, so this script may look into them; the page's own policy stays in force there.
_OUTER = """<!doctype html><meta charset="utf-8">
<style>:root { color-scheme: light dark } iframe { height: 900px }</style>
%s<pre id="found"></pre><script>%s
addEventListener("load", () => {
  const frames = [...document.querySelectorAll("iframe")].map(frame => look(frame.contentWindow));
  document.getElementById("found").textContent = JSON.stringify(frames);
});</script>"""

_LOOK = r"""
function rgb(text) {
  const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number);
  return {channels: [r, g, b], opacity: a};
}
function luminance({channels}) {
  const [r, g, b] = channels.map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(a, b) {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
}
function look(view) {
  const page = view.document, style = e => view.getComputedStyle(e);
  const background = e => {
    while (e && rgb(style(e).backgroundColor).opacity === 0) e = e.parentElement;
    return e ? rgb(style(e).backgroundColor) : null;
  };
  const seen = e => e.getClientRects().length > 0;
  const contrasts = {};
  const measure = () => {
    for (const e of page.body.querySelectorAll("*")) {
      const words = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
      if (!words || !seen(e) || e.closest("svg")) continue;
      const kind = [e.tagName.toLowerCase(), ...e.classList].join(".") + " in " + e.parentElement.tagName.toLowerCase();
      const ratio = contrast(rgb(style(e).color), background(e));
      contrasts[kind] = Math.min(ratio, contrasts[kind] ?? 99);
    }
  };
  const first = [...page.querySelectorAll("input:checked")].map(e => e.id);
  const modes = [];
  for (const input of page.querySelectorAll("input")) {
    page.querySelector(`label[for="${input.id}"]`).click();
    measure();
    const views = [...input.parentElement.querySelectorAll(".view")].filter(seen);
    const wide = [...page.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > view.innerWidth);
    modes.push({
      id: input.id, checked: page.querySelectorAll(`[name="${input.name}"]:checked`).length,
      views: views.length, words: views[0].querySelector("p").innerText,
      tokens: [...views[0].querySelectorAll("bdi")].map(
        e => [e.className, parseFloat(style(e).borderBottomWidth) > 0, e.textContent, e.title]),
      overflow: page.documentElement.scrollWidth - view.innerWidth, wide: wide.map(e => e.outerHTML.slice(0, 80)),
    });
  }
  return {
    width: view.innerWidth, contrasts, modes, first,
    colour: style(page.body).color, background: style(page.body).backgroundColor,
    requests: view.performance.getEntriesByType("resource").map(e => e.name),
  };
}
"""


def look(page, folder, dark):
    """Returns what Chromium shows of the HTML in ``page``, at each of :data:`WIDTHS`, and what it complains about.

    Returns ``(frames, complaints)``. A frame has the contrast of each kind of text, what is shown once each of the
    switches is clicked, and the requests that were made.
    """
    frames = "".join(f'<iframe style="width:{width}px" srcdoc="{html.escape(page)}"></iframe>' for width in WIDTHS)
    outer = folder / "outer.html"
    outer.write_text(_OUTER % (frames, _LOOK), encoding="utf-8")
    command = [
        *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
        *(f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"),
        *("--enable-logging=stderr", "--dump-dom", outer.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-3000:]
    return json.loads(html.unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]
