"""The style and the few lines of script of the report: inlined, so that the page needs nothing but itself."""

CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --quiet: #616b78; --grid: #e3e7ec; --paper: #ffffff;
  --soft: #f6f7f9;
  --up: #0b6e4f; --down: #b3261e; --warn: #8a5a00; --link: #0a58ca; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --quiet: #9aa4b2; --grid: #2d333c;
  --paper: #14171b;
  --soft: #1c2026; --up: #5fd0a5; --down: #ff8a80; --warn: #f0b850; --link: #7fb2ff; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem; }
p { max-width: 56rem; margin: .4rem 0; }
a { color: var(--link); }
small, .quiet { color: var(--quiet); }
.num, td, .rewards { font-variant-numeric: tabular-nums; }
nav { margin: .8rem 0 0; display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; }

.coverage { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .55rem 1rem; margin: .8rem 0;
  align-items: start; }
.chips { display: flex; flex-wrap: wrap; gap: .35rem; }
.chip { border: 1px solid var(--grid); border-radius: .3rem; padding: 0 .45rem; font-size: .86rem;
  background: var(--soft); }
.chip b { font-weight: 600; margin-left: .25rem; }
b.done { color: var(--up); } .chip.failed, .chip.diverged { border-color: var(--down); }
b.failed, b.diverged { color: var(--down); }
.chip:is(.new, .resumable, .running, .stale) { border-style: dashed; }
b:is(.new, .resumable, .running, .stale) { color: var(--warn); }
.chip small { margin-left: .3rem; }
ul.gaps { margin: .4rem 0; padding-left: 1.1rem; } ul.gaps li { margin: .15rem 0; }

ul.verdict { list-style: none; margin: .3rem 0 .8rem; padding: 0; }
ul.verdict li { padding: .22rem 0 .22rem 1.5rem; position: relative; max-width: 60rem; }
ul.verdict li::before { position: absolute; left: .1rem; font-weight: 700; }
li.up::before { content: "\\25B2"; color: var(--up); } li.down::before { content: "\\25BC"; color: var(--down); }
li.mixed::before { content: "!"; left: .35rem; color: var(--down); } li.flat::before { content: "\\2248";
  color: var(--quiet); } li.none::before { content: "\\25CB"; color: var(--warn); }
ul.verdict b { font-weight: 600; } .whole { white-space: nowrap; }

.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: .4rem 0 .6rem; padding: 0; list-style: none;
  align-items: center; font-size: .92rem; }
.legend li { display: flex; align-items: center; gap: .45rem; }
.legend svg { width: 44px; height: 14px; overflow: visible; }
.legend i { width: 1.5rem; height: .5rem; border-radius: 2px; display: inline-block; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19.5rem), 1fr));
  gap: 1.4rem 1.8rem; margin: .6rem 0; }
figure { margin: 0; break-inside: avoid; }
.plots figure { max-width: 30rem; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .1rem; }
figcaption small { font-weight: 400; display: block; font-size: .82rem; }
svg.plot { width: 100%; height: auto; display: block; }
svg.plot text { font-family: inherit; }

.sheet { margin: .5rem 0; max-width: 64rem; }
.strip { display: grid; grid-template-columns: 12.5rem 1fr; gap: 0 .9rem; align-items: center; padding: .3rem 0;
  break-inside: avoid; }
.strip img, .strip .rewards { width: 100%; max-width: calc(var(--columns) * 8rem); }
.strip img { display: block; } .pixels img { image-rendering: pixelated; }
.strip .name { font-size: .9rem; line-height: 1.35; } .strip .name small { display: block; }
.strip .rewards { grid-column: 2; display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; font-size: .75rem;
  color: var(--quiet); text-align: center; }
.base { border-bottom: 1px solid var(--grid); padding-bottom: .5rem; margin-bottom: .2rem; }
.slider { display: none; align-items: center; gap: .7rem; position: sticky; top: 0; background: var(--paper);
  padding: .4rem 0; z-index: 1; font-size: .92rem; }
.js .slider { display: flex; } .slider input { flex: 1; max-width: 22rem; accent-color: var(--link); height: 1.6rem; }
.slider output { min-width: 6.5rem; }

.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .86rem; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th { font-weight: 600; vertical-align: bottom; background: var(--paper); line-height: 1.25; }
th small { font-weight: 400; display: block; }
.text { text-align: left; } td.wrap { white-space: normal; min-width: 12rem; text-align: left;
  overflow-wrap: anywhere; }
.js th.sort { cursor: pointer; } th.sort:hover { color: var(--link); }
th.sort button { all: unset; cursor: inherit; } th.sort button:focus-visible { outline: 2px solid var(--link); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
table.sortable { font-size: .8rem; } .sortable th, .sortable td { padding: .3rem .38rem; }
tbody tr:hover { background: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: .5rem 0; font-size: .92rem; }
dt { font-weight: 400; } dd { margin: 0; overflow-wrap: anywhere; } dd.wide { max-width: 52rem; }
details { margin: .6rem 0; } summary { cursor: pointer; }

@media (max-width: 640px) {
  body { padding: 1rem .85rem 3rem; } h1 { font-size: 1.4rem; }
  .coverage { grid-template-columns: 1fr; gap: .2rem; } .coverage .chips { margin-bottom: .5rem; }
  .strip { grid-template-columns: 1fr; gap: .15rem; padding: .45rem 0; } .strip .rewards { grid-column: 1;
  font-size: .68rem; }
  .strip .name small { display: inline; margin-left: .4rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; } .slider, nav { display: none !important; }
  .plots { grid-template-columns: repeat(3, 1fr); gap: .8rem; } figcaption { font-size: 8pt; }
  .plots small { font-size: 6.5pt; } h2 { break-after: avoid; } h3 { break-after: avoid; }
  .scroll { overflow: visible; } table { font-size: 6.6pt; } th, td { padding: .12rem .22rem; }
details > * { display: block; }
  a { color: inherit; text-decoration: none; }
}
"""

JS = """
document.documentElement.classList.add('js');
for (const sheet of document.querySelectorAll('.sheet')) {
  const slider = sheet.querySelector('input'), output = sheet.querySelector('output');
  if (!slider) continue;
  const steps = JSON.parse(slider.dataset.steps);
  const rows = [...sheet.querySelectorAll('.strip[data-strips]')].map(row => [row, JSON.parse(row.dataset.strips)]);
  const show = () => {
    const step = steps[slider.value];
    output.textContent = 'step ' + step;
    for (const [row, strips] of rows) {
      const strip = strips.filter(s => s.step <= step).pop() || strips[0];
      row.querySelector('img').src = strip.uri;
      row.querySelector('.at').textContent = 'step ' + strip.step;
      const numbers = row.querySelectorAll('.rewards span');
      strip.rewards.forEach((r, i) => { if (numbers[i]) numbers[i].textContent = r; });
    }
  };
  slider.addEventListener('input', show);
}
for (const table of document.querySelectorAll('table.sortable')) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = head.querySelector('button');
    if (!button) return;
    button.addEventListener('click', () => {
      const sign = head.getAttribute('aria-sort') === 'ascending' ? -1 : 1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute('aria-sort');
      head.setAttribute('aria-sort', sign > 0 ? 'ascending' : 'descending');
      const value = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === '' || y === '') return (x === '') - (y === '');
        const numeric = x - y;
        return sign * (Number.isNaN(numeric) ? x.localeCompare(y) : numeric);
      };
      [...body.rows].sort(compare).forEach(row => body.append(row));
    });
  });
}
"""
