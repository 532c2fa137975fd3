"""The parts that the HTML pages of the reports are assembled from.

A page is START, its own styles, HEAD_END, TABLE (a macro) and TITLE; then EACH, SECTION, parts of its own, LISTING and
DONE, which are repeated for every section; then END. It has no script and fetches nothing; Jinja escapes every value.
"""

START = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root { --page: #f4f3f0; --surface: #fcfcfb; --ink: #1b1b1a; --muted: #5d5c58; --line: #dddcd7; --mark: #1f6f43;
        --mark-ink: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --page: #111110; --surface: #1a1a19; --ink: #f4f4f1; --muted: #b3b2ab; --line: #3a3a37; --mark: #35c791;
          --mark-ink: #10251b; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.2rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: .4rem 0; }
h2 { font-size: 1.2rem; margin: 0 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
nav a { margin-right: .9rem; color: inherit; }
.lead, .note, figcaption, .plain { color: var(--muted); }
.note { font-size: .85rem; margin: .35rem 0 0; }
section { background: var(--surface); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem;
          margin: 1rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; white-space: nowrap; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
.label { text-align: left; }
.group { text-align: center; }
details { margin-top: 1rem; }
summary { cursor: pointer; }
picture img { width: 100%; max-width: 58rem; height: auto; display: block; margin: .6rem 0; }
.sample { border-top: 1px solid var(--line); padding: .9rem 0; }
.row { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(7.6rem, 1fr)); }
.card { margin: 0; font-size: .78rem; line-height: 1.35; border: 2px solid transparent; border-radius: .5rem;
        padding: .3rem; overflow-wrap: anywhere; }
.card img, .blank { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: .35rem; background: var(--page);
                    display: block; }
.blank { display: grid; place-items: center; text-align: center; color: var(--muted); padding: .4rem; }
.card .text { display: -webkit-box; -webkit-line-clamp: 3; line-clamp: 3; -webkit-box-orient: vertical;
              overflow: hidden; }
.query { border-color: var(--line); }
.target { border-color: var(--mark); }
.badge { background: var(--mark); color: var(--mark-ink); border-radius: .3rem; padding: 0 .35rem; font-weight: 600; }
pre { overflow-x: auto; font-size: .8rem; }
"""

HEAD_END = """</style>
</head>
<body>
<main>
"""

TABLE = """{% macro show(table) %}
<div class="scroll"><table>
<thead>
{% if table.groups %}<tr>{% for name, span in table.groups %}
<th class="group" colspan="{{ span }}">{{ name }}</th>{% endfor %}</tr>{% endif %}
<tr>{% for name in table.columns %}
<th{% if loop.index0 < table.num_labels %} class="label"{% endif %}>{{ name }}</th>{% endfor %}</tr>
</thead>
<tbody>
{% for row in table.rows %}{% set at = loop.index0 %}<tr>{% for cell in row %}
<td{% if loop.index0 < table.num_labels %} class="label"{% endif %}>
{%- if (at, loop.index0) in table.strong %}<strong>{{ cell }}</strong>{% else %}{{ cell }}{% endif %}</td>
{%- endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% for note in table.notes %}<p class="note">{{ note }}</p>{% endfor %}
{% endmacro %}
"""

TITLE = """<h1>{{ title }}</h1>
<p class="lead">{{ lead }}</p>
<nav>{% for part in sections %}<a href="#{{ part.anchor }}">{{ part.title }}</a>{% endfor %}</nav>
"""

# A section without its end: text, tables, plots, folded tables.
SECTION = """<section id="{{ part.anchor }}">
<h2>{{ part.title }}</h2>
{% if part.text %}<p class="plain">{{ part.text }}</p>{% endif %}
{% for table in part.tables %}{{ show(table) }}{% endfor %}
{% for plot in part.plots %}
<picture><source srcset="{{ plot.dark }}" media="(prefers-color-scheme: dark)">
<img src="{{ plot.light }}" alt="{{ plot.alt }}"></picture>
{% endfor %}
{% for name, table in part.folded %}
<details><summary>{{ name }}</summary>{{ show(table) }}</details>
{% endfor %}
"""

LISTING = """{% if part.listing %}
<details><summary>All settings</summary><pre>{{ part.listing }}</pre></details>{% endif %}
"""

END = """</main>
</body>
</html>
"""

EACH, DONE = "{% for part in sections %}\n", "</section>\n{% endfor %}\n"
