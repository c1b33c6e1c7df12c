"""The look of a plan's report: one style sheet, and nothing that is fetched from anywhere.

Hues are those of Okabe and Ito, which people with any colour vision tell apart; whatever a colour
says, a mark's shape, its place or a label says as well. Dark is for screens only: paper is white.
"""

STYLE = """
:root{color-scheme:light dark;
--paper:#fbfbfa;--card:#fff;--ink:#1c2127;--soft:#586069;--rule:#d9dde2;
--grid:#e8ebee;--c1:#0072b2;--c2:#c65102;--c3:#00815d;--c4:#a8487f;--c5:#b57600;--c6:#3f93c8;
--c7:#6b6ecf;--c8:#7a6a4f;--quiet:#8b939c;--tint:#eaf3f9}
@media screen and (prefers-color-scheme:dark){:root{--paper:#14171a;--card:#1c2024;--ink:#e8eaed;
--soft:#a3abb4;--rule:#363c43;--grid:#2a2f35;--c1:#5bb4ec;--c2:#f28b4b;--c3:#35c79a;--c4:#e39cc5;
--c5:#edb64a;--c6:#9bd4f7;--c7:#a9abf5;--c8:#c9b48d;--quiet:#858e98;--tint:#1d2a35}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main,header,footer{max-width:1200px;margin:0 auto;padding:0 24px}
header{padding-top:36px}
h1{font-size:clamp(1.45rem,1.1rem + 1.8vw,2.3rem);line-height:1.2;margin:.1em 0 .35em;
letter-spacing:-.01em;text-wrap:balance}
h2{font-size:1.3rem;margin:2.2em 0 .6em;padding-top:.7em;border-top:1px solid var(--rule)}
h3{font-size:1.02rem;line-height:1.35;margin:0 0 .25em}
p{margin:.3em 0 .8em;max-width:74ch}
.over{color:var(--soft);font-size:.95rem;margin:0;overflow-wrap:anywhere}
.lead{color:var(--soft);font-size:.92rem;line-height:1.45;margin:0 0 .8em}
ul.plain{padding-left:1.15em;margin:.3em 0 1em;max-width:84ch}
ul.plain li{margin:.3em 0;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;
margin:1.2em 0;padding:0;list-style:none}
.tiles li{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:10px 14px;
font-size:.84rem;color:var(--soft);line-height:1.35}
.tiles b{display:block;font-size:1.4rem;line-height:1.25;color:var(--ink);font-weight:650;
font-variant-numeric:tabular-nums}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:0 36px}
.figures{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:20px}
figure,.card{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:10px;
padding:16px 18px;min-width:0;break-inside:avoid}
figure.wide{grid-column:1/-1}
.card{margin-top:20px}
figure svg[role=img]{display:block;width:100%;height:auto;max-width:540px;margin:0 auto;
overflow:visible}
figure.wide .scroll>svg[role=img]{max-width:960px;min-width:600px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:18px 28px;
align-items:start}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;list-style:none;margin:0 0 10px;padding:0;
font-size:.84rem;color:var(--soft)}
.legend svg{width:18px;height:12px;margin-right:6px;vertical-align:-1px;overflow:visible}
.scroll{overflow-x:auto;max-width:100%}
:focus-visible{outline:3px solid var(--c1);outline-offset:2px;border-radius:4px}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;margin:.4em 0;
}
caption{text-align:left;color:var(--soft);padding-bottom:4px}
th,td{padding:4px 12px 4px 0;text-align:right;vertical-align:top;
border-bottom:1px solid var(--grid);white-space:nowrap}
th:first-child,td:first-child,.words,.left{text-align:left}
td.words{white-space:normal;min-width:14em}
table{min-width:min(100%,420px)}
thead th{color:var(--soft);font-weight:600;border-bottom-color:var(--rule)}
tr.chosen td,tr.chosen th{background:var(--tint);font-weight:650}
details{margin-top:10px;font-size:.9rem}
summary{cursor:pointer;color:var(--soft);width:fit-content;padding:2px 0}
code{font:.88em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
pre{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:10px 14px;
overflow-x:auto;margin:.4em 0 1em}
footer{color:var(--soft);font-size:.88rem;padding-bottom:48px}
svg text{font-size:13px;fill:var(--ink);font-family:inherit;font-variant-numeric:tabular-nums}
svg .tick,svg .name{fill:var(--soft)}
svg .small{font-size:11px}
svg .strong{font-weight:650}
svg .halo{paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
.grid{stroke:var(--grid)}
.axis{stroke:var(--quiet)}
.line{fill:none;stroke-width:2.2;stroke-linejoin:round}
.dash{stroke-dasharray:6 4}
.limit{fill:none;stroke:var(--c2);stroke-width:1.6;stroke-dasharray:2 3;stroke-linecap:round}
.frontier{fill:none;stroke:var(--quiet);stroke-width:1.3}
.wire{fill:none;stroke:var(--quiet);stroke-width:1.4}
.band{fill:var(--c1);fill-opacity:.16;stroke:none}
.part{fill:var(--grid);stroke:var(--rule)}
.free{fill:none;stroke:var(--quiet);stroke-dasharray:3 3}
.f1{fill:var(--c1)}.f2{fill:var(--c2)}.f3{fill:var(--c3)}.f4{fill:var(--c4)}.f5{fill:var(--c5)}
.f6{fill:var(--c6)}.f7{fill:var(--c7)}.f8{fill:var(--c8)}.f0{fill:var(--quiet)}
.s1{stroke:var(--c1)}.s2{stroke:var(--c2)}.s3{stroke:var(--c3)}.s4{stroke:var(--c4)}
.s5{stroke:var(--c5)}.s6{stroke:var(--c6)}.s7{stroke:var(--c7)}.s8{stroke:var(--c8)}
.s0{stroke:var(--quiet)}
.hollow{fill:var(--card);stroke-width:1.5}
.veil{fill-opacity:.28}
.cell{stroke-width:1.3}
.edge{stroke:var(--card);stroke-width:1}
.thin{stroke:var(--card);stroke-width:.4}
.light{fill:var(--ink);fill-opacity:.75}
.rim{stroke:var(--ink);stroke-width:1.4}
svg circle:hover,svg polygon:hover,svg rect[class]:hover{filter:brightness(1.15)}
@media (max-width:860px){.figures{grid-template-columns:minmax(0,1fr)}}
@media (max-width:520px){main,header,footer{padding-left:12px;padding-right:12px}
figure,.card{padding:12px 10px}header{padding-top:20px}.tiles{grid-template-columns:1fr 1fr;gap:8px}
.tiles b{font-size:1.2rem}}
@media print{body{font-size:10.5pt;background:#fff}.figures{gap:10px}h2{break-after:avoid}
figure.wide .scroll>svg[role=img]{min-width:0}.scroll{overflow:visible}
details::details-content{content-visibility:visible;display:block}}
"""
