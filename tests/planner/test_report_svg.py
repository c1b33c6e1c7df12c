"""What the report is drawn and written with: scales, ticks, labels, escapes, tables."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from report_reader import Back, read

from planner.explain import Table
from planner.report_page import Figure, figure, table
from planner.report_svg import Labels, Scale, spread, text_width, ticks

POSITIVE = st.floats(1e-6, 1e9)


@given(low=POSITIVE, factor=st.floats(1.01, 1e8), log=st.booleans(), most=st.integers(2, 9))
def test_ticks_lie_inside_rise_and_are_few(low, factor, log, most):
    scale = Scale(low=low if log else 0.0, high=low * factor, start=0.0, end=100.0, log=log)
    found = ticks(scale, most)
    assert found == sorted(set(found))
    assert all(scale.low * (1 - 1e-6) <= value <= scale.high * (1 + 1e-6) for value in found)
    assert len(found) <= most + 1
    positions = [scale.at(value) for value in found]
    assert positions == sorted(positions)


@given(low=POSITIVE, factor=st.floats(1.5, 1e8), log=st.booleans(), share=st.floats(0, 1))
def test_positions_and_numbers_are_inverse(low, factor, log, share):
    scale = Scale(low=low if log else 0.0, high=low * factor, start=10.0, end=410.0, log=log)
    value = scale.low * (scale.high / scale.low) ** share if log else share * scale.high
    assert value in Back.of(scale.words).number(round(scale.at(value), 2))


@given(wanted=st.lists(st.floats(0, 300), min_size=1, max_size=9))
def test_spread_labels_keep_their_order_and_their_distance(wanted):
    found = spread(wanted, 15.0, 0.0, 300.0)
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = [found[index] for index in order]
    gaps = [later - earlier for earlier, later in pairwise(placed)]
    assert all(gap >= 15.0 - 1e-9 for gap in gaps)
    assert all(-1e-9 <= place <= 300.0 + 1e-9 for place in placed)


@given(
    spots=st.lists(st.tuples(st.floats(0, 400), st.floats(0, 300), st.text("abcx", min_size=1))),
)
def test_placed_labels_never_overlap_nor_leave(spots):
    labels = Labels(inside=(0, 0, 400, 300))
    boxes = []
    for x, y, text in spots:
        place = labels.place((x, y), text)
        if place is None:
            continue
        edge, base, anchor = place
        width = text_width(text)
        left = {"start": edge, "end": edge - width, "middle": edge - width / 2}[anchor]
        boxes.append((left, base - 10, left + width, base + 1))
    for index, one in enumerate(boxes):
        assert one[0] >= -1e-6
        assert one[2] <= 400 + 1e-6
        for other in boxes[:index]:
            apart = one[2] <= other[0] + 1e-6 or other[2] <= one[0] + 1e-6
            assert apart or one[3] <= other[1] or other[3] <= one[1]


def test_columns_of_words_stand_left_and_numbers_right():
    page = read(
        table(Table(columns=("a", "b"), rows=(("x", "1 s"), ("y", "-"))), "c", chosen=1).encode()
    )
    first, second = page.all("th")
    assert first.attributes.get("class") == "left"
    assert "class" not in second.attributes
    assert [row.attributes.get("class") for row in page.all("tr")] == [None, None, "chosen"]


@given(text=st.text())
def test_any_text_survives_in_figures_and_tables(text):
    shown = text.encode("utf-8", "replace").decode()
    what = Figure(name="f", heading=text, lead=text, drawings=())
    page = read(figure(what).encode("utf-8", "replace"))
    assert page.all("h3")[0].text == shown.replace("\r\n", "\n").replace("\r", "\n") or "\r" in text
    assert [node.tag for node in page.walk()][1:] == ["figure", "figcaption", "h3", "p"]
