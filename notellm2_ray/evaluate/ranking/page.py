"""The HTML of the ranking report: users with their history, preferences and ranking beside what every report has."""

from notellm2_ray.evaluate.templates import DONE, EACH, END, HEAD_END, LISTING, SECTION, START, TABLE, TITLE

_STYLE = """
.user { border-top: 1px solid var(--line); padding: .9rem 0; }
.user h3 { margin-top: .2rem; overflow-wrap: anywhere; }
.block { border-left: 3px solid var(--line); padding-left: .8rem; margin: .9rem 0; }
.preference { margin: .5rem 0; padding: .5rem .7rem; background: var(--page); border-radius: .4rem;
              overflow-wrap: anywhere; }
.summary { color: var(--muted); }
"""

_NOTE = """{% macro card(note) %}
<figure class="card{% if note.is_target %} target{% endif %}">
{% if note.thumbnail %}<img src="{{ note.thumbnail }}" alt="" loading="lazy">
{% else %}<div class="blank">{{ note.why_blank }}</div>{% endif %}
<figcaption>
{% if note.rank %}#{{ note.rank }} · P(yes) {{ "%.3f"|format(note.score) }}
{% if note.is_target %}<span class="badge">target</span>{% endif %}<br>{% endif %}
<span class="text" dir="auto">{{ note.title }}</span>
{% if note.summary %}<details><summary>image summary</summary>
<span class="summary" dir="auto">{{ note.summary }}</span></details>{% endif %}
</figcaption>
</figure>
{% endmacro %}
"""

_USERS = """{% for user in part.users %}
<div class="user">
<h3>{{ user.method }}: user {{ user.user_id }}</h3>
<p class="plain">the target comes {{ user.target_rank }} of {{ user.candidates|length }}</p>
{% for block in user.blocks %}
<div class="block">
<div class="plain">block {{ block.number + 1 }}</div>
<div class="row">{% for note in block.notes %}{{ card(note) }}{% endfor %}</div>
{% if block.preference %}<p class="preference" dir="auto">{{ block.preference }}</p>{% endif %}
</div>
{% endfor %}
{% if not user.blocks %}<p class="plain">no history</p>{% endif %}
<div class="plain">candidates, best first</div>
<div class="row">{% for note in user.candidates %}{{ card(note) }}{% endfor %}</div>
</div>
{% endfor %}
"""

PAGE = START + _STYLE + HEAD_END + TABLE + _NOTE + TITLE + EACH + SECTION + _USERS + LISTING + DONE + END
