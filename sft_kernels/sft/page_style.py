"""The style sheet of the page that ``inspect`` writes, light and dark."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #f6f5f1; --card: #ffffff; --ink: #1b1d20; --soft: #565c66; --line: #dddad1;
  --kept: #cfeee1; --kept-ink: #07402f; --mark: #0a7a5b; --other: #f1efea; --other-ink: #565c66;
  --advice: #fbeecb; --advice-ink: #6f4500; --failed: #fce2df; --failed-ink: #97191a;
  --first: #0a7a5b; --second: #63b99d; --padding: #a39e92;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #121417; --card: #1a1d21; --ink: #ebe9e4; --soft: #a9afb9; --line: #33373e;
    --kept: #143d31; --kept-ink: #b9f4de; --mark: #46c79d; --other: #23272c; --other-ink: #a9afb9;
    --advice: #3a2d11; --advice-ink: #f5c56d; --failed: #451e1d; --failed-ink: #ffaaa2;
    --first: #46c79d; --second: #23785d; --padding: #6d727b;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  -webkit-text-size-adjust: 100%; overflow-wrap: anywhere;
}
main, footer { max-width: 70rem; margin: 0 auto; padding: 0 clamp(1rem, 4vw, 2.5rem); }
main { padding-top: clamp(1.5rem, 5vw, 3.5rem); }
code, .tokens { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono",
  monospace; }
code { font-size: .9em; }
h1, h2, h3, p, dl, dd, ul, figure, fieldset { margin: 0; padding: 0; }
h1 { font-size: clamp(1.6rem, 4.5vw, 2.5rem); line-height: 1.15; letter-spacing: -.02em;
  text-wrap: balance; }
h2 { font-size: 1.35rem; letter-spacing: -.01em; margin-top: 3.25rem; }
h3 { font-size: 1rem; }
h2 + p, h1 + p { color: var(--soft); max-width: 46rem; margin-top: .4rem; }
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: .75rem;
  padding: clamp(.9rem, 3vw, 1.5rem); margin-top: 1.1rem;
}
.soft { color: var(--soft); }
.small { font-size: .85rem; }

.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr));
  gap: 1.1rem 1.5rem; }
.numbers dt { color: var(--soft); font-size: .85rem; }
.numbers dd { font-size: 1.5rem; line-height: 1.25; font-variant-numeric: tabular-nums;
  letter-spacing: -.01em; }
.numbers dd small { display: block; font-size: .85rem; letter-spacing: 0; color: var(--soft); }
.share { display: block; height: .4rem; margin-top: .45rem; border-radius: .2rem;
  background: var(--other);
  border: 1px solid var(--line); overflow: hidden; }
.share span { display: block; height: 100%; background: var(--mark); }

.findings { list-style: none; }
.findings li { display: grid; grid-template-columns: 5.6rem 1fr; gap: .1rem .9rem; padding: .6rem 0;
  border-top: 1px solid var(--line); }
.findings li:first-child { border-top: 0; padding-top: 0; }
.findings li:last-child { padding-bottom: 0; }
.level { justify-self: start; align-self: start; padding: .1rem .55rem; border-radius: 1rem;
  font-size: .85rem;
  font-weight: 600; }
.ok { background: var(--kept); color: var(--kept-ink); }
.advice { background: var(--advice); color: var(--advice-ink); }
.failed { background: var(--failed); color: var(--failed-ink); }
.verdict { font-weight: 600; border-radius: .5rem; padding: .5rem .8rem; margin-bottom: 1rem; }

fieldset { position: relative; border: 0; min-width: 0; display: grid; gap: .5rem;
  grid-template-columns: repeat(3, minmax(0, 1fr)); }
legend { padding: 0 0 .4rem; font-size: .85rem; color: var(--soft); }
fieldset input { position: absolute; opacity: 0; pointer-events: none; }
fieldset label { border: 1px solid var(--line); border-radius: .55rem; padding: .45rem .75rem;
  cursor: pointer;
  display: flex; flex-direction: column; background: var(--other); }
fieldset label code { font-weight: 600; }
fieldset label span { font-size: .85rem; color: var(--soft); }
fieldset input:checked + label { background: var(--card); border-color: var(--mark);
  box-shadow: inset 0 -3px 0 var(--mark); }
fieldset input:checked + label code::before { content: "● "; color: var(--mark); }
fieldset input:not(:checked) + label code::before { content: "○ "; color: var(--soft); }
fieldset input:focus-visible + label { outline: 3px solid var(--mark); outline-offset: 2px; }
.view { grid-column: 1 / -1; display: none; min-width: 0; margin-top: .5rem; }
input:nth-of-type(1):checked ~ .view:nth-of-type(1),
  input:nth-of-type(2):checked ~ .view:nth-of-type(2),
input:nth-of-type(3):checked ~ .view:nth-of-type(3) { display: block; }
.example h3 { margin-bottom: .7rem; }
.refused { padding: .7rem .9rem; border-radius: .5rem; margin-top: .6rem; }
.tokens {
  font-size: .86rem; line-height: 2; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
  margin-top: .7rem; padding: .6rem .8rem; border: 1px solid var(--line); border-radius: .5rem;
  max-height: 36rem; overflow: hidden auto;
}
.tokens:focus-visible { outline: 3px solid var(--mark); outline-offset: 2px; }
bdi { background: var(--other); color: var(--other-ink); border-radius: 3px; padding: .18em 1px;
  margin: 0 .5px;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
bdi.k { background: var(--kept); color: var(--kept-ink); border-bottom: 2px solid var(--mark); }
bdi.s { font-weight: 600; border-radius: .7em; padding-inline: .35em;
  outline: 1px solid var(--line);
  outline-offset: -1px; }
bdi i { background: radial-gradient(circle at 50% 55%, var(--padding) 0 .07em, transparent .1em); }
bdi b { font-weight: 400; font-size: .85em; padding: 0 .15em; border-radius: 2px;
  background: var(--card); color: var(--soft); }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: .7rem 0; }

.curve { margin: 1.6rem 0 0; }
.plot { position: relative; height: 13rem; border-bottom: 1px solid var(--line); }
.plot svg, .rows svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
path { fill: none; vector-effect: non-scaling-stroke; }
.rate { stroke: var(--mark); stroke-width: 2.5px; stroke-linejoin: round; }
.dot { stroke: var(--mark); stroke-width: 10px; stroke-linecap: round; }
.guide { stroke: var(--padding); stroke-width: 1px; stroke-dasharray: 4 4; }
.at { position: absolute; font-size: .85rem; line-height: 1.2; color: var(--soft);
  background: var(--card);
  padding: .1rem .3rem; }
.ends { display: flex; justify-content: space-between; gap: 1rem; font-size: .85rem;
  color: var(--soft);
  padding-top: .35rem; font-variant-numeric: tabular-nums; }
.ends span + span { text-align: right; }

.two { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 1.1rem;
  align-items: start; }
.two .numbers { margin-top: .7rem; grid-template-columns: 1fr 1fr; }
.rows { position: relative; margin-top: .9rem; }
.rows + .rows { margin-top: .6rem; }
.first { stroke: var(--first); } .second { stroke: var(--second); }
.padding { stroke: var(--padding); stroke-width: 2px; stroke-dasharray: 2 4; }
.swatch { display: inline-block; width: 1.6rem; height: .7rem; border-radius: 2px;
  margin-right: .4rem; }
.swatch.tokens-of { background: linear-gradient(90deg, var(--first) 50%, var(--second) 50%); }
.swatch.filled { height: 0; border-top: 2px dashed var(--padding); border-radius: 0;
  vertical-align: middle; }
footer { padding-top: 3rem; padding-bottom: 3rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 46rem) {
  .two, fieldset { grid-template-columns: minmax(0, 1fr); }
  .findings li { grid-template-columns: 1fr; }
}
"""
