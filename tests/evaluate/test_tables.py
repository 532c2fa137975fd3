"""Tables as Markdown."""

from notellm2_ray.evaluate.tables import Table


def test_markdown_cells_cannot_break_the_table():
    table = Table(("a|b", "value"), [["<img src=x>|\n# head", "1"]])
    lines = table.markdown().splitlines()
    assert len(lines) == 3
    assert lines[0] == r"| a\|b | value |"
    assert lines[2] == r"| \<img src=x\>\| \# head | 1 |"
