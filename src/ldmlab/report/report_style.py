"""How the report looks: one style sheet, the reader's own fonts, light and dark."""

STYLE = """
:root{--ink:#1c2230;--dim:#6b7385;--line:#e4e7ee;--paper:#fff;--ground:#f5f6f9;--good:#2f9e6e;--bad:#d06a3c;--blue:#2f6fde}
@media (prefers-color-scheme:dark){:root{--ink:#e7e9ef;--dim:#98a0b3;--line:#2c3342;--paper:#191e29;--ground:#11151d}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:48px 24px 96px}
h1{font-size:30px;line-height:1.2;margin:0 0 8px;letter-spacing:-.02em}
h2{font-size:20px;margin:0 0 6px;letter-spacing:-.01em}
h3{font-size:15px;margin:18px 0 6px}
p{margin:0 0 14px;color:var(--dim);max-width:78ch}
section{background:var(--paper);border:1px solid var(--line);border-radius:14px;padding:24px;margin-top:22px}
figure{margin:0}
figcaption{font-size:12px;line-height:1.35;color:var(--dim)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(138px,1fr));gap:12px;margin-top:26px}
.tile{background:var(--paper);border:1px solid var(--line);border-radius:14px;padding:14px 16px}
.tile b{display:block;font-size:23px;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.tile span{font-size:12px;color:var(--dim)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(96px,1fr));gap:14px}
.cards.pairs{grid-template-columns:repeat(auto-fill,minmax(160px,1fr))}
.cards.rows{grid-template-columns:repeat(auto-fill,minmax(min(100%,480px),1fr))}
.cards+p{margin-top:20px}
.card>div{display:flex;gap:4px;margin-bottom:5px}
.card img{flex:1;width:0;min-width:0;aspect-ratio:1;object-fit:contain;border-radius:8px;background:#fff;
border:1px solid var(--line)}
.pairs .card img+img{opacity:.96;border-style:dashed}
.card.copy img{border-color:var(--bad)}
.thumbnails{display:flex;flex-wrap:wrap;gap:6px}
.thumbnails img{width:96px;border-radius:6px}
.halves{display:grid;grid-template-columns:1fr 1fr;gap:28px}
.halves img{width:19%;margin:.5%;border-radius:6px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
td,th{text-align:left;padding:7px 14px 7px 0;border-top:1px solid var(--line);vertical-align:top}
tr:first-child>*{border-top:0}
th{font-weight:600;color:var(--dim);font-size:12px}
.value{font-weight:650;white-space:nowrap}
.dim{color:var(--dim);font-size:13px}
.numbers td:not(:first-child){white-space:nowrap}
.ldm td{font-weight:600}
.ours td{background:color-mix(in srgb,var(--blue) 9%,transparent);font-weight:600}
.ours td:first-child{padding-left:10px}
.stamp{font-style:normal;font-size:11px;color:#fff;background:var(--bad);border-radius:5px;padding:2px 7px;
margin-left:6px}
ul{margin:4px 0 0;padding-left:20px;color:var(--dim)}
.categories td{vertical-align:middle}
.categories td:first-child{white-space:nowrap;font-weight:600}
.bar{position:relative;width:128px;height:17px;border-radius:5px;background:var(--ground);overflow:hidden;margin:3px 0}
.bar i{position:absolute;inset:0 auto 0 0;background:var(--dim);opacity:.35}
.bar.drawn i{background:var(--good);opacity:.45}
.bar span{position:relative;font-size:11px;padding-left:7px;line-height:17px;display:block}
.strip{padding-right:0}
.strip span{display:inline-block;margin:0 5px 3px 0;border-radius:8px;padding:2px;border:2px solid transparent}
.strip img{display:block;width:48px;height:48px;object-fit:contain;border-radius:5px;background:#fff}
.strip .right{border-color:var(--good)}
.strip .wrong{border-color:var(--line);opacity:.8}
.wide{margin-top:14px}
.wide img{max-width:100%;border-radius:8px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:18px}
.charts+table,table+.charts{margin-top:16px}
.chart{width:100%;height:auto;display:block}
.chart text{font-size:10px;fill:var(--dim)}
.chart .rule{stroke:var(--line);stroke-width:1}
.charts figcaption{font-weight:600;color:var(--ink)}
.legend{display:block;font-weight:400;color:var(--dim)}
.legend span{margin-right:10px;white-space:nowrap}
.legend i{display:inline-block;width:9px;height:9px;border-radius:3px;margin-right:4px}
details{margin-top:14px;color:var(--dim)}
summary{cursor:pointer;margin-bottom:10px}
.settings td{font-size:13px;overflow-wrap:anywhere}
.settings td:first-child{color:var(--dim);white-space:nowrap;width:1%}
@media (max-width:700px){.halves{grid-template-columns:1fr}main{padding:28px 14px}section{padding:16px}}
@media print{body{background:#fff}section{break-inside:avoid}}
""".replace("\n", "")
