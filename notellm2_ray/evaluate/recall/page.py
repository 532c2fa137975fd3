"""The HTML of the recall report: sample queries beside what every report has."""

from notellm2_ray.evaluate.templates import DONE, EACH, END, HEAD_END, LISTING, SECTION, START, TABLE, TITLE

_CARD = """{% macro card(note, kind) %}
<figure class="card {{ kind }}">
{% if note.thumbnail %}<img src="{{ note.thumbnail }}" alt="" loading="lazy">
{% else %}<div class="blank">{{ note.why_blank }}</div>{% endif %}
<figcaption>
<span class="text" dir="auto">{{ note.title }}</span>
{% if kind == "query" %}query {{ note.note_id }}
{% else %}#{{ note.rank }} · {{ "%.3f"|format(note.score) }}
{% if note.is_target %}<span class="badge">target</span>{% endif %}{% endif %}
</figcaption>
</figure>
{% endmacro %}
"""

_SAMPLES = """{% for method, samples in part.samples %}
<h3>{{ method }}</h3>
{% for sample in samples %}
<div class="sample"><div class="row">
{{ card(sample.query, "query") }}
{% for note in sample.neighbors %}{{ card(note, "target" if note.is_target else "") }}{% endfor %}
</div></div>
{% endfor %}{% endfor %}
"""

PAGE = START + HEAD_END + TABLE + _CARD + TITLE + EACH + SECTION + _SAMPLES + LISTING + DONE + END
