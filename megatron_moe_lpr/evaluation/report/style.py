"""The report's style sheet."""

STYLE = """
:root { color-scheme: light dark; --ink: #1e293b; --soft: #5b6b80; --line: #e2e8f0; --blue: #1e40af; --page: #f1f5f9;
  --card: #fff; --marked: #eff6ff; --empty: #f1f5f9; --prompt: #8492a6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e2e8f0; --soft: #9fb0c5; --line: #334155; --blue: #93b4fd; --page: #0f172a; --card: #1e293b;
    --marked: #273a5c; --empty: #273449; --prompt: #7f8ea3; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 38px; line-height: 1.15; margin: 4px 0 12px; letter-spacing: -0.02em; }
h2 { font-size: 22px; margin: 0 0 6px; }
h4 { font-size: 15px; margin: 0 0 8px; }
.kicker { color: var(--blue); font-weight: 600; margin: 0; }
.lead { font-size: 18px; max-width: 850px; margin: 0 0 24px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 24px;
  margin: 0 0 20px; }
section > p { color: var(--soft); max-width: 850px; margin: 0 0 16px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 16px; background: none;
  border: 0; padding: 0; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 22px; }
.tiles strong { display: block; font-size: 36px; line-height: 1.2; color: var(--blue); letter-spacing: -0.02em; }
.tiles span { display: block; } .tiles small { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 9px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; }
thead th.group { text-align: center; color: var(--ink); }
tbody th, thead tr:first-child th:first-child { text-align: left; font-weight: 600; white-space: normal; }
tbody tr { background: var(--card); } tbody tr.subject { background: var(--marked); }
tbody th { min-width: 130px; position: sticky; left: 0; background: inherit; }
figure + figure { margin-top: 28px; } .maps figure, .charts figure { margin-top: 0; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 24px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 24px; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: 13px; }
svg { width: 100%; height: auto; display: block; font: 12px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
svg .grid { stroke: var(--line); } svg .tick { fill: var(--soft); } svg .label { font-weight: 600; fill: var(--ink); }
svg .name { font-weight: 600; } svg .empty { fill: var(--empty); }
svg .bar { stroke-width: 1.5; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 14px 28px; }
.samples div { display: flex; gap: 14px; } .samples p { margin: 0; } .samples b { color: var(--blue); width: 24px; }
.prompt { color: var(--prompt); }
ol { margin: 8px 0 0; padding-left: 22px; } li { margin-bottom: 6px; }
@media (max-width: 600px) {
  main { padding: 20px 12px 40px; } section { padding: 18px 14px; } h1 { font-size: 28px; }
  .tiles strong { font-size: 30px; }
}
"""
