"""The charts of the page, empty: bokeh's models as JSON. The page's scripts fill their sources and colour them."""

from __future__ import annotations

from typing import Any

from bokeh.core.properties import value
from bokeh.embed import json_item
from bokeh.layouts import column
from bokeh.models import (
    BoxZoomTool,
    ColumnDataSource,
    CrosshairTool,
    CustomJS,
    FixedTicker,
    HoverTool,
    PanTool,
    Range1d,
    ResetTool,
    Span,
    TapTool,
    WheelZoomTool,
)
from bokeh.plotting import figure

from zcompile.timeline import OWNERS


def charts() -> dict[str, Any]:
    """name -> what Bokeh.embed.embed_item takes: "time" (the timeline, and memory under it), "graph"."""
    time = Range1d(0, 1)
    line = Span(dimension="height", line_width=1, line_alpha=0.5, line_color="#888888")
    both = column(_timeline(time, line), _memory(time, line), sizing_mode="stretch_both", spacing=0)
    return {"time": json_item(both, "time-chart"), "graph": json_item(_graph(), "graph-chart")}


def _call(function: str, data: str = "cb_data") -> CustomJS:
    return CustomJS(code=f"window.zc && zc.{function}({data})")


def _plain(name: str, **settings: Any) -> Any:
    plot = figure(
        name=name, toolbar_location=None, background_fill_color=None, border_fill_color=None,
        outline_line_color=None, output_backend="canvas", **settings,
    )  # fmt: skip
    plot.xgrid.grid_line_color = plot.ygrid.grid_line_color = None
    return plot


def _tools(plot: Any, dimensions: str) -> None:
    wheel, pan = WheelZoomTool(dimensions=dimensions), PanTool(dimensions=dimensions)
    plot.add_tools(wheel, pan, ResetTool())
    plot.toolbar.active_scroll, plot.toolbar.active_drag = wheel, pan


def _over_time(name: str, time: Range1d, **settings: Any) -> Any:
    """The timeline and what stands under it: one axis of time, one frame."""
    plot = _plain(
        name, min_border_left=72, min_border_right=16, x_range=time, y_range=Range1d(0, 1), tools="", **settings
    )
    _tools(plot, "width")
    return plot


def _quads(plot: Any, name: str, **settings: Any) -> Any:
    columns = ("left", "right", "top", "bottom", "fill", "index")
    source = ColumnDataSource({column: [] for column in columns}, name=f"{plot.name}-{name}")
    return plot.quad("left", "right", "top", "bottom", source=source, fill_color="fill", name=name, **settings)


def _same(renderer: Any) -> None:
    """A selection changes nothing by itself: the page says what is lit."""
    renderer.nonselection_glyph = renderer.selection_glyph = renderer.hover_glyph = None


def _timeline(time: Range1d, line: Span) -> Any:
    plot = _over_time("timeline", time, sizing_mode="stretch_both")
    plot.add_tools(BoxZoomTool(dimensions="width"))
    spans = _quads(plot, "spans", line_color=None)
    _same(spans)
    veil = _quads(plot, "veil", line_color=None, fill_alpha=0.72)
    lit = _quads(plot, "lit", line_color="edge", line_width=1.5)
    lit.data_source.data["edge"] = []
    arrows = ColumnDataSource({"x0": [], "y0": [], "x1": [], "y1": []}, name="timeline-arrows")
    plot.segment("x0", "y0", "x1", "y1", source=arrows, line_width=1.5, line_color="#888888", name="arrows")
    veil.level = lit.level = "glyph"  # in this order, over the spans
    phases = _quads(plot, "phases", line_color=None)
    phases.level = "underlay"
    names = ColumnDataSource({"x": [], "y": [], "text": [], "color": []}, name="timeline-names")
    plot.text("x", "y", "text", source=names, text_color="color", text_baseline="middle", text_font_size="11px", name="names",
              x_offset=4, text_font=value("system-ui, sans-serif"))  # fmt: skip
    plot.add_tools(
        HoverTool(renderers=[spans], tooltips=None, callback=_call("hoverSpan"), point_policy="follow_mouse")
    )
    plot.add_tools(TapTool(renderers=[spans], callback=_call("tapSpan")), CrosshairTool(overlay=line))
    plot.js_on_event("tap", _call("tapTimeline", "cb_obj"))
    plot.yaxis.ticker = FixedTicker(ticks=[])
    plot.axis.minor_tick_line_color = plot.axis.axis_line_color = plot.yaxis.major_tick_line_color = None
    plot.xaxis.axis_label = "ms"
    return plot


def _memory(time: Range1d, line: Span) -> Any:
    plot = _over_time("memory", time, sizing_mode="stretch_width", height=150)
    columns = ("at", "total", *(f"{owner}{end}" for owner in OWNERS for end in ("_from", "_to")))
    # Bokeh 3.9 does not return from drawing an area of no points.
    source = ColumnDataSource({column: [0, 0] for column in columns}, name="memory-owners")
    for owner in OWNERS:
        plot.varea_step(
            "at",
            f"{owner}_from",
            f"{owner}_to",
            source=source,
            step_mode="after",
            name=owner,
            fill_color="#888888",
            fill_alpha=0.85,
        )
    total = plot.step("at", "total", source=source, mode="after", line_alpha=0.0, name="total")
    plot.add_tools(
        HoverTool(renderers=[total], tooltips=None, mode="vline", line_policy="prev", callback=_call("hoverMemory"))
    )
    plot.add_tools(CrosshairTool(overlay=line))
    plot.axis.minor_tick_line_color = plot.axis.axis_line_color = None
    plot.xaxis.visible = False
    return plot


def _graph() -> Any:
    plot = _plain("graph", sizing_mode="stretch_both", x_range=Range1d(0, 1), y_range=Range1d(1, 0), tools="")
    _tools(plot, "both")
    edges = ColumnDataSource({c: [] for c in ("x0", "y0", "x1", "y1", "cx0", "cy0", "cx1", "cy1")}, name="graph-edges")
    curve = {key: key for key in ("x0", "y0", "x1", "y1", "cx0", "cy0", "cx1", "cy1")}
    modules = _quads(plot, "modules", line_color="edge", line_width=1)
    plot.bezier(**curve, source=edges, line_color="#8892a0", line_alpha=0.45, line_width=1, name="edges")
    boxes = _quads(plot, "boxes", line_color="edge", line_width=1)
    lit_edges = ColumnDataSource({key: [] for key in (*curve, "color")}, name="graph-lit-edges")
    plot.bezier(**curve, source=lit_edges, line_color="color", line_width=2.5, name="lit-edges")
    lit = _quads(plot, "lit", line_color="edge", line_width=2.5)
    for renderer in (modules, boxes, lit):
        renderer.data_source.data["edge"] = []
    _same(boxes)
    _same(modules)
    labels = ColumnDataSource({key: [] for key in ("x", "y", "text", "color")}, name="graph-labels")
    plot.text(
        "x", "y", "text", source=labels, text_color="color", text_baseline="middle", text_align="center", text_font_size="11px",
        text_font=value("system-ui, sans-serif"), name="labels",
    )  # fmt: skip
    plot.add_tools(HoverTool(renderers=[boxes, modules], tooltips=None, callback=_call("hoverBox")))
    plot.js_on_event("tap", _call("tapBox", "cb_obj"))
    plot.axis.visible = False
    return plot
