"""The page's CSS; `color` of a chart's group colours its marks and labels."""

CSS = """
:root{color-scheme:light dark;--bg:#f6f7f9;--surface:#fff;--ink:#1b2430;
--muted:#5b6878;--grid:#e6e9ee;--line:#dde2e9;--chosen:#1d5fd1;
--rejected:#c2500a;--train:#4a5a70;--eval:#8a2fb0;--good:#0c7a45;--bad:#b3261e;
--note:#fff6e0;--noteline:#e0a526}
@media (prefers-color-scheme:dark){:root{--bg:#0f1319;--surface:#171c24;
--ink:#e6eaf0;--muted:#9aa7b8;--grid:#283040;--line:#2b3443;--chosen:#74aaff;
--rejected:#ff9d5c;--train:#a9b7ca;--eval:#d79bf0;--good:#5fd39a;--bad:#ff8a80;
--note:#2b2412;--noteline:#a37a1c}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);overflow-wrap:anywhere;
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;line-height:1.25;margin:0}
h2{font-size:18px;margin:38px 0 12px}h3{font-size:14.5px;margin:0 0 2px}
p{margin:0 0 10px}small{display:inline-block;line-height:1.4}
.facts,.sub,small{color:var(--muted)}.facts{margin:4px 0 20px}
.sub{font-size:13px;margin:0 0 8px}
.lead{font-size:18px;margin:0 0 16px;max-width:62em}
.card{background:var(--surface);border:1px solid var(--line);
border-radius:10px;padding:14px 16px}
.tiles,.main,.charts,.small,.pair,.two{display:grid;gap:14px}
.tiles{grid-template-columns:repeat(auto-fill,minmax(186px,1fr))}
.main{grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
.charts{grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr));
margin:14px 0}
.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))}
.two{align-items:start;
grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}
.tile b{display:block;font-size:22px;white-space:nowrap}
.tile b span{color:var(--muted);font-weight:400}
.better{color:var(--good)}.worse{color:var(--bad)}
.note{background:var(--note);border:1px solid var(--noteline);
border-left-width:5px;border-radius:8px;padding:12px 16px;margin:16px 0}
.note p:last-child{margin:0}
.main .card,.charts .card{display:flex;flex-direction:column}
.key{display:flex;flex-wrap:wrap;gap:0 16px;margin-top:auto}
.key span{display:flex;align-items:center;gap:6px}
.key i{border-top:2px solid;width:16px}
.key .dots{border:4px solid;border-radius:4px;width:0}
svg{display:block;width:100%;height:auto;margin-top:auto;font-size:11.5px}
.key+svg{margin-top:4px}.main svg,.small svg{max-width:500px;align-self:center}
svg text{fill:var(--muted);text-anchor:middle}
svg .y,svg .guide-label{text-anchor:end}
svg .end{fill:currentColor;font-weight:600;text-anchor:start}
.guide-label{stroke:var(--surface);stroke-width:3;paint-order:stroke}
path{fill:none;stroke:var(--muted);pointer-events:none}
path.grid{stroke:var(--grid)}.guide{stroke-dasharray:5 4}
.line,.thin,.dots{stroke:currentColor;stroke-width:2;stroke-linecap:round;
stroke-linejoin:round}
.thin{stroke-width:1;opacity:.4}path.dots{stroke-width:1.2;stroke-dasharray:2 3}
circle{fill:currentColor;stroke:var(--surface)}
.hover{fill:transparent}.hover rect:hover{fill:var(--ink);opacity:.07}
table{border-collapse:collapse;width:100%;font-size:14px}
td{padding:4px 14px 4px 0;vertical-align:top;
border-bottom:1px solid var(--grid)}
td:first-child,.k{white-space:nowrap;width:1%;padding-right:24px}
.n{text-align:right}td.n,td.k{padding-right:14px}
code{font:13px/1.45 ui-monospace,Menlo,Consolas,monospace}
b,.n,code,svg{font-variant-numeric:tabular-nums}
.sample{margin-bottom:14px}
.pair{grid-template-columns:repeat(2,minmax(0,1fr));margin-top:10px}
.said{white-space:pre-wrap;max-height:21em;overflow:auto;font-size:14px;
unicode-bidi:isolate}
.side{border-top:3px solid var(--line);padding-top:6px}
.side.after{border-color:var(--chosen)}
details{margin-top:14px}summary{cursor:pointer;font-weight:600}
@media (max-width:620px){.pair{grid-template-columns:1fr}}
@media print{body{background:none;font-size:11pt}main{padding:0;max-width:none}
.card,.note{break-inside:avoid}.sample{break-inside:auto}.hover{display:none}
.said{max-height:none}h2,h3,.sub{break-after:avoid}
.charts{grid-template-columns:1fr 1fr}
.main,.small{grid-template-columns:1fr 1fr 1fr}}
"""
