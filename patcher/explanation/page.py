"""The style sheet and the script of the page that explains a patch: what does not depend on the patch."""

from __future__ import annotations

STYLE = """
:root {
  --paper: #fbfbf9; --ink: #1d2024; --soft: #565c64; --line: #d6d8d4; --panel: #f1f2ee; --link: #0b5394;
  --red: #9c1c1c; --red-paper: #fbe6e4; --green: #1b5e2a; --green-paper: #e2f2e1;
  --yellow: #6b4a00; --yellow-paper: #f9efd0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181c; --ink: #e4e6e8; --soft: #a3abb5; --line: #363c44; --panel: #1e2329; --link: #8cc1f5;
    --red: #ffb3ab; --red-paper: #44201e; --green: #a5dcae; --green-paper: #1b3821;
    --yellow: #ecd08a; --yellow-paper: #3b3116;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem clamp(0.75rem, 3vw, 2.5rem) 4rem; max-width: 92rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif;
}
code, table.code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
code { font-size: 0.92em; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; margin: 0.5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 0.6rem; }
h3 { font-size: 1.05rem; margin: 0 0 0.3rem; }
p { margin: 0.3rem 0; overflow-wrap: anywhere; }
a { color: var(--link); }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0.25rem 1.2rem; margin: 0.6rem 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
ul { margin: 0.3rem 0; padding-left: 1.3rem; }
li { overflow-wrap: anywhere; }
ul.names { columns: 16rem; }
.verdict { display: inline-block; padding: 0.3rem 0.8rem; border-radius: 0.4rem; background: var(--panel); }
.verdict.good { background: var(--green-paper); color: var(--green); }
.verdict.bad { background: var(--red-paper); color: var(--red); }
.tag {
  display: inline-block; padding: 0 0.5rem; border-radius: 0.3rem; background: var(--panel);
  border: 1px solid var(--line); font-size: 0.85rem; font-weight: 600;
}
article { padding: 0.8rem 1rem; margin: 0.8rem 0; border: 1px solid var(--line); border-radius: 0.5rem; }
.finding { border-left-width: 0.4rem; }
.refuses { border-left-color: var(--red); }
.warns, .lifted { border-left-color: var(--yellow); }
.refuses .tag { background: var(--red-paper); color: var(--red); }
.warns .tag, .lifted .tag { background: var(--yellow-paper); color: var(--yellow); }
.place { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
caption { text-align: left; color: var(--soft); padding: 0.2rem 0; }
table.index th, table.index td { padding: 0.2rem 0.9rem 0.2rem 0; border-bottom: 1px solid var(--line); }
table.index th { text-align: left; font-weight: 600; }
table.index tbody th { font-weight: normal; min-width: 11rem; }
table.index td:nth-child(3), table.index td:nth-child(4) { text-align: right; font-variant-numeric: tabular-nums; }
table.index th:nth-child(3), table.index th:nth-child(4) { text-align: right; }
summary { cursor: pointer; padding: 0.25rem 0; color: var(--link); }
table.code { width: 100%; table-layout: fixed; font-size: 0.82rem; line-height: 1.45; }
table.code thead th { text-align: left; color: var(--soft); font-weight: 600; }
table.code th:nth-child(2) { width: 1.8rem; }
table.code td { padding: 0 0.4rem; vertical-align: top; overflow-wrap: anywhere; }
table.code td span:first-child { color: var(--soft); }
td.mark { text-align: center; font-weight: 700; }
tr.removed .old { background: var(--red-paper); }
tr.added .new { background: var(--green-paper); }
tr.changed .old { background: var(--red-paper); }
tr.changed .new { background: var(--green-paper); }
tr.renamed .old, tr.renamed .new { background: var(--yellow-paper); }
tr.fold td { color: var(--soft); background: var(--panel); text-align: center; padding: 0.15rem; }
.spoken { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.tools { display: flex; flex-wrap: wrap; gap: 0.6rem; margin: 0.6rem 0; }
button {
  font: inherit; color: var(--ink); background: var(--panel); border: 1px solid var(--line);
  border-radius: 0.4rem; padding: 0.35rem 0.8rem; cursor: pointer;
}
@media (max-width: 46rem) {
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 0.5rem; }
  article { padding: 0.6rem; }
  table.index th, table.index td { padding-right: 0.5rem; }
  table.code thead, table.code td.mark, tr.same td.old { display: none; }
  table.code tr, table.code td { display: block; width: 100%; }
  td.old:empty, td.new:empty { display: none !important; }
  tr.same td.new { padding-left: 1.4rem; }
  tr:not(.same) td.old, tr:not(.same) td.new { padding-left: 1.4rem; text-indent: -1rem; }
  tr:not(.same) td.old::before { content: "- "; }
  tr:not(.same) td.new::before { content: "+ "; }
}
@media print { details:not([open]) > summary { display: none; } .tools { display: none; } }
"""

SCRIPT = """
(function () {
  var all = document.querySelectorAll("details");
  var head = document.getElementById("functions");
  if (!head || all.length < 2) { return; }
  var tools = document.createElement("div");
  tools.className = "tools";
  [["Show all code", true], ["Hide all code", false]].forEach(function (pair) {
    var button = document.createElement("button");
    button.type = "button";
    button.textContent = pair[0];
    button.addEventListener("click", function () {
      all.forEach(function (one) { one.open = pair[1]; });
    });
    tools.appendChild(button);
  });
  head.after(tools);
})();
"""
