"use strict";
// The charts of one session. A chart is made once, and gets new data each second.
const Charts = (() => {
  const COLORS = ["--accent", "--good", "--warn", "--bad", "--quiet"];
  const KINDS = [
    { name: "rate", title: "Steps per second" },
    { name: "norm", title: "Gradient norm (largest; gaps: NaN or Inf)", log: true },
    { name: "ratio", title: "Update by parameter norm (largest)", log: true },
    { name: "lr", title: "Learning rate of each group" },
    { name: "scale", title: "Loss scale", log: true },
    { name: "clipped", title: "Clipped steps, as a portion", range: [0, 1] },
  ];
  let shown = null;
  let charts = [];

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const lines = (points, name) => (name === "lr" ? points.lr : [points[name]]);
  const positive = (values) => values.map((value) => (value > 0 ? value : null));
  const any = (values) => values.some((value) => value !== null && value !== undefined);

  // Bands where gradients had NaN or Inf: they are what somebody looks for.
  function bands(bad) {
    return (plot) => {
      const { ctx, bbox } = plot;
      ctx.save();
      ctx.fillStyle = color("--bad");
      ctx.globalAlpha = 0.35;
      bad().forEach((at) => {
        const x = plot.valToPos(at, "x", true);
        if (x >= bbox.left && x <= bbox.left + bbox.width) ctx.fillRect(x - 1, bbox.top, 3, bbox.height);
      });
      ctx.restore();
    };
  }

  function made(kind, count, width, bad) {
    const axis = { stroke: color("--quiet"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line") } };
    const series = Array.from({ length: count }, (_, index) => ({
      label: count > 1 ? `group ${index}` : kind.name,
      stroke: color(COLORS[index % COLORS.length]),
      width: 1.5,
      points: { size: 4 },
    }));
    return {
      width,
      height: 180,
      legend: { show: count > 1 },
      cursor: { sync: { key: "stepwire" } },
      scales: { x: { time: true }, y: kind.log ? { distr: 3 } : kind.range ? { range: kind.range } : {} },
      axes: [{ ...axis, space: 72, values: moments }, { ...axis, size: 64, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : short(tick))) }],
      series: [{}, ...series],
      hooks: { draw: [bands(bad)] },
    };
  }

  const short = (value) => (Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(0) : String(+value.toPrecision(4)));

  // The time of day alone, and the day where another one begins: uPlot's own second line overlaps in narrow charts.
  function moments(_, ticks, __, ___, step) {
    const time = { hour: "2-digit", minute: "2-digit", ...(step < 60 ? { second: "2-digit" } : {}), hour12: false };
    let day = new Date().toDateString();
    return ticks.map((tick) => {
      const moment = new Date(tick * 1000), isSame = moment.toDateString() === day;
      day = moment.toDateString();
      return isSame ? moment.toLocaleTimeString([], time) : moment.toLocaleDateString([], { month: "short", day: "numeric" });
    });
  }

  function build(root, points, id) {
    root.replaceChildren();
    charts = [];
    KINDS.forEach((kind) => {
      const count = lines(points, kind.name).length;
      if (!count || !lines(points, kind.name).some(any)) return;
      const figure = document.createElement("figure");
      const caption = document.createElement("figcaption");
      caption.textContent = kind.title;
      figure.append(caption);
      root.append(figure);
      const entry = { kind, count, figure, bad: [] };
      const width = Math.max(figure.clientWidth - 18, 200);
      entry.plot = new uPlot(made(kind, count, width, () => entry.bad), [[], ...Array(count).fill([])], figure);
      charts.push(entry);
    });
    shown = { id, kinds: kinds(points) };
  }

  const kinds = (points) => KINDS.map(({ name }) => (lines(points, name).some(any) ? lines(points, name).length : 0)).join();

  function update(root, detail) {
    const { points, id } = detail;
    if (shown === null || shown.id !== id || shown.kinds !== kinds(points)) build(root, points, id);
    const bad = points.at.filter((_, index) => points.bad[index] > 0);
    charts.forEach((entry) => {
      entry.bad = bad;
      const values = lines(points, entry.kind.name).map((line) => (entry.kind.log ? positive(line) : line));
      entry.plot.setData([points.at, ...values]);
    });
  }

  function rebuild() {
    shown = null;
  }

  addEventListener("resize", () => charts.forEach(({ plot, figure }) => plot.setSize({ width: Math.max(figure.clientWidth - 18, 200), height: 180 })));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", rebuild);
  return { update, rebuild, count: () => charts.length };
})();
