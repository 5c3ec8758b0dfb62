"""The style sheet of the HTML report: system fonts, light and dark, readable on a phone.

Text has a contrast of at least 7 to 1 against its ground, marks of pictures of at least 3 to 1.
"""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--ground:#fff;--panel:#f4f5f7;--ink:#1b1e23;--soft:#454b55;
--line:#cfd3da;--searched:#1459a8;--uniform:#848b97;--third:#b4570b;--phase:#e9edf3}
@media (prefers-color-scheme:dark){:root{--ground:#15181d;--panel:#1e2229;--ink:#eceef1;
--soft:#b9c0cb;--line:#3a404a;--searched:#6cb0f5;--uniform:#878f9c;--third:#eb9d54;
--phase:#232a34}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
main{max-width:62rem;margin:0 auto;padding:2rem 1.25rem 4rem}
.kind{margin:0;color:var(--soft)}
h1{font-size:clamp(1.4rem,1.05rem + 1.6vw,2.1rem);line-height:1.25;margin:.2rem 0 1.2rem;
text-wrap:balance;overflow-wrap:break-word}
h1::first-letter{text-transform:uppercase}
h2{font-size:1.25rem;margin:2.6rem 0 .6rem;padding-top:1rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.6rem 0 .4rem}
p{margin:.5rem 0;max-width:46rem}
dl.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.8rem 1.2rem;
margin:0;padding:1rem 1.2rem;background:var(--panel);border-radius:6px}
dl.facts dt{color:var(--soft);font-size:.875rem}
dl.facts dd{margin:0;overflow-wrap:anywhere}
dl.reading dt{font-weight:600;margin-top:.7rem}
dl.reading dd{margin:0;max-width:46rem}
.scroll{overflow-x:auto;margin:.2rem 0 .8rem}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--searched);outline-offset:2px}
table{border-collapse:collapse;font-size:.9375rem;font-variant-numeric:tabular-nums}
p.caption{color:var(--soft);font-size:.875rem;margin:1.2rem 0 .1rem}
th,td{padding:.34rem .9rem .34rem 0;border-bottom:1px solid var(--line);text-align:right;
vertical-align:top;white-space:nowrap}
thead th{font-weight:600;white-space:normal;border-bottom-color:var(--soft);vertical-align:bottom}
tbody th{font-weight:400;position:sticky;left:0;background:var(--ground)}
th.words,td.words{text-align:left}
td.words,tbody th.words{white-space:normal;overflow-wrap:break-word;max-width:30rem}
td.long{min-width:min(18rem,60vw)}
tr>:last-child{padding-right:0}
tr.total>*{font-weight:600;border-bottom:0}
.pm{color:var(--soft);font-weight:400}
figure{margin:.8rem 0;min-width:0}
figcaption{color:var(--soft);font-size:.875rem;margin-top:.3rem}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:1.5rem}
svg{display:block;width:100%;height:auto}
svg text{font-size:11.5px;fill:var(--soft)}
.small svg{max-width:27rem}
text.end{text-anchor:end}
text.middle{text-anchor:middle}
.grid{stroke:var(--line)}
.axis{stroke:var(--soft)}
.zero,.diagonal{stroke:var(--soft);stroke-dasharray:5 4}
circle{fill:var(--searched);stroke:var(--ground)}
.searched,.part0{fill:var(--searched);background:var(--searched)}
.uniform,.part1{fill:var(--uniform);background:var(--uniform)}
.part2{fill:var(--third);background:var(--third)}
.phase{fill:var(--phase);background:var(--phase)}
.best{fill:none;stroke:var(--searched);stroke-width:2}
.failed{fill:none;stroke:var(--third);stroke-width:2}
.key{display:inline-block;width:.8em;height:.8em;margin:0 .35em 0 .1em;border:1px solid var(--soft)}
.legend{white-space:nowrap;margin-right:1.1em}
details{margin:.8rem 0;border-top:1px solid var(--line);padding-top:.5rem}
summary{cursor:pointer;font-weight:600;padding:.25rem 0}
pre{overflow-x:auto;padding:1rem;background:var(--panel);border-radius:6px;font-size:.8125rem}
dl.texts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,13rem),1fr));gap:.8rem;
margin:.2rem 0 1rem}
dl.texts>div{min-width:0;padding:.6rem .9rem;background:var(--panel);border-radius:6px}
dl.texts dt{color:var(--soft);font-size:.875rem}
dl.texts dd,p.prompt{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
p.prompt{margin:.2rem 0;padding-left:.8rem;border-left:3px solid var(--line)}
@media (max-width:640px){main{padding:1.25rem 1rem 3rem}.pair{grid-template-columns:1fr;gap:0}
.broad svg{min-width:36rem}
svg text{font-size:13px}.broad svg text{font-size:15px}table{font-size:.84rem}
th,td{padding-right:.55rem}td .pm{display:block}}
"""
